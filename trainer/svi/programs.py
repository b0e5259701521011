"""How a chunk of K steps is executed. `Eager` calls the pure step slot by slot; it is the reference for every other.

Shapes: K slots, A lane groups of this rank, B rows of a group, S sites.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trainer.svi.noise import element_noise, mixed_seed, row_noise
from trainer.svi.step import Inference, State, StepBatch, StepNoise, Update, step


class Chunk(NamedTuple):
    """K consecutive steps' rows, as tensors on the device."""

    columns: dict[str, Tensor]
    """Each [K, A, B, ...]."""
    valid: Tensor
    """int64 [K, A]."""
    batch_rows: Tensor
    """int64 [K]: valid rows of each global batch."""
    row_id: Tensor | None
    """int64 [K, A, B]."""

    def slot(self, k: int) -> StepBatch:
        row_id = None if self.row_id is None else self.row_id[k]
        return StepBatch({n: c[k] for n, c in self.columns.items()}, self.valid[k], self.batch_rows[k], row_id)


class ChunkResult(NamedTuple):
    state: State
    terms: Tensor
    """float64 [steps, S], full-data nats, summed over the ranks."""
    grad_norm: Tensor
    """float64 [steps]."""


class Program(Protocol):
    def run(self, state: State, chunk: Chunk, steps: int) -> ChunkResult: ...


def alone(tensor: Tensor) -> Tensor:
    """The sum over one rank."""
    return tensor


@dataclass(frozen=True)
class Eager:
    """The pure step, called for each active slot; inert slots are not evaluated, which is what they come to."""

    inference: Inference
    update: Update
    seed: int
    groups: Sequence[int]
    """The numbers of this rank's lane groups among all P: they number the draws."""
    world_size: int = 1
    reduce: Callable[[Tensor], Tensor] = alone

    def noise(self, at: int, batch: StepBatch, dtype: torch.dtype) -> StepNoise:
        """The noise of step ``at``: a function of (seed, step, draw, element or row) alone."""
        device, pairs = batch.valid.device, self.inference.objective.pairs
        elements, per_row = self.inference.guide.noise_size
        when = torch.tensor(at, device=device)
        draws = torch.tensor([g * pairs + r for g in self.groups for r in range(pairs)], device=device)
        flat = element_noise(self.seed, when, draws, elements, dtype)
        rows = None
        if per_row:
            assert batch.row_id is not None, "a guide with local latents needs row ids"
            rows = torch.stack(
                [
                    row_noise(
                        self.seed, when, draws.view(-1, pairs)[a], batch.row_id[a].expand(pairs, -1), per_row, dtype
                    )
                    for a in range(len(self.groups))
                ]
            )
        seeds = tuple(tuple(mixed_seed(self.seed, at, g * pairs + r) for r in range(pairs)) for g in self.groups)
        return StepNoise(flat.view(len(self.groups), pairs, elements), rows, seeds)

    def run(self, state: State, chunk: Chunk, steps: int) -> ChunkResult:
        """Takes ``steps`` <= K steps from ``state``."""
        terms, norms = [], []
        active = torch.tensor(True, device=state.theta.device)
        for k in range(steps):
            batch = chunk.slot(k)
            noise = self.noise(int(state.step), batch, state.theta.dtype)
            state, here, norm = step(
                self.inference, self.update, self.reduce, self.world_size, state, noise, batch, active
            )
            terms.append(here)
            norms.append(norm)
        return ChunkResult(state, self.reduce(torch.stack(terms)), torch.stack(norms))
