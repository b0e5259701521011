"""Which rows made a number that is not finite, found by halving: a sum is finite only where each of its parts is."""

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.inference.model.plates import Batch
from trainer.inference.optim.rounds import State
from trainer.inference.programs.program import Reference
from trainer.inference.step import Inference, StepNoise

_AT_MOST = 5
Places = list[tuple[int, int]]
"""(lane group of this rank, row of it)."""


def nan_rows(program: Reference, state: State, chunk: Batch) -> tuple[int, Places]:
    """The slot of ``chunk`` at which a run from ``state`` ceases to be finite, and a few of this rank's rows of which
    each alone has a term or a gradient that is not.

    To be called on all ranks. Without rows where the cause lies elsewhere, or the parts cannot be told apart (columns
    of varying length).
    """
    slots = len(chunk.batch_rows)
    for k in range(slots):
        result = program.run(state, chunk.part(k, k + 1), 1)
        if not (torch.isfinite(result.terms).all() and torch.isfinite(result.state.theta).all()):
            batch = chunk.slot(k)
            if len({column.shape[:2] for column in batch.columns.values()}) > 1:
                return k, []
            noise = program.noise(int(state.step), batch, state.theta.dtype)
            found: Places = []
            for a, valid in enumerate(batch.valid.tolist()):
                is_bad = _judge(program.inference, state.theta, noise, batch, a)
                found += [(a, row) for row in _halved(is_bad, list(range(valid)), _AT_MOST - len(found))]
            return k, found
        state = result.state
    return slots, []


def _judge(inference: Inference, theta: Tensor, noise: StepNoise, batch: Batch, a: int) -> Callable[[list[int]], bool]:
    """Whether some rows of group ``a`` have a term, or a gradient of one, that is not finite."""
    of_rows = torch.tensor([kind != "kl_global" for kind in inference.kinds])

    def is_bad(rows: list[int]) -> bool:
        part = Batch(
            {name: column[a : a + 1, rows] for name, column in batch.columns.items()},
            batch.valid.new_tensor([len(rows)]),
            batch.batch_rows,
            None if batch.row_id is None else batch.row_id[a : a + 1, rows],
        )
        here = StepNoise(
            noise.elements[a : a + 1],
            None if noise.rows is None else noise.rows[a : a + 1, :, rows],
            noise.seeds[a : a + 1],
        )
        with torch.enable_grad():
            at = theta.detach().requires_grad_()
            total = inference.terms(at, here, part, 1.0)[of_rows].sum()
            (slope,) = torch.autograd.grad(total, at)
        return not (torch.isfinite(total) and torch.isfinite(slope).all())

    return is_bad


def _halved(is_bad: Callable[[list[int]], bool], rows: list[int], at_most: int) -> list[int]:
    if at_most < 1 or not rows or not is_bad(rows):
        return []
    if len(rows) == 1:
        return rows
    middle = len(rows) // 2
    found = _halved(is_bad, rows[:middle], at_most)
    return found + _halved(is_bad, rows[middle:], at_most - len(found))
