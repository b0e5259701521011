"""`svi train`: a model and a shard folder in, a run folder out."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.plugins.environments import LightningEnvironment
from rich.console import Console

from trainer.app import build, resume, secrets, weights
from trainer.app.allowed import refuse_others
from trainer.app.budget import optimizer_of, update_of
from trainer.app.columns import precision_lines, refuse_mixed_numbers, refuse_spared
from trainer.app.data import cache_of, held_out_split, places, training_split
from trainer.app.finish import Finish, is_finished
from trainer.app.first_rows import first_pass, first_rows, one_group
from trainer.app.launch import is_restarted, memory_share
from trainer.app.loggers import make_loggers
from trainer.app.options.entrance import resolved
from trainer.app.options.records import plain
from trainer.app.options.verbs import Train
from trainer.app.precision import in_its_precision
from trainer.app.quarantine import without_damage
from trainer.app.ranks import World, agree_on, on_cuda, share_threads, world
from trainer.app.run_folder import save_words
from trainer.app.run_lock import locked
from trainer.app.shard import shards_of
from trainer.app.steer import EndRound, MoveAnchor
from trainer.app.stop import Stop
from trainer.app.tracking import Tracked
from trainer.data.plan import Plan
from trainer.data.shards.folder import ShardFolder
from trainer.data.store import atomic_write
from trainer.distributed.failure import explained, leave_group
from trainer.errors import RankLost, Stopped, UserError, counted
from trainer.lit import checkpoint
from trainer.lit.checkpoint import Checkpoints
from trainer.lit.datamodule import ChunkData
from trainer.lit.metrics import MetricsFile
from trainer.lit.module import VariationalModule
from trainer.lit.progress import ProgressBar
from trainer.lit.row_log import RowLog
from trainer.lit.signals import StopOnSignal
from trainer.lit.strategy import RankStrategy, SlurmStep
from trainer.lit.train_state import Problem, TrainState
from trainer.posterior.convergence import segment_ends
from trainer.posterior.full_data import FullData, FullLoss
from trainer.posterior.optimum import can_be_settled
from trainer.posterior.tensors import to_tensor
from trainer.svi.guides import MEAN_FIELD
from trainer.svi.materialise import guide_factory, materialise
from trainer.svi.plates import WEIGHT, Batch
from trainer.svi.pyro_guides import NO_LATENT
from trainer.svi.start import laplace_start, latents_alone
from trainer.svi.step import Inference

_CHECK_ROWS = 1024
_LAUNCHER_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


class Given(NamedTuple):
    """What a caller from Python has made already."""

    model: Callable[..., Any]
    guide: Any
    """As for `guide_factory`."""
    keep: bool
    """Whether the run folder stays."""


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
                _, finish = train(cfg, run_dir, here, threads, console, signals)
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


def train(
    cfg: Train,
    run_dir: Path,
    here: World,
    threads: int,
    console: Console,
    signals: StopOnSignal,
    given: Given | None = None,
) -> tuple[VariationalModule, Finish]:
    """Trains and writes the run folder; ``given``: model and guide as objects, in place of the config's."""
    with locked(run_dir) if here.rank == 0 else nullcontext():
        if here.rank == 0 and given is None:
            save_words(cfg, run_dir)
        refuse_others(resolved(cfg), cfg.allow)
        paths = places(cfg.data.path)
        packed = shards_of(paths, console, cache_of(cfg.data), cfg.weight)
        cfg = replace(cfg, data=replace(cfg.data, path=packed[0] if len(packed) == 1 else tuple(packed)))
        if cfg.weight is not None and packed != list(paths):  # a table on the way has it under our name
            cfg = replace(cfg, weight=WEIGHT)
        folder, held_out = training_split(cfg.data), held_out_split(cfg.data)
        if cfg.data.on_corrupt == "quarantine":
            folder = without_damage(folder, run_dir, here, console)
            held_out = held_out and without_damage(held_out, run_dir, here, console)
        return _train(cfg, run_dir, here, threads, console, signals, given, folder, held_out)


def _train(
    cfg: Train,
    run_dir: Path,
    here: World,
    threads: int,
    console: Console,
    signals: StopOnSignal,
    given: Given | None,
    folder: ShardFolder,
    held_out: ShardFolder | None,
) -> tuple[VariationalModule, Finish]:
    saved = resume.saved(cfg.ckpt_path, run_dir)
    choice = resume.plan_choice(cfg, folder, here, saved)
    plan = choice.plan(folder)
    dtype, (inference, theta) = in_its_precision(
        cfg.dtype, folder.num_rows, lambda: infer(cfg, folder, given), console.print
    )
    for line in (
        *weights.told(folder.index, inference.model.own, inference.model.weighted),
        *precision_lines(folder.index, inference.model.arguments, torch.get_default_dtype()),
    ):
        console.print(line)
    began, first = time.monotonic(), first_rows(folder, inference.model.arguments)
    checked = first_pass(folder, first, held_out, inference, theta, plan.step_after(1.0))
    sample = one_group(first)
    doubts: list[str] = []
    start = laplace_start(inference, theta, sample, doubts.append) if cfg.start == "laplace" else None
    for sentence in doubts:
        console.print(sentence)
    cfg = replace(cfg, dtype=dtype, optimizer=optimizer_of(cfg, start is not None))
    update = update_of(cfg, plan, start is not None, _anchored(cfg, inference), resume.begun(saved))
    if cfg.objective.pairs is None and update.anchored:  # the rows' noise is gone, so that of the draws counts
        inference = replace(inference, objective=replace(inference.objective, pairs=2))
    fresh = state = update.init(theta) if start is None else update.init(*start)
    problem = Problem(
        plan=choice,
        shapes={name: list(shape) for name, shape in inference.parameters.shapes.items()},
        sites=list(inference.sites),
        optimizer=plain(cfg.optimizer),
        horizon=update.horizon,
        rounds=[each.horizon for each in update.rounds],
        version=version("svi-trainer"),
        world_size=here.size,
    )
    record = TrainState(problem, time.monotonic() - began)
    if saved is not None:
        state, old = saved
        resume.check_same(old.problem, problem, state, fresh)
        record.resumed(old)
        console.print(f"continuing from step {int(state.step):,}{resume.changes(old.problem.plan, choice)}")
    most, epochs = -(-plan.num_rows // plan.steps_per_epoch), plan.epochs_at(max(update.horizon, plan.rest.step))
    console.print(
        f"{counted(folder.num_rows, 'row')} to train on, {held_out.num_rows if held_out else 0:,} held out · "
        f"{counted(inference.parameters.size, 'parameter')} · {counted(update.horizon, 'step')} of "
        f"{counted(most, 'row')} "
        f"({epochs:{',.0f' if epochs >= 100 else '.3g'}} epochs) · {counted(here.size, 'rank')} x "
        f"{counted(threads, 'thread')}"
    )
    if inference.guide.kind == NO_LATENT:
        console.print(f"no latent site: maximum likelihood of {inference.parameters.size:,} parameters")
    elif inference.guide.kind != MEAN_FIELD:
        console.print(f"guide: {inference.guide.kind}")
    if here.rank == 0:
        _save_config(cfg, run_dir)
    ranks = choice.ranks(here.rank, here.size)
    program = build.program(cfg.program)(inference, update, choice.seed, ranks.groups, here.comm)
    module = VariationalModule(inference, update, program, state, record.seconds, console.print, checked)
    with_row_id = bool(inference.guide.noise_size[1] or cfg.data.log_rows)
    every = cfg.checkpoint.every_n_steps or 0
    for name, count in (("checkpoint.every_n_steps", every), ("slots", cfg.slots or 0)):
        if count % program.sync_every:
            raise UserError(f"{name}={count} must be a multiple of program.sync_every={program.sync_every}.")
    full = FullData(folder, inference.model.arguments, here.comm, signals.check, checked)
    held = None if held_out is None else replace(full, folder=held_out)
    report = _report(cfg, held or full, update.horizon, program.sync_every, record)
    data = ChunkData(folder, plan, ranks, inference.model.arguments, torch.get_default_dtype(), with_row_id,
                     cfg.slots, _cuts(plan, every, update.anchored),
                     tuple(end for each in update.rounds for end in (each.horizon, *segment_ends(
                         each, plan.steps_per_epoch, program.sync_every)))
                     + tuple(end for each in report for end in each.ends) + program.stages,
                     cfg.data.memory or memory_share(here.local_size))  # fmt: skip
    data.first, data.last = int(state.step), update.horizon
    bar = ProgressBar(console, update.horizon)

    def passed() -> None:
        record.passes += 1
        bar.on_pass(record.passes)

    loss = FullLoss(full, inference, cfg.seed, passed)
    rule = build.rule(cfg.stop)
    afford = None if cfg.newton_after is None else plan.step_after(cfg.newton_after)
    by_products = afford if latents_alone(inference) or can_be_settled(inference) else None
    stop = Stop(rule, EndRound(loss, sample, by_products, record), plan.steps_per_epoch, record, console.print, doubts)
    shown = f" · {run_dir}" if given is None or given.keep else ""
    figures = MetricsFile(run_dir / "metrics.csv", console.print)
    finish = Finish(run_dir, full, held, plan, cfg.seed, console, figures, stop, shown)
    callbacks = [
        signals,
        *([MoveAnchor(loss, plan.begins)] if update.anchored else []),
        *([RowLog(Path(cfg.data.log_rows))] if cfg.data.log_rows else []),
        bar,
        figures,
        stop,
        *report,
        Checkpoints(run_dir / "checkpoints", record, data.first, every, cfg.checkpoint.every_minutes,
                    cfg.checkpoint.keep_last, console.print),
        finish,
        Tracked(run_dir, folder, figures, cfg.checkpoint.track),
    ]  # fmt: skip
    if (record.stopped and rule is not None) or data.first >= data.last:
        data.last = data.first  # what was cut short at the end, if anything, is all there is to do
    if data.first < data.last or not is_finished(run_dir, data.first):
        try:
            _trainer(cfg, run_dir, here, callbacks).fit(module, data)
        finally:
            module.program.abandon()
    elif record.stopped:
        console.print(f"step {data.first:,} is the end already, since the run converged: stop=budget goes on.")
    else:
        console.print(f"step {data.first:,} is the end already: raise max_steps= or max_epochs= to go on.")
    return module, finish


def _cuts(plan: Plan, every: int, anchored: int) -> tuple[tuple[int, int], ...]:
    """Where chunks end: at multiples of ``every`` (checkpoints), and where an epoch begins if there is an anchor."""
    epochs = (plan.steps_per_epoch, plan.first_whole)
    return (*([(every, 0)] if every else []), *([epochs] if anchored else []))


def infer(cfg: Train, folder: ShardFolder, given: Given | None = None) -> tuple[Inference, torch.Tensor]:
    """The inference problem of a config, checked on the first rows, and theta [P] at its start."""
    user_model = build.model(cfg.model) if given is None else given.model
    present = [column.name for column in folder.index.columns if column.name != "row_id"]
    columns = tuple(weights.shown_to_model(cfg.weight, folder.index, user_model, present))
    factory = build.guide(cfg.guide, user_model, columns, cfg.plate)
    if given is not None and given.guide != "mean_field":
        factory = guide_factory(given.guide, columns, cfg.plate)
    pairs = cfg.objective.pairs or 1
    objective = build.objective(cfg.objective, pairs)
    dtype = torch.get_default_dtype()
    rows = {n: to_tensor(folder.read_block(0, n)[:_CHECK_ROWS], dtype) for n in (*columns, "row_id")}
    count = len(rows["row_id"])
    batch = Batch(
        {name: rows[name] for name in columns},
        torch.tensor(count),
        torch.tensor(folder.num_rows / count, dtype=torch.float64),
        rows["row_id"],
    )
    refuse_spared(folder.index, user_model)
    inference, theta = materialise(
        user_model,
        factory,
        batch,
        folder.num_rows,
        objective,
        plate=cfg.plate,
        global_sites=cfg.global_sites,
        seed=cfg.seed,
    )
    refuse_mixed_numbers(folder.index, inference, theta, batch)
    return inference, theta


def _anchored(cfg: Train, inference: Inference) -> int:
    """How many locations are anchored."""
    if cfg.estimator == "plain":
        return 0
    view, each_step = inference.gaussian, int(cfg.program.get("sync_every", 1)) == 1
    if view is None or inference.guide.noise_size[1] or not each_step:
        raise UserError(
            "estimator=anchor needs guide=mean_field, a model without latents or noise of its own per row, and a sum "
            "over the ranks at every step: leave estimator=plain."
        )
    return view.size


def _trainer(cfg: Train, run_dir: Path, here: World, callbacks: list[pl.Callback]) -> pl.Trainer:
    """A Lightning trainer that runs our chunks once through; checkpoints, progress and stopping are our callbacks."""
    options: dict[str, Any] = plain(cfg.trainer)
    timeout = timedelta(seconds=options.pop("timeout"))
    options.update(devices=here.local_size, num_nodes=here.size // here.local_size)
    plugins: list[Any] = []
    if not here.external:  # also within an allocation, whose variables Lightning takes for those of ranks
        plugins.append(LightningEnvironment())
    elif "TORCHELASTIC_RUN_ID" not in os.environ:
        plugins.append(SlurmStep(here.size))
    if here.size > 1:
        child = [sys.executable, "-m", "trainer", "child", str(run_dir)]
        options["strategy"] = RankStrategy(child, timeout=timeout)
    ours: dict[str, Any] = {
        "plugins": plugins or None,
        "callbacks": callbacks,
        "default_root_dir": run_dir,
        "min_epochs": 0,
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    known = signature(pl.Trainer).parameters.keys() - {*ours, "logger", "max_steps"}
    for name in options.keys() - known:
        told = f": give {name}=" if name in ("max_steps", "max_epochs") else ": leave it out"
        raise UserError(f"trainer.{name} is no option of the trainer here{told}.")
    return pl.Trainer(**options, **ours, logger=make_loggers(cfg, run_dir) if here.rank == 0 else False)


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


def _report(cfg: Train, rows: FullData, horizon: int, unit: int, record: TrainState) -> list[Any]:
    """Of a trial of a study, what reports to it."""
    if cfg.trial is None:
        return []
    from trainer.app.trial import Report  # Optuna, which only sweeps need

    return [Report(cfg.trial, rows, cfg.seed, horizon, unit, record)]
