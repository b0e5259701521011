"""Communication-avoiding training: each rank takes steps of its own on its own rows, then parameters are averaged.

Local SGD (Stich, "Local SGD converges fast and communicates little", ICLR 2019): W ranks that average every H steps
send 1/H of the messages. It is a run with W times smaller batches whose W iterates are averaged. Where the objective is
quadratic the estimate's mean is the same; elsewhere the average of the ranks' iterates replaces the iterate of their
average gradient, a difference that vanishes with the learning rate.

Shapes: as in `trainer.inference.programs.program`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from trainer.distributed.comm import ALONE, Comm
from trainer.errors import UserError
from trainer.inference.model.plates import Batch
from trainer.inference.optim.rounds import State, Update
from trainer.inference.programs.fused import Fused
from trainer.inference.programs.program import ChunkResult, Program
from trainer.inference.step import Inference, StepNoise


@dataclass
class LocalSteps:
    """``program`` run by each rank alone, theta and the optimizer's vectors averaged at multiples of ``sync_every``."""

    inference: Inference
    update: Update
    seed: int
    groups: Sequence[int]
    comm: Comm = ALONE
    sync_every: int = 16
    program: Callable[..., Program] = Fused
    stages: ClassVar[tuple[int, ...]] = ()
    local: Program = field(init=False)

    def __post_init__(self) -> None:
        if self.sync_every < 1:
            raise UserError(f"program.sync_every={self.sync_every} must be at least 1.")
        self.local = self.program(self.inference, self.update, self.seed, self.groups)

    @property
    def reference(self) -> "LocalSteps":
        made = LocalSteps(self.inference, self.update, self.seed, self.groups, self.comm, self.sync_every)
        made.local = self.local.reference
        return made

    def noise(self, at: int, batch: Batch, dtype: torch.dtype) -> StepNoise:
        return self.local.reference.noise(at, batch, dtype)

    def begin(self, state: State, chunk: Batch, say: Callable[[str], None] = print) -> None:
        self.local.begin(state, _own(chunk), say)

    def prepare(self, state: State, chunk: Batch, say: Callable[[str], None] = print) -> None:
        self.local.prepare(state, _own(chunk), say)

    def abandon(self) -> None:
        self.local.abandon()

    def sweep(self) -> None:
        return None

    def run(self, state: State, chunk: Batch, steps: int) -> ChunkResult:
        """The chunk's end is an average too, so it has to be a multiple of ``sync_every`` or the end of the run."""
        chunk, at, terms, norms = _own(chunk), 0, [], []
        while at < steps:
            stop = min(steps, at + self.sync_every - int(state.step) % self.sync_every)
            made = self.local.run(state, chunk.part(at, stop), stop - at)
            state = self._averaged(made.state)
            terms.append(made.terms)
            norms.append(made.grad_norm)
            at = stop
        figures = self.comm.sum(torch.cat([torch.cat(terms), torch.cat(norms)[:, None]], dim=1)) / self.comm.size
        return ChunkResult(state, figures[:, :-1], figures[:, -1])

    def _averaged(self, state: State) -> State:
        """The mean state of the ranks, which have all taken the same number of steps."""
        vectors = {"theta": state.theta, "average": state.average, **state.moments}
        mean = self.comm.sum(torch.cat([*vectors.values()])) / self.comm.size
        theta, average, *moments = mean.split([len(each) for each in vectors.values()])
        return state._replace(theta=theta, average=average, moments=dict(zip(state.moments, moments)))


def _own(chunk: Batch) -> Batch:
    """The chunk as if this rank's rows were the whole batch."""
    return chunk._replace(batch_rows=chunk.valid.sum(1).clamp(min=1))
