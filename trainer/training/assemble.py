"""A prepared run, trained by Lightning: its module, its chunks, its callbacks."""

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment

from trainer.data.plan import Plan
from trainer.distributed.launch import memory_share
from trainer.distributed.local_ranks import LocalRanks
from trainer.distributed.ranks import World
from trainer.engine.checkpoint import CheckpointPolicy, Checkpoints
from trainer.engine.datamodule import ChunkData, Cuts, RowTensors
from trainer.engine.metrics import MetricsFile
from trainer.engine.module import ChunkModule
from trainer.engine.progress import ProgressBar
from trainer.engine.row_log import RowLog
from trainer.engine.signals import StopOnSignal
from trainer.engine.strategy import FailTogether, RankStrategy, SlurmStep
from trainer.engine.train_state import TrainState
from trainer.errors import UserError
from trainer.inference.optim.rounds import Round
from trainer.inference.programs.program import Program
from trainer.inference.recipe.convergence import segment_ends
from trainer.inference.recipe.laplace import latents_alone
from trainer.inference.recipe.optimum import can_be_settled
from trainer.options import build
from trainer.options.records import plain
from trainer.options.verbs import Train
from trainer.posterior.full_data import FullData, FullLoss
from trainer.runs.loggers import make_loggers
from trainer.runs.tracking import Tracked
from trainer.training.final_evaluation import FinalEvaluation, Finish, is_finished
from trainer.training.newton_steps import EndRound
from trainer.training.prepare import Context, Prepared
from trainer.training.stop import Stop
from trainer.training.svrg import TakeSnapshot


class Assembled(NamedTuple):
    """A prepared run, put together: whoever runs it in Lightning adds what watches it."""

    data: ChunkData
    full: FullData
    held: FullData | None
    snapshots: list[pl.Callback]
    """Of the control variate, where there is one."""
    stop: Stop
    """Rounds end in it."""
    program: Program


def assembled(
    prepared: Prepared, context: Context, every: int = 0, by_epoch: bool = False, passed: Callable[[int], object] = int
) -> Assembled:
    """The program, the chunks and the recipe of a run.

    ``every``: chunks also end at multiples of so many steps; ``by_epoch``: and where an epoch does; ``passed``: called
    with the number of each pass over all rows. Begins no training.
    """
    cfg, splits, plan, inference, update, _, record, sample, checked, doubts = prepared
    choice, here = record.problem.plan, context.world
    ranks = choice.ranks(here.rank, here.size)
    program = build.program(cfg.program)(inference, update, choice.seed, ranks.groups, here.comm)
    full = FullData(splits.train, inference.model.arguments, here.comm, context.check, checked)
    held = None if splits.held_out is None else replace(full, folder=splits.held_out)
    rows = RowTensors(
        inference.model.arguments,
        torch.get_default_dtype(),
        with_row_id=bool(inference.guide.noise_size[1] or cfg.data.log_rows),
    )
    cuts = Cuts(
        slots=cfg.slots,
        every=_every(plan, every, by_epoch or bool(update.anchored)),
        ends=(*(end for each in update.rounds for end in _round_ends(each, plan, program)), *program.stages),
        memory=cfg.data.memory or memory_share(here.local_size),
    )
    data = ChunkData(splits.train, plan, ranks, rows, cuts, checked)
    data.first, data.last = int(prepared.state.step), update.horizon

    def counted() -> None:
        record.passes += 1
        passed(record.passes)

    loss = FullLoss(full, inference, cfg.seed, counted, program.sweep)
    afford = None if cfg.newton_after is None else plan.step_after(cfg.newton_after)
    by_passes = afford if latents_alone(inference) or can_be_settled(inference) else None
    end_round = EndRound(loss, sample, by_passes, record)
    stop = Stop(build.rule(cfg.stop), end_round, plan.steps_per_epoch, record, context.console.print, doubts)
    snapshots: list[pl.Callback] = [TakeSnapshot(loss, plan.begins)] if update.anchored else []
    return Assembled(data, full, held, snapshots, stop, program)


def trained(prepared: Prepared, context: Context, keep: bool) -> tuple[ChunkModule, Finish]:
    """Trains to the end of the budget, or of what the stop rule asks for; ``keep``: whether the run folder stays."""
    cfg, splits, plan, _, update, state, record, *_ = prepared
    run_dir, here, _, console, signals = context
    say, bar = console.print, ProgressBar(console, update.horizon)
    every = cfg.checkpoint.every_n_steps or 0
    data, full, held, snapshots, stop, program = assembled(prepared, context, every, passed=bar.on_pass)
    _refuse_between_syncs(cfg, program)
    module = ChunkModule()
    module.begin(update, program, state, data, record.seconds, say)
    report = _report(cfg, held or full, update.horizon, program.sync_every, record)
    data.ends = (*data.ends, *(end for each in report for end in each.ends))
    figures = MetricsFile(run_dir / "metrics.csv", say)
    final = FinalEvaluation(full, held, plan, cfg.seed, stop)
    finish = Finish(run_dir, final, console, figures, f" · {run_dir}" if keep else "")
    others = LocalRanks()
    policy = CheckpointPolicy(every, cfg.checkpoint.every_minutes, cfg.checkpoint.keep_last)
    callbacks = [
        FailTogether(others),
        signals,
        *snapshots,
        *([RowLog(Path(cfg.data.log_rows))] if cfg.data.log_rows else []),
        bar,
        figures,
        stop,
        *report,
        Checkpoints(run_dir / "checkpoints", record, data.first, policy, say),
        finish,
        Tracked(run_dir, splits.train, figures, cfg.checkpoint.track),
    ]
    if (record.stopped and stop.rule is not None) or data.first >= data.last:
        data.last = data.first  # what was cut short at the end, if anything, is all there is to do
    if data.first < data.last or not is_finished(run_dir, data.first):
        try:
            _launch(others, here, run_dir, signals)
            _trainer(cfg, run_dir, here, callbacks, others).fit(module, data)
        finally:
            others.end()
            module.program.abandon()
    elif record.stopped:
        say(f"step {data.first:,} is the last one, since the run has converged: train further with stop=budget.")
    else:
        say(f"step {data.first:,} is the last one: raise max_steps= or max_epochs= to train further.")
    return module, finish


def _refuse_between_syncs(cfg: Train, program: Program) -> None:
    """Raises UserError where a chunk would end at a step at which the ranks hold different states."""
    for name, count in (("checkpoint.every_n_steps", cfg.checkpoint.every_n_steps or 0), ("slots", cfg.slots or 0)):
        if count % program.sync_every:
            raise UserError(f"{name}={count} must be a multiple of program.sync_every={program.sync_every}.")


def _round_ends(round_: Round, plan: Plan, program: Program) -> tuple[int, ...]:
    """The steps at which a round and its segments end."""
    return (round_.horizon, *segment_ends(round_, plan.steps_per_epoch, program.sync_every))


def _every(plan: Plan, every: int, by_epoch: bool) -> tuple[tuple[int, int], ...]:
    """Where chunks end: at multiples of ``every``, and where an epoch begins."""
    epochs = (plan.steps_per_epoch, plan.first_whole)
    return (*([(every, 0)] if every else []), *([epochs] if by_epoch else []))


def _launch(others: LocalRanks, here: World, run_dir: Path, signals: StopOnSignal | None) -> None:
    """Starts the other ranks of this machine from the saved config, unless something has started this process as one.

    Lightning, which finds LOCAL_RANK set, starts none.
    """
    if here.size == 1 or here.external or "LOCAL_RANK" in os.environ:
        return
    with nullcontext() if signals is None else signals.at_the_end():
        others.start([sys.executable, "-m", "trainer", "child", str(run_dir)], here.local_size, here.size)


def _trainer(cfg: Train, run_dir: Path, here: World, callbacks: list[pl.Callback], others: LocalRanks) -> pl.Trainer:
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
        options["strategy"] = RankStrategy(others, timeout=timeout)
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
        raise UserError(f"trainer.{name} is not an option of the trainer here{told}.")
    return pl.Trainer(**options, **ours, logger=make_loggers(cfg, run_dir) if here.rank == 0 else False)


def _report(cfg: Train, rows: FullData, horizon: int, unit: int, record: TrainState) -> list[Any]:
    """Of a trial of a study, what reports to it."""
    if cfg.trial is None:
        return []
    from trainer.sweeps.pruning import PruningCallback  # Optuna, which only sweeps need

    return [PruningCallback(cfg.trial, rows, cfg.seed, horizon, unit, record)]
