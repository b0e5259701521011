"""A `VariationalModule` on any loader of dicts of tensors: nothing but the batches is known of the data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from torch import Tensor

from trainer.data.shards.index import Column as StoredColumn
from trainer.data.shards.index import Index
from trainer.distributed.comm import Comm
from trainer.engine.module import ChunkModule
from trainer.engine.train_state import PlanChoice, TrainState
from trainer.errors import UserError
from trainer.inference.estimates.passes import Block
from trainer.inference.guides.encoder import facts_of
from trainer.inference.model.arguments import arguments
from trainer.inference.model.plates import Batch
from trainer.inference.optim.rounds import State, Update
from trainer.inference.programs.program import Eager
from trainer.inference.recipe.off_saddle import start_of
from trainer.inference.rows.entries import LENGTH
from trainer.inference.setup import set_up
from trainer.inference.step import Inference
from trainer.options import build
from trainer.options.verbs import Train
from trainer.posterior.posterior import Posterior
from trainer.posterior.tensors import as_type
from trainer.training import resume
from trainer.training.budget import optimizer_of, refuse_long_warmup, update_of
from trainer.training.objectives import title
from trainer.training.precision import in_its_precision
from trainer.training.prepare import Context, Given, guide_of, problem_of
from trainer.training.refining import refine_at_start

_FEW_ROWS = 64


@dataclass(frozen=True)
class LoaderRun:
    """What a run over a loader trains: steps of one batch each, by the eager program."""

    inference: Inference
    update: Update
    program: Eager
    state: State
    record: TrainState
    first: Batch

    def chunk(self, batch: Mapping[str, Any]) -> Batch:
        """One step's rows of this rank, of however many."""
        rows = self.rows(batch)
        valid = torch.tensor([[rows.size]], device=rows.valid.device)
        of_all = self.program.comm.sum(valid[0])
        ids = rows.row_id
        assert ids is not None
        row_id = ids[None, None] if self.inference.guide.noise_size[1] else None
        return Batch({name: column[None, None] for name, column in rows.columns.items()}, valid, of_all, row_id)

    def rows(self, batch: Mapping[str, Any]) -> Batch:
        """A loader's batch as what the model takes. Raises UserError for one that lacks a column."""
        names = self.inference.model.arguments
        lacking = [name for name in names if name not in batch]
        if lacking:
            raise UserError(
                f"a batch of the loader lacks {', '.join(lacking)}, which its first one had: give all of them."
            )
        return _rows({name: batch[name] for name in names}, self.program.comm.rank)

    def block(self, batch: Mapping[str, Any], number: int) -> Block:
        """A batch as block ``number`` of a pass."""
        rows = self.rows(batch)
        assert rows.row_id is not None
        return Block(number, rows.columns, rows.row_id)

    def posterior(self, module: ChunkModule) -> Posterior:
        """The posterior of what training has come to."""
        index = Index(tuple(_described(name, each) for name, each in self.first.columns.items()), (), 0, "train", {})
        return Posterior(module.inference, module.theta.detach().clone(), self.first, index)


def begun(
    trainer: pl.Trainer, cfg: Train, context: Context, given: Given, num_obs: int, saved: resume.Saved | None
) -> LoaderRun:
    """Sets up the problem of ``given`` on the first batch of the trainer's loader. Raises UserError."""
    say, first = context.console.print, next(iter(trainer.train_dataloader))  # type: ignore[arg-type]
    if not isinstance(first, Mapping):
        raise UserError(
            f"the loader gives {type(first).__name__} where dicts of tensors belong, as {{'x': x, 'y': y}}: name the "
            "model's arguments in its batches (collate_fn=)."
        )
    comm = context.world.comm
    dtype, (inference, theta) = in_its_precision(
        cfg.dtype, num_obs, lambda: _problem(cfg, given, first, num_obs, comm), say
    )
    sample = _rows({name: first[name] for name in inference.model.arguments}, 0)
    start = start_of(inference, theta, sample.as_group(), cfg.seed, say) if cfg.start == "laplace" else (theta, None)
    known = resume.fineness(saved)
    fineness = refine_at_start(inference, start, sample.as_group(), known, context.world, say)
    whitened = start[1] is not None
    cfg = replace(cfg, dtype=dtype, optimizer=optimizer_of(cfg, whitened))
    batches = trainer.num_training_batches
    plan = _Steps(int(batches) if math.isfinite(batches) else int(cfg.max_steps or 1))
    update = update_of(cfg, plan, whitened, 0, resume.begun(saved))
    refuse_long_warmup(inference.objective, update)
    if not inference.objective.is_elbo:
        raise UserError(
            f"{title(inference.objective)} weights draws by all rows, and a loader's batch has some: leave "
            "objective=elbo."
        )
    fresh = update.init(*start)
    size = context.world.size
    choice = PlanChoice(size, sample.size, cfg.seed, 0, 0, 0, size, "a loader")
    record = TrainState(problem_of(cfg, choice, inference, update, context.world), fineness=fineness)
    state = resume.taken_over(saved, record, fresh)
    device = trainer.strategy.root_device
    state = state.each(lambda tensor: comm.from_first(tensor.to(device)))
    program = Eager(inference, update, cfg.seed, [context.world.rank], comm)
    few = sample.at(torch.arange(min(_FEW_ROWS, sample.size)))
    few = few._replace(num_obs=num_obs)
    return LoaderRun(inference, update, program, state, record, few)


class AverageRounds(Callback):
    """Continues from a round's average at its end."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        assert isinstance(module, ChunkModule)
        if module.step == module.update.at(module.step - 1).horizon:
            module.state = module.state._replace(theta=module.theta.clone())


@dataclass(frozen=True)
class _Steps:
    """As much of a plan as a budget asks for."""

    steps_per_epoch: int

    def step_after(self, epochs: float) -> int:
        return math.ceil(epochs * self.steps_per_epoch)


def _problem(cfg: Train, given: Given, first: Mapping[str, Any], num_obs: int, comm: Comm) -> tuple[Inference, Tensor]:
    """The inference problem, checked on the first batch, and theta [P] at its start."""
    columns = tuple(arguments(given.model, list(first)))
    if LENGTH in first and LENGTH not in columns:  # of the entries of rows, where the model has a plate of them
        columns = (*columns, LENGTH)
    rows = _rows({name: first[name] for name in columns}, 0)
    rows = rows._replace(num_obs=num_obs)
    return set_up(
        given.model,
        guide_of(cfg, given, given.model, columns),
        rows,
        num_obs,
        build.objective(cfg.objective),
        plate=cfg.plate,
        global_sites=cfg.global_sites,
        seed=cfg.seed,
        rows=replace(build.rows(cfg.guide), facts=comm.gathered(facts_of(rows.columns, {}))[0]),
    )


def _rows(batch: Mapping[str, Any], rank: int) -> Batch:
    """A batch of rank ``rank``, whose rows get numbers that are their own within a step."""
    dtype = torch.get_default_dtype()
    columns = {name: as_type(torch.as_tensor(values), dtype) for name, values in batch.items()}
    first = next(iter(columns.values()))
    return Batch.whole(columns, torch.arange(len(first), device=first.device) + rank * 2**32)


def _described(name: str, column: Any) -> StoredColumn:
    return StoredColumn(name, str(column.dtype).removeprefix("torch."), tuple(column.shape[1:]))
