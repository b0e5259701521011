"""Latents of rows integrated as finely as the answer asks for: looked at before training, and as each round ends."""

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.distributed.ranks import World, of_all
from trainer.engine.module import ChunkModule
from trainer.engine.train_state import TrainState
from trainer.inference.model.plates import Batch
from trainer.inference.optim.variance_reduction import Preconditioner
from trainer.inference.recipe.row_integrals import LIMIT, NATS, Refined, refined
from trainer.inference.rows.integral import Fineness
from trainer.inference.step import Inference

Start = tuple[Tensor, Preconditioner | None]


def refine_at_start(
    inference: Inference,
    start: Start,
    sample: Batch,
    known: list[int] | None,
    world: World,
    say: Callable[[str], None],
) -> list[int] | None:
    """Integrates rows as finely as is ``known`` from a checkpoint, or as a ``start`` at a mode asks for: as
    `TrainState.fineness` holds it.

    ``start``: theta [P], and its coordinates; ``sample``: one lane group.
    """
    if known is not None:
        inference.model.refine(known)
        return known
    before, at_mode = inference.model.fineness, start[1] is not None and bool(start[1].curvature.any())
    found = refined(inference, start[0], sample, start[1]) if at_mode else None
    if found is None:
        return None if before is None else list(before)
    fineness = Fineness(*map(max, zip(*of_all(list(found.fineness), world))))
    if fineness != before:
        inference.model.refine(fineness)
        say(f"latents of rows: {_changed(before, found)}")
    return list(fineness)


def refine_at_end(module: ChunkModule, sample: Batch, record: TrainState) -> None:
    """The same as a round ends, at its average; the program is made anew where integrals become finer."""
    inference, state = module.inference, module.state
    before, found = inference.model.fineness, refined(inference, module.theta, sample, state.preconditioner)
    if found is None:
        return
    fineness = Fineness(*module.comm.from_first(torch.tensor(found.fineness, device=module.device)).tolist())
    if fineness != before:
        inference.model.refine(fineness)
        module.renew()
        module.say(f"step {module.step:,}: latents of rows: {_changed(before, found)}")
    elif still := _still(found):
        module.say(f"step {module.step:,}: latents of rows: {_words(before)}; {still}")
    record.fineness = list(fineness)


def _changed(before: Fineness, found: Refined) -> str:
    moved, still = found.moved, _still(found)
    far = f"the answer by {moved.scales:.2g} sd and the ELBO by {moved.nats:.2g} nats"
    words = f"{_words(found.fineness)} in place of {_words(before)}, which moves {far}"
    return f"{words}; {still}" if still else words


def _still(found: Refined) -> str:
    """What even finer integrals would change, if that is much."""
    off = found.off
    if off.scales > LIMIT:
        return f"twice as many would move the answer by {off.scales:.2g} sd more, so trust it no further"
    return f"the ELBO is off by about {off.nats:.2g} nats" if off.nats > NATS else ""


def _words(fineness: Fineness) -> str:
    return f"{fineness.copies:,} nodes and {fineness.steps} Newton steps"
