"""The default program: eager at first, compiled once there is enough left to do, by a rule on counts alone.

A compiled step is ready after about as much time as a thousand or several thousand eager ones. Most problems of some
thousand rows are done before. So the rounds run eagerly up to the first one of a thousand steps, another process
compiles during the one before it, and the run continues compiled. A first round of two thousand steps or more (large
tables) is compiled from its thousandth step on. Where no round is so long, nothing is compiled. A model whose latents
of rows are integrated out takes some twenty evaluations a step, so fifty of its steps are worth as much.

What was compiled before, how fast the machine is, and when the compiler is done change nothing: two runs take the same
steps by the same program, so a run that is cut and resumed is bit for bit the same. A GPU runs compiled from the start.

Shapes: as in `trainer.inference.programs.program`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

from trainer.distributed.comm import ALONE, Comm
from trainer.errors import UserError
from trainer.inference.model.plates import Batch
from trainer.inference.optim.rounds import State, Update
from trainer.inference.programs.fused import Fused
from trainer.inference.programs.program import ChunkResult, Eager
from trainer.inference.programs.sweep import Sweep
from trainer.inference.programs.tracing import Untraceable
from trainer.inference.step import Inference

WORTH = 1000  # steps, for which it is worth waiting for a compiler


@dataclass
class Auto:
    """`Eager` before ``stages[1]``, `Fused` from there on, which another process compiles from ``stages[0]`` on."""

    inference: Inference
    update: Update
    seed: int
    groups: Sequence[int]
    comm: Comm = ALONE
    sync_every: ClassVar[int] = 1
    stages: tuple[int, ...] = field(init=False)
    reference: Eager = field(init=False)
    fused: Fused = field(init=False)

    def __post_init__(self) -> None:
        given = self.inference, self.update, self.seed, self.groups, self.comm
        self.reference, self.fused = Eager(*given), Fused(*given)
        worth = WORTH // self.inference.model.evaluations
        self.stages = stages([each.horizon for each in self.update.rounds], worth)

    def begin(self, state: State, chunk: Batch, say: Callable[[str], None] = print) -> None:
        with _not_for_good():
            self.fused.begin(state, chunk, say)

    def prepare(self, state: State, chunk: Batch, say: Callable[[str], None] = print) -> None:
        """Does what is due at the step of ``state``. Raises Untraceable for what has to continue eagerly."""
        if state.theta.device.type == "cuda":
            self.stages = ()
        if self._is_compiled(state):
            with _not_for_good():
                self.fused.prepare(state, chunk, say)
        elif self.stages and int(state.step) >= self.stages[0]:
            self.begin(state, chunk, say)

    def abandon(self) -> None:
        self.fused.abandon()

    def sweep(self) -> Sweep | None:
        return self.fused.sweep()

    def run(self, state: State, chunk: Batch, steps: int) -> ChunkResult:
        return (self.fused if self._is_compiled(state) else self.reference).run(state, chunk, steps)

    def _is_compiled(self, state: State) -> bool:
        return state.theta.device.type == "cuda" or bool(self.stages and int(state.step) >= self.stages[1])


def stages(ends: Sequence[int], worth: int = WORTH) -> tuple[int, ...]:
    """When to begin to compile and when to run compiled, for rounds with these ``ends``; () for never.

    ``worth``: steps, for which it is worth waiting for a compiler.
    """
    places = [0, *([worth] if ends[0] >= 2 * worth else []), *ends]
    for (before, here), (_, after) in pairwise(pairwise(places)):
        if after - here >= worth:
            return before, here
    return ()


@contextmanager
def _not_for_good() -> Iterator[None]:
    """What `Fused` refuses is no error here, since the eager program takes it."""
    try:
        yield
    except UserError as error:
        raise Untraceable(str(error)) from error
