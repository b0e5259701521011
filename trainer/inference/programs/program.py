"""How a chunk of K steps is executed. `Eager` calls the pure step slot by slot; it is the reference for every other.

Shapes: K slots, A lane groups of this rank, R draws of a group, B rows of a group, S sites.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from trainer.distributed.comm import ALONE, Comm
from trainer.inference.model.noise import chunk_noise, mixed_seed
from trainer.inference.model.plates import Batch
from trainer.inference.optim.rounds import State, Update
from trainer.inference.programs.sweep import Sweep
from trainer.inference.step import Inference, StepInput, StepNoise, step


class ChunkResult(NamedTuple):
    state: State
    terms: Tensor
    """float64 [steps, S], full-data nats, summed over the ranks."""
    grad_norm: Tensor
    """float64 [steps]."""


class Program(Protocol):
    @property
    def inference(self) -> Inference: ...

    @property
    def comm(self) -> Comm: ...

    @property
    def sync_every(self) -> int:
        """Chunks end at multiples of it, where all ranks hold the same state."""
        ...

    @property
    def stages(self) -> tuple[int, ...]:
        """Steps at which a chunk begins and it has to be prepared again, since it then runs otherwise."""
        ...

    @property
    def reference(self) -> "Reference":
        """The reference that this program must equal."""
        ...

    def begin(self, state: State, chunk: Batch, say: Callable[[str], None] = print) -> None:
        """Has what `prepare` waits for done by another process meanwhile, and returns at once."""
        ...

    def prepare(self, state: State, chunk: Batch, say: Callable[[str], None] = print) -> None:
        """Makes ready for chunks like ``chunk``, of any number of slots, and says what takes its time."""
        ...

    def abandon(self) -> None:
        """Ends what `begin` began, where it still runs."""
        ...

    def sweep(self) -> Sweep | None:
        """Evaluates rows at one theta, where that is compiled and worth it."""
        ...

    def run(self, state: State, chunk: Batch, steps: int) -> ChunkResult:
        """Takes ``steps`` <= K steps from ``state``, all of one round; the chunk's other slots are not used."""
        ...


class Reference(Program, Protocol):
    """A program that runs the pure step itself, so that what a step did can be looked at row by row."""

    def noise(self, at: int, batch: Batch, dtype: torch.dtype) -> StepNoise:
        """The noise of step ``at``: a function of (seed, step, draw, element or row) alone."""
        ...


ProgramFactory = Callable[[Inference, Update, int, Sequence[int], Comm], Program]
"""(inference, update, seed, groups, comm): as for `Eager`."""


@dataclass(frozen=True)
class Eager:
    """The pure step, called for each slot."""

    inference: Inference
    update: Update
    seed: int
    groups: Sequence[int]
    """The numbers of this rank's lane groups among all P: they number the draws."""
    comm: Comm = ALONE
    sync_every: ClassVar[int] = 1
    stages: ClassVar[tuple[int, ...]] = ()

    @property
    def reference(self) -> "Eager":
        return self

    def begin(self, state: State, chunk: Batch, say: Callable[[str], None] = print) -> None:
        pass

    def prepare(self, state: State, chunk: Batch, say: Callable[[str], None] = print) -> None:
        pass

    def abandon(self) -> None:
        pass

    def sweep(self) -> None:
        return None

    def noise(self, at: int, batch: Batch, dtype: torch.dtype) -> StepNoise:
        draws = draw_numbers(self.groups, self.inference.objective.pairs, batch.valid.device)
        when = torch.tensor([at], device=batch.valid.device)
        row_id = None if batch.row_id is None else batch.row_id[None]
        elements, rows = chunk_noise(self.inference.guide.noise_size, self.seed, when, draws, row_id, dtype)
        seeds = tuple(tuple(mixed_seed(self.seed, at, draw) for draw in group) for group in draws.tolist())
        return StepNoise(elements[0], None if rows is None else rows[0], seeds)

    def run(self, state: State, chunk: Batch, steps: int) -> ChunkResult:
        terms, norms = [], []
        here = self.update.at(int(state.step))
        for k in range(steps):
            batch = chunk.slot(k)
            noise = self.noise(int(state.step), batch, state.theta.dtype)
            rates = self.inference.rates(here, state.step)
            state, values, norm = step(self.inference, here, self.comm, state, StepInput(noise, batch, rates))
            terms.append(values)
            norms.append(norm)
        return ChunkResult(state, self.comm.sum(torch.stack(terms)), torch.stack(norms))


def draw_numbers(groups: Sequence[int], pairs: int, device: torch.device) -> Tensor:
    """int64 [A, R]: the numbers of the draws of these lane groups among all of a step."""
    return torch.tensor([[group * pairs + r for r in range(pairs)] for group in groups], device=device)
