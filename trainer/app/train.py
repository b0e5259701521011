"""`svi train`: a model and a shard folder in, a run folder out."""

import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.plugins.environments import SLURMEnvironment
from rich.console import Console

from trainer.app import build, resume
from trainer.app.blocks import AllRows
from trainer.app.finish import Finish
from trainer.app.loggers import make_loggers
from trainer.app.ranks import World, agree_on, on_cuda, share_threads, world
from trainer.app.shard import shards_of
from trainer.app.steer import EndRound, MoveAnchor
from trainer.app.stop import Stop
from trainer.data.plan import Plan
from trainer.data.reader import ShardFolder, open_split
from trainer.data.store import atomic_write
from trainer.errors import UserError
from trainer.lit.checkpoint import Checkpoints
from trainer.lit.datamodule import ChunkData, to_tensor
from trainer.lit.metrics import MetricsFile
from trainer.lit.module import VariationalModule
from trainer.lit.progress import ProgressBar
from trainer.lit.signals import StopOnSignal
from trainer.lit.strategy import RankStrategy, sum_over_ranks
from trainer.posterior.convergence import segment_ends
from trainer.svi.guides import MeanField
from trainer.svi.materialise import guide_factory, materialise
from trainer.svi.plates import WEIGHT, Batch
from trainer.svi.start import has_latents_alone, laplace_start
from trainer.svi.step import Inference, StepBatch, Update

_CHECK_ROWS = 1024
_ROUND_STEPS = 250  # of the shortest round
_START_ROWS = 65_536
_LAUNCHER_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


class Given(NamedTuple):
    """What a caller from Python has made already."""

    model: Callable[..., Any]
    guide: Any
    """As for `guide_factory`."""
    keep: bool
    """Whether the run folder stays."""


def run(cfg: DictConfig, run_dir: Path) -> float:
    """Trains, writes the run folder, and returns the held-out ELBO per row (the ELBO per row without held-out rows).

    Exits with 128 + the signal's number when a signal ended the run, after saving.
    """
    here = world(cfg.trainer)
    threads = share_threads(here.local_size, cfg.threads)
    run_dir = Path(agree_on(str(run_dir.absolute()), here, "nccl" if on_cuda(cfg.trainer) else "gloo"))
    quiet_lightning()
    before = {name: os.environ.get(name) for name in _LAUNCHER_VARIABLES}
    try:
        console = Console(quiet=here.rank != 0, highlight=False, soft_wrap=True)
        _, finish = train(cfg, run_dir, here, threads, console)
        if finish.signals.received:
            sys.exit(128 + finish.signals.received)
        return finish.headline
    finally:
        for name, value in before.items():  # a later run of this process (a sweep) launches its own ranks
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def train(
    cfg: DictConfig, run_dir: Path, here: World, threads: int, console: Console, given: Given | None = None
) -> tuple[VariationalModule, Finish]:
    """Trains and writes the run folder; ``given``: model and guide as objects, in place of the config's."""
    cfg.data.path = shards_of(str(cfg.data.path), console)
    folder, held_out = open_training(str(cfg.data.path)), open_split(Path(str(cfg.data.path)), "held_out")
    cfg.dtype = cfg.dtype or ("float64" if folder.num_rows <= _START_ROWS else "float32")
    torch.set_default_dtype(_dtype(cfg.dtype))
    saved = resume.saved(cfg.ckpt_path, run_dir)
    plan_facts = resume.plan_facts(cfg, folder, here, saved)
    plan = Plan(folder.index.block_rows, **{k: v for k, v in plan_facts.items() if k not in ("index", "draws")})
    inference, theta = infer(cfg, folder, given)
    sample, began = _sample(folder, inference), time.monotonic()
    start = laplace_start(inference, theta, sample, console.print) if cfg.start == "laplace" else None
    update = _update(cfg, plan, start is not None, _anchored(cfg, inference))
    if cfg.objective.pairs is None and update.anchored:  # the rows' noise is gone, so that of the draws counts
        inference = replace(inference, objective=replace(inference.objective, pairs=2))
    fresh = state = update.init(theta) if start is None else update.init(*start)
    facts = {
        "plan": plan_facts,
        "shapes": {name: list(shape) for name, shape in inference.parameters.shapes.items()},
        "sites": list(inference.sites),
        "optimizer": OmegaConf.to_container(cfg.optimizer, resolve=True),
        "horizon": update.horizon,
        "version": version("svi-trainer"),
        "world_size": here.size,
    }
    seconds = time.monotonic() - began
    if saved is not None:
        resume.check_same(saved[1], facts, saved[0], fresh)
        state, seconds = saved[0], float(saved[1]["seconds"])
        facts |= {name: saved[1][name] for name in ("marks", "stopped", "passes") if name in saved[1]}
        console.print(f"continuing from step {int(state.step):,}")
    console.print(
        f"{folder.num_rows:,} rows to train on, {held_out.num_rows if held_out else 0:,} held out · "
        f"{inference.parameters.size:,} parameters · {update.horizon:,} steps of {plan.batch_size:,} rows "
        f"({update.horizon / plan.steps_per_epoch:.3g} epochs) · {here.size} rank(s) x {threads} thread(s)"
    )
    if here.rank == 0:
        _save_config(cfg, run_dir)
    ranks = resume.ranks(plan_facts, here)
    program = build.make(cfg.program, partial=True)(
        inference, update, plan_facts["seed"], ranks.groups, here.size, sum_over_ranks
    )
    module = VariationalModule(inference, update, program, state, seconds, console.print)
    epoch = plan.steps_per_epoch if update.anchored else 0
    local_latents = bool(inference.guide.noise_size[1])
    every = int(cfg.checkpoint.every_n_steps or 0)
    for name, count in (("checkpoint.every_n_steps", every), ("slots", int(cfg.slots or 0))):
        if count % program.sync_every:
            raise UserError(f"{name}={count} must be a multiple of program.sync_every={program.sync_every}.")
    data = ChunkData(folder, plan, ranks, inference.model.arguments, torch.get_default_dtype(), local_latents,
                     cfg.slots and int(cfg.slots), tuple(n for n in (every, epoch) if n),
                     tuple(end for each in update.rounds for end in (each.horizon, *segment_ends(
                         each, plan.steps_per_epoch, program.sync_every))))  # fmt: skip
    data.first, data.last = int(state.step), update.horizon
    signals = StopOnSignal()
    bar = ProgressBar(console, update.horizon)
    rows = AllRows(folder, int(cfg.seed), facts, bar.on_pass)
    rule = build.make(cfg.stop) if cfg.get("stop") else None
    afford = None if cfg.newton_after is None else math.ceil(float(cfg.newton_after) * plan.steps_per_epoch)
    by_products = afford if has_latents_alone(inference) else None
    stop = Stop(rule, EndRound(rows, sample, by_products), plan.steps_per_epoch, facts, console.print)
    shown = f" · {run_dir}" if given is None or given.keep else ""
    finish = Finish(run_dir, folder, held_out, plan, int(cfg.seed), console, signals, stop, shown)
    callbacks = [
        signals,
        *([MoveAnchor(rows, epoch)] if epoch else []),
        bar,
        MetricsFile(run_dir / "metrics.csv"),
        stop,
        Checkpoints(run_dir / "checkpoints", facts, every, int(cfg.checkpoint.keep_last)),
        finish,
    ]
    if facts.get("stopped") and rule is not None:
        console.print(f"step {data.first:,} is the end already, since the run converged: stop=budget goes on.")
    elif data.first < data.last:
        _trainer(cfg, run_dir, here, callbacks).fit(module, data)
    else:
        console.print(f"step {data.first:,} is the end already: raise max_steps= or max_epochs= to go on.")
    if signals.received:
        console.print(f"stopped by signal {signals.received} at step {module.step:,}; continue with ckpt_path=last")
    return module, finish


def open_training(path: str) -> ShardFolder:
    """The training split of a shard folder. Raises UserError where there is none."""
    folder = open_split(Path(path), "train")
    if folder is None:
        raise UserError(f"data.path={path} is no shard folder: pack one with svi shard source=TABLE out={path}")
    return folder


def infer(cfg: DictConfig, folder: ShardFolder, given: Given | None = None) -> tuple[Inference, torch.Tensor]:
    """The inference problem of a config, checked on the first rows, and theta [P] at its start."""
    columns = tuple(column.name for column in folder.index.columns if column.name != "row_id")
    user_model = build.model(cfg.model) if given is None else given.model
    factory = build.guide(cfg.guide, user_model, columns, cfg.plate)
    if given is not None and given.guide != "mean_field":
        factory = guide_factory(given.guide, columns, cfg.plate)
    pairs = cfg.objective.pairs or 1
    objective = build.make(cfg.objective, partial=True)(pairs=pairs)
    dtype = torch.get_default_dtype()
    rows = {n: to_tensor(folder.read_block(0, n)[:_CHECK_ROWS].copy(), dtype) for n in (*columns, "row_id")}
    count = len(rows["row_id"])
    if WEIGHT in rows and not (rows[WEIGHT] >= 0).all():
        raise UserError('column "weight" holds a negative number: a row stands for 0 observations or more.')
    batch = Batch(
        {name: rows[name] for name in columns},
        torch.tensor(count),
        torch.tensor(folder.num_rows / count, dtype=torch.float64),
        rows["row_id"],
    )
    return materialise(
        user_model,
        factory,
        batch,
        folder.num_rows,
        objective,
        plate=cfg.plate,
        global_sites=cfg.global_sites,
        seed=int(cfg.seed),
    )


def _sample(folder: ShardFolder, inference: Inference) -> StepBatch:
    """The first rows (which packing has shuffled), as one lane group."""
    dtype, blocks, count = torch.get_default_dtype(), 0, 0
    for rows in folder.block_rows.tolist():
        if count and count + rows > _START_ROWS:
            break
        blocks, count = blocks + 1, count + rows
    columns = {
        name: to_tensor(np.concatenate([folder.read_block(b, name) for b in range(blocks)]), dtype)[None]
        for name in inference.model.arguments
    }
    return StepBatch(columns, torch.tensor([count]), torch.tensor(count), None)


def _update(cfg: DictConfig, plan: Plan, whitened: bool, anchored: int) -> Update:
    """Optimiser, schedule and rounds, each of twice the steps of the one before; a round is at least an epoch."""
    epoch = plan.steps_per_epoch
    limits = [int(n) for n in (cfg.max_steps, cfg.max_epochs and math.ceil(float(cfg.max_epochs) * epoch)) if n]
    horizon = min(limits) if limits else max(int(cfg.budget.steps), math.ceil(cfg.budget.epochs * epoch))
    share = float(cfg.averaging)
    if not 0 <= share < 1:
        raise UserError(f"averaging={share} must lie in [0, 1): the last share of a round whose iterates are averaged.")
    count = int(cfg.rounds)
    if count < 1:
        raise UserError(f"rounds={count} must be at least 1.")
    while count > 1 and horizon < (2**count - 1) * max(_ROUND_STEPS, epoch):
        count -= 1
    every = int(cfg.program.get("sync_every", 1))
    rates = cfg.rates.whitened if whitened else cfg.rates.plain
    for name in [name for name, value in cfg.optimizer.items() if value is None and name in rates]:
        cfg.optimizer[name] = rates[name]
    optimizer, schedule, update, start = build.make(cfg.optimizer), build.make(cfg.schedule), None, 0
    for number in range(1, count + 1):
        end = horizon if number == count else horizon * (2**number - 1) // (2**count - 1) // every * every
        length = int((end - start) * share)
        if length >= epoch:
            length = length // epoch * epoch
        update = Update(optimizer, schedule, end, end - length, start, update, whitened, anchored)
        start = end
    assert update is not None
    return update


def _anchored(cfg: DictConfig, inference: Inference) -> int:
    """How many locations are anchored."""
    if cfg.estimator == "plain":
        return 0
    if cfg.estimator != "anchor":
        raise UserError(f"estimator={cfg.estimator} is not known: use plain or anchor.")
    guide, each_step = inference.guide, int(cfg.program.get("sync_every", 1)) == 1
    if not (isinstance(guide, MeanField) and not guide.noise_size[1] and each_step):
        raise UserError(
            "estimator=anchor needs guide=mean_field, a model without latents or noise of its own per row, and a sum "
            "over the ranks at every step: leave estimator=plain."
        )
    return guide.size


def _trainer(cfg: DictConfig, run_dir: Path, here: World, callbacks: list[pl.Callback]) -> pl.Trainer:
    """A Lightning trainer that runs our chunks once through; checkpoints, progress and stopping are our callbacks."""
    options: dict[str, Any] = dict(OmegaConf.to_container(cfg.trainer, resolve=True))  # type: ignore[arg-type]
    options.update(devices=here.local_size, num_nodes=here.size // here.local_size)
    plugins: list[Any] = []
    if here.size > 1:
        child = [sys.executable, "-m", "trainer", "child", str(run_dir)]
        options["strategy"] = RankStrategy(child)
        if here.external and "TORCHELASTIC_RUN_ID" not in os.environ:
            plugins.append(SLURMEnvironment(auto_requeue=False))
    return pl.Trainer(
        **options,
        plugins=plugins or None,
        callbacks=callbacks,
        logger=make_loggers(cfg, run_dir) if here.rank == 0 else False,
        default_root_dir=run_dir,
        min_epochs=0,
        max_epochs=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def quiet_lightning() -> None:
    """Lightning's notes on hardware and hooks are about loops that we do not use."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|lightning_utilities)\..*")


def _save_config(cfg: DictConfig, run_dir: Path) -> None:
    """The resolved config, from which the other ranks start and by which a run folder explains itself."""
    (run_dir / ".hydra").mkdir(parents=True, exist_ok=True)
    resolved = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    with atomic_write(run_dir / ".hydra" / "resolved.yaml") as file:
        file.write(OmegaConf.to_yaml(resolved).encode())


def _dtype(name: str) -> torch.dtype:
    if name not in ("float32", "float64"):
        raise UserError(f"dtype={name} is not supported: use float32 or float64.")
    return getattr(torch, name)
