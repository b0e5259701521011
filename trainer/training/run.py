"""One run, from a config to its folder."""

import logging
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from omegaconf import OmegaConf

from trainer.data.store import atomic_write
from trainer.engine.module import ChunkModule
from trainer.inference.model.plates import WEIGHT
from trainer.options.allowed import refuse_others
from trainer.options.entrance import resolved
from trainer.options.records import plain
from trainer.options.verbs import Train
from trainer.runs import secrets
from trainer.runs.folder import save_words
from trainer.runs.lock import locked
from trainer.training import resume
from trainer.training.assemble import trained
from trainer.training.data import cache_of, held_out_split, places, training_split
from trainer.training.final_evaluation import Finish
from trainer.training.prepare import Context, Given, Splits, prepare
from trainer.training.quarantine import without_damage
from trainer.training.tables import shards_of


def train(cfg: Train, context: Context, given: Given | None = None) -> tuple[ChunkModule, Finish]:
    """Trains and writes the run folder; ``given``: model and guide as objects, in place of the config's."""
    run_dir, first = context.run_dir, context.world.rank == 0
    with locked(run_dir) if first else nullcontext():
        if first and given is None:
            save_words(cfg, run_dir)
        refuse_others(resolved(cfg), cfg.allow)
        cfg, splits = opened_splits(cfg, context)
        prepared = prepare(cfg, context, splits, given, resume.saved(cfg.ckpt_path, run_dir))
        if first:
            _save_config(prepared.cfg, run_dir)
        return trained(prepared, context, keep=given is None or given.keep)


def opened_splits(cfg: Train, context: Context) -> tuple[Train, Splits]:
    """The rows to train on and those held out, packed where they are not, and the config with their place."""
    paths = places(cfg.data.path)
    packed = shards_of(paths, context.console, cache_of(cfg.data), cfg.weight)
    cfg = replace(cfg, data=replace(cfg.data, path=packed[0] if len(packed) == 1 else tuple(packed)))
    if cfg.weight is not None and packed != list(paths):  # a table on the way has it under our name
        cfg = replace(cfg, weight=WEIGHT)
    folder, held_out = training_split(cfg.data), held_out_split(cfg.data)
    if cfg.data.on_corrupt == "quarantine":
        where = context.run_dir, context.world, context.console
        folder = without_damage(folder, *where)
        held_out = held_out and without_damage(held_out, *where)
    return cfg, Splits(folder, held_out)


def quiet_lightning() -> None:
    """Lightning's notes on hardware and hooks are about loops that we do not use."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|lightning_utilities)\..*")


def _save_config(cfg: Train, run_dir: Path) -> None:
    """The resolved config, from which the other ranks start and by which a run folder explains itself."""
    (run_dir / ".hydra").mkdir(parents=True, exist_ok=True)
    content = resolved(cfg)
    secrets.hand_on(content)
    with atomic_write(run_dir / ".hydra" / "resolved.yaml") as file:
        file.write(OmegaConf.to_yaml(OmegaConf.create(secrets.redacted(plain(content)))).encode())
