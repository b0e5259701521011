"""What a run trains, ready for its first step: the model checked on rows, its start, and what a checkpoint holds."""

import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from trainer.data.plan import Plan
from trainer.data.shards.folder import ShardFolder
from trainer.distributed.ranks import World
from trainer.engine.signals import StopOnSignal
from trainer.engine.train_state import PlanChoice, Problem, TrainState
from trainer.errors import UserError, counted
from trainer.inference.checks.enumeration import refuse_large
from trainer.inference.guides.mean_field import MEAN_FIELD
from trainer.inference.guides.pyro_guides import NO_LATENT
from trainer.inference.model.plates import Batch
from trainer.inference.optim.rounds import State, Update
from trainer.inference.recipe.off_saddle import start_of
from trainer.inference.setup import GuideFactory, guide_factory, set_up
from trainer.inference.step import Inference
from trainer.options import build
from trainer.options.records import plain
from trainer.options.verbs import Train
from trainer.posterior.first_pass import FirstPass
from trainer.posterior.tensors import to_tensor
from trainer.training import resume, weights
from trainer.training.budget import optimizer_of, refuse_long_warmup, update_of
from trainer.training.columns import precision_lines, refuse_mixed_numbers, refuse_spared
from trainer.training.first_rows import first_pass, first_rows, sample_of
from trainer.training.objectives import refuse_parts, refuse_weighted_draws
from trainer.training.precision import in_its_precision
from trainer.training.refining import refine_at_start

_CHECK_ROWS = 1024


class Context(NamedTuple):
    """Where a run trains, and who hears of it."""

    run_dir: Path
    world: World
    threads: int
    console: Console
    signals: StopOnSignal | None = None
    """None: whoever calls looks after them."""

    def check(self) -> None:
        """Raises Stopped where a signal ends the run."""
        if self.signals is not None:
            self.signals.check()


class Given(NamedTuple):
    """What a caller from Python has made already."""

    model: Callable[..., Any]
    guide: Any
    """As for `guide_factory`."""
    keep: bool
    """Whether the run folder stays."""


class Splits(NamedTuple):
    """The rows of a run."""

    train: ShardFolder
    held_out: ShardFolder | None


class Prepared(NamedTuple):
    """All that the first step takes."""

    cfg: Train
    """With the type and the optimizer that were chosen."""
    splits: Splits
    plan: Plan
    inference: Inference
    update: Update
    state: State
    record: TrainState
    sample: Batch
    """A few rows, which give the curvature."""
    first_pass: FirstPass
    doubts: list[str]
    """What the start said of the model."""


def prepare(cfg: Train, context: Context, splits: Splits, given: Given | None, saved: resume.Saved | None) -> Prepared:
    """Checks the model on rows, finds a start, and takes over what a checkpoint has ``saved``. Raises UserError."""
    folder, say = splits.train, context.console.print
    choice = resume.plan_choice(cfg, folder, context.world, saved)
    plan = choice.plan(folder)
    dtype, (inference, theta) = in_its_precision(cfg.dtype, folder.num_rows, lambda: infer(cfg, folder, given), say)
    for line in (
        *weights.told(folder.index, inference.model.own, inference.model.weighted),
        *precision_lines(folder.index, inference.model.arguments, torch.get_default_dtype()),
    ):
        say(line)
    step_rows = -(-plan.num_rows // (plan.steps_per_epoch * context.world.size))
    remedy = "give each rank up to {fit:,} rows of a step (batch_size=)"
    refuse_large(inference.model, step_rows, theta.dtype, remedy, context.world.local_size)
    if not inference.objective.is_elbo:
        refuse_weighted_draws(inference, theta, first_rows(folder, inference.model.arguments))
        refuse_parts(inference.objective, plan.steps_per_epoch, choice.draws)
    began, first = time.monotonic(), first_rows(folder, inference.model.arguments)
    checked = first_pass(folder, first, splits.held_out, inference, theta, plan.step_after(1.0))
    sample = sample_of(first, inference.model.copies)
    doubts: list[str] = []
    at_mode = cfg.start == "laplace"
    start = start_of(inference, theta, sample, cfg.seed, doubts.append) if at_mode else (theta, None)
    fineness = refine_at_start(inference, start, sample, resume.fineness(saved), context.world, say)
    whitened = start[1] is not None
    for sentence in doubts:
        say(sentence)
    cfg = replace(cfg, dtype=dtype, optimizer=optimizer_of(cfg, whitened))
    update = update_of(cfg, plan, whitened, _anchored(cfg, inference), resume.begun(saved))
    refuse_long_warmup(inference.objective, update)
    if update.anchored and cfg.objective.pairs is None:  # the rows' noise is gone, so that of the draws counts
        inference = replace(inference, objective=build.objective(cfg.objective, 2))
    fresh = update.init(*start)
    problem = problem_of(cfg, choice, inference, update, context.world)
    record = TrainState(problem, time.monotonic() - began, fineness=fineness)
    state = resume.taken_over(saved, record, fresh)
    if saved is not None:
        say(f"continuing from step {int(state.step):,}{resume.changes(saved[1].problem.plan, choice)}")
    prepared = Prepared(cfg, splits, plan, inference, update, state, record, sample, checked, doubts)
    for line in _described(prepared, context):
        say(line)
    return prepared


def problem_of(cfg: Train, choice: PlanChoice, inference: Inference, update: Update, world: World) -> Problem:
    """What a checkpoint says of the run."""
    return Problem(
        plan=choice,
        shapes={name: list(shape) for name, shape in inference.parameters.shapes.items()},
        sites=list(inference.sites),
        optimizer=plain(cfg.optimizer),
        horizon=update.horizon,
        rounds=[each.horizon for each in update.rounds],
        version=version("svi-trainer"),
        world_size=world.size,
    )


def _described(prepared: Prepared, context: Context) -> list[str]:
    """What is to be trained, in words."""
    (folder, held_out), plan, inference = prepared.splits, prepared.plan, prepared.inference
    horizon = prepared.update.horizon
    most, epochs = -(-plan.num_rows // plan.steps_per_epoch), plan.epochs_at(max(horizon, plan.rest.step))
    lines = [
        f"{counted(folder.num_rows, 'row')} to train on, {held_out.num_rows if held_out else 0:,} held out · "
        f"{counted(inference.parameters.size, 'parameter')} · {counted(horizon, 'step')} of "
        f"{counted(most, 'row')} "
        f"({epochs:{',.0f' if epochs >= 100 else '.3g'}} epochs) · {counted(context.world.size, 'rank')} x "
        f"{counted(context.threads, 'thread')}"
    ]
    if (of_rows := inference.model.sites) is not None:
        lines.append(f"latents of rows: {of_rows.sentence()}")
    if inference.guide.kind == NO_LATENT:
        lines.append(f"no latent site: maximum likelihood of {inference.parameters.size:,} parameters")
    elif inference.guide.kind != MEAN_FIELD:
        lines.append(f"guide: {inference.guide.kind}")
    return lines


def infer(cfg: Train, folder: ShardFolder, given: Given | None = None) -> tuple[Inference, torch.Tensor]:
    """The inference problem of a config, checked on the first rows, and theta [P] at its start."""
    user_model = build.model(cfg.model) if given is None else given.model
    present = [column.name for column in folder.index.columns if column.name != "row_id"]
    columns = tuple(weights.shown_to_model(cfg.weight, folder.index, user_model, present))
    factory = guide_of(cfg, given, user_model, columns)
    objective = build.objective(cfg.objective)
    dtype = torch.get_default_dtype()
    rows = {n: to_tensor(folder.read_block(0, n)[:_CHECK_ROWS], dtype) for n in (*columns, "row_id")}
    batch = Batch.whole({name: rows[name] for name in columns}, rows["row_id"], folder.num_rows)
    refuse_spared(folder.index, user_model)
    inference, theta = set_up(
        user_model,
        factory,
        batch,
        folder.num_rows,
        objective,
        plate=cfg.plate,
        global_sites=cfg.global_sites,
        seed=cfg.seed,
        rows=replace(build.rows(cfg.guide), facts=_codes(folder)),
        grouped=bool(folder.index.meta.get("group_by")),
    )
    refuse_mixed_numbers(folder.index, inference, theta, batch)
    return inference, theta


def _codes(folder: ShardFolder) -> dict[str, dict[str, int]]:
    """How many codes the categorical columns have, for an encoder of rows."""
    found = {column.name: column.vocabulary for column in folder.index.columns}
    return {name: {"levels": len(words)} for name, words in found.items() if words is not None}


def guide_of(cfg: Train, given: Given | None, model: Callable[..., Any], columns: tuple[str, ...]) -> GuideFactory:
    """What makes the guide: the one that a caller has given, else that of the config."""
    factory = build.guide(cfg.guide, model, columns, cfg.plate)
    if given is not None and given.guide != "mean_field":
        factory = guide_factory(given.guide, columns, cfg.plate)
    return factory


def _anchored(cfg: Train, inference: Inference) -> int:
    """How many locations are anchored."""
    if cfg.estimator == "plain":
        return 0
    if inference.objective.warmup or not inference.objective.is_elbo:
        raise UserError(
            "estimator=anchor has the gradient of the ELBO, and objective= another one: leave estimator=plain."
        )
    view, each_step = inference.gaussian, int(cfg.program.get("sync_every", 1)) == 1
    if view is None or inference.guide.noise_size[1] or not each_step:
        raise UserError(
            "estimator=anchor needs guide=mean_field, a model without latents or noise of its own per row, and a sum "
            "over the ranks at every step: leave estimator=plain."
        )
    return view.size
