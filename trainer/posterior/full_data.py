"""Passes over all rows of a split: each rank reads its part of the blocks, and what they make of them is summed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.data.shards.folder import ShardFolder
from trainer.data.shards.index import ROW_ID
from trainer.data.shards.read_thread import ReadThread
from trainer.distributed.comm import Comm
from trainer.errors import UserError
from trainer.inference.estimates.full_gradient import (
    FEW,
    Draws,
    full_gradient,
    full_hessian,
    full_loss,
    full_product,
)
from trainer.inference.estimates.many_draws import Together, terms_together
from trainer.inference.estimates.passes import Block, Pass, Reduce
from trainer.inference.model.noise import mixed_seed
from trainer.inference.model.ragged import cat
from trainer.inference.optim.variance_reduction import Preconditioner
from trainer.inference.programs.sweep import Sweep
from trainer.inference.recipe.optimum import problem_of
from trainer.inference.step import Inference
from trainer.posterior.first_pass import FirstPass
from trainer.posterior.tensors import to_tensor

_TOGETHER = 65_536  # rows that are evaluated at once, where blocks are smaller
Groups = Sequence[Sequence[int]]
"""Numbers of neighboring blocks, each group evaluated as one block."""


@dataclass(frozen=True)
class FullData:
    """A split's rows, as the tensors that a model takes."""

    folder: ShardFolder
    columns: tuple[str, ...]
    """The model's."""
    comm: Comm
    check: Callable[[], None]
    """Called before each block; it may raise."""
    first_pass: FirstPass | None = None
    """Checks rows that come for the first time."""

    def block(self, number: int, like: Tensor, rows: int | None = None) -> Block:
        """Block ``number``, or its first ``rows`` rows, of the type and on the device of ``like``."""
        return self._made(number, self._read([number])[0], like, rows)

    def once(self, like: Tensor, step: int, seed: int, count: int | None = None) -> Pass:
        """A pass over the rows, or over those of the first ``count`` blocks, by the draws of a ``seed``.

        ``like``: as for `block`; ``step``: how many were taken. An error that ends the blocks of one rank is raised on
        all of them, at the sum.
        """
        return self.by_groups(like, step, seed, [[number] for number in range(len(self.folder.block_rows))][:count])

    def by_groups(self, like: Tensor, step: int, seed: int, groups: Groups) -> Pass:
        """As `once`, each of the ``groups`` as one block."""
        blocks, total = together(self._groups(like, step, groups), self.comm)
        return Pass(blocks, len(groups), seed, total)

    def _groups(self, like: Tensor, step: int, groups: Groups) -> Iterator[Block]:
        """This rank's, the next one read ahead."""
        mine, first = groups[self.comm.rank :: self.comm.size], self.first_pass
        thread = ReadThread(self.folder.timeout, self.folder.reading)
        try:
            for numbers, stored in zip(mine, thread.ahead(partial(self._read, numbers) for numbers in mine)):
                self.check()
                block = _joined([self._made(number, each, like) for number, each in zip(numbers, stored)])
                if first is not None:
                    first.of_block(self.folder, block, step)
                yield block
            if first is not None and sum(map(len, groups)) == len(self.folder.block_rows):
                first.done(self.folder)
        finally:
            thread.close()

    def _read(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The columns of each of these blocks, as they are stored."""
        names = (*self.columns, ROW_ID)
        return [{name: self.folder.read_block(number, name) for name in names} for number in numbers]

    def _made(self, number: int, stored: dict[str, Any], like: Tensor, rows: int | None = None) -> Block:
        tensors = {name: to_tensor(values[:rows], like.dtype).to(like.device) for name, values in stored.items()}
        return Block(number, {name: tensors[name] for name in self.columns}, tensors[ROW_ID])


@dataclass(frozen=True)
class FullLoss:
    """Minus the ELBO over all rows (nats), by its derivatives; ``passed`` is called for each pass."""

    rows: FullData
    inference: Inference
    seed: int
    passed: Callable[[], None]
    sweep: Callable[[], Sweep | None] = lambda: None
    """What evaluates rows where that is compiled by now."""
    together: dict[str, Together] = field(default_factory=dict)
    """How draws go through the model for each derivative, once that is known."""

    def gradient(
        self,
        step: int,
        theta: Tensor,
        preconditioner: Preconditioner | None = None,
        draws: Draws = FEW,
        fresh: bool = False,
    ) -> Tensor:
        """float64 [P] at ``theta``; other draws at every ``step``, and others if ``fresh``."""
        made = self._together("gradient", self.inference)
        return full_gradient(made, theta, self._pass(step, theta, fresh), preconditioner, draws, self.sweep())

    def product(self, step: int, theta: Tensor, along: Tensor) -> Tensor:
        """float64 [D]: the Hessian by the locations at ``theta``, times ``along`` [D]."""
        return full_product(self._together("product", self.inference), theta, along, self._pass(step, theta))

    def loss(self, step: int, theta: Tensor, draws: Draws, number: int) -> tuple[float, Tensor]:
        """The value at ``theta`` and its gradient [P], float64, by the draws of a ``number``."""
        made = self._together("loss", problem_of(self.inference))
        return full_loss(made, theta, self._pass(step, theta, 1 + number), draws)

    def hessian(self, step: int, theta: Tensor, size: int) -> Tensor:
        """float64 [D, D] by the first D = ``size`` parameters at ``theta``."""
        return full_hessian(self._together("hessian", self.inference), theta, size, self._pass(step, theta))

    def _together(self, derivative: str, inference: Inference) -> Together:
        return self.together.setdefault(derivative, terms_together(inference))

    def _pass(self, step: int, theta: Tensor, fresh: int = 0) -> Pass:
        sizes = self.rows.folder.block_rows
        count, size = len(sizes), max(1, _TOGETHER // int(sizes[0]))
        groups = [range(first, min(first + size, count)) for first in range(0, count, size)]
        self.passed()
        return self.rows.by_groups(theta, step, mixed_seed(self.seed, step, 0xF011 + fresh), groups)


def together(blocks: Iterator[Block], comm: Comm) -> tuple[Iterator[Block], Reduce]:
    """This rank's ``blocks``, and the sum over the ranks of what was made of them, which raises what ended them."""
    failed: list[UserError] = []

    def here() -> Iterator[Block]:
        try:
            yield from blocks
        except UserError as error:
            failed.append(error)

    def total(tensor: Tensor) -> Tensor:
        comm.raise_together(failed[0] if failed else None, tensor.device)
        return comm.sum(tensor)

    return here(), total


def _joined(some: list[Block]) -> Block:
    """Neighboring blocks as one, by the first one's number."""
    columns = {name: cat([each.columns[name] for each in some]) for name in some[0].columns}
    return Block(some[0].number, columns, torch.cat([each.row_id for each in some]))
