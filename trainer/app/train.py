"""`svi train`: a model and a shard folder in, a run folder out."""

import logging
import os
import warnings
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console

from trainer.app import secrets
from trainer.app.allowed import refuse_others
from trainer.app.data import cache_of, held_out_split, places, training_split
from trainer.app.finish import Finish
from trainer.app.launch import is_restarted
from trainer.app.options.entrance import resolved
from trainer.app.options.records import plain
from trainer.app.options.verbs import Train
from trainer.app.prepare import Context, Given, Splits, prepare
from trainer.app.quarantine import without_damage
from trainer.app.ranks import agree_on, on_cuda, share_threads, world
from trainer.app.run_folder import save_words
from trainer.app.run_lock import locked
from trainer.app.shard import shards_of
from trainer.app.training import trained
from trainer.data.store import atomic_write
from trainer.distributed.failure import explained, leave_group
from trainer.errors import RankLost, Stopped
from trainer.lit import checkpoint
from trainer.lit.module import VariationalModule
from trainer.lit.signals import StopOnSignal
from trainer.svi.plates import WEIGHT

_LAUNCHER_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


def run(cfg: Train, run_dir: Path) -> float:
    """Trains, writes the run folder, and returns the held-out ELBO per row (the ELBO per row without held-out rows).

    Raises `Stopped`, which exits with 128 + the signal's number, when a signal ended the run, after saving; where
    another rank was the first to fail, RankLost.
    """
    here = world(cfg.trainer)
    threads = share_threads(here.local_size, cfg.threads)
    backend, timeout = "nccl" if on_cuda(cfg.trainer) else "gloo", timedelta(seconds=cfg.trainer.timeout)
    quiet_lightning()
    before = {name: os.environ.get(name) for name in _LAUNCHER_VARIABLES}
    try:
        with StopOnSignal() as signals:
            try:
                run_dir = Path(agree_on(str(run_dir.absolute()), here, backend, timeout))
                if is_restarted() and (cfg.ckpt_path is None or checkpoint.manifests(run_dir / "checkpoints")):
                    cfg = replace(cfg, ckpt_path="last")  # the file that the first launch began with is behind it
                console = Console(quiet=here.rank != 0, highlight=False, soft_wrap=True)
                _, finish = train(cfg, Context(run_dir, here, threads, console, signals))
                signals.check()
                return finish.headline
            except BaseException as error:
                told = explained(error)
                if isinstance(told, (Stopped, RankLost)):
                    signals.ignore()
                leave_group(together=False)
                if isinstance(told, Stopped) and (here.rank == 0 or not told.agreed):
                    print(told, flush=True)
                raise told from (None if told is error else error)
    finally:
        for name, value in before.items():  # a later run of this process (a sweep) launches its own ranks
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def train(cfg: Train, context: Context, given: Given | None = None) -> tuple[VariationalModule, Finish]:
    """Trains and writes the run folder; ``given``: model and guide as objects, in place of the config's."""
    run_dir, first = context.run_dir, context.world.rank == 0
    with locked(run_dir) if first else nullcontext():
        if first and given is None:
            save_words(cfg, run_dir)
        refuse_others(resolved(cfg), cfg.allow)
        cfg, splits = _splits(cfg, context)
        prepared = prepare(cfg, context, splits, given)
        if first:
            _save_config(prepared.cfg, run_dir)
        return trained(prepared, context, keep=given is None or given.keep)


def _splits(cfg: Train, context: Context) -> tuple[Train, Splits]:
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
