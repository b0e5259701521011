"""A rank's blocks of a shard folder as tensors, for what is evaluated over all rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from trainer.data.shards.folder import ShardFolder
from trainer.data.shards.index import ROW_ID
from trainer.data.shards.read_thread import ReadThread
from trainer.errors import UserError
from trainer.lit.module import VariationalModule
from trainer.lit.strategy import raise_together, sum_over_ranks
from trainer.posterior.elbo import Block
from trainer.posterior.gradient import FEW, Draws, Pass, full_gradient, full_hessian, full_loss, full_product
from trainer.posterior.optimum import problem_of
from trainer.posterior.tensors import to_tensor
from trainer.posterior.together import Together, terms_together
from trainer.svi.noise import mixed_seed
from trainer.svi.rows import cat
from trainer.svi.step import Inference
from trainer.svi.variance import Whitening

_TOGETHER = 65_536  # rows that are evaluated at once, where blocks are smaller


def block(folder: ShardFolder, number: int, module: VariationalModule, rows: int | None = None) -> Block:
    """Block ``number``, or its first ``rows`` rows, on the module's device."""
    return _made(number, _read(folder, module, [number])[0], module, rows)


def blocks(
    folder: ShardFolder, trainer: pl.Trainer, check: Callable[[], None], count: int | None = None
) -> Iterator[Block]:
    """This rank's blocks, of the first ``count``; ``check`` is called before each, and may raise."""
    return _groups(folder, trainer, check, [[number] for number in range(len(folder.block_rows))][:count])


def together(here: Iterator[Block]) -> tuple[Iterator[Block], Callable[[Tensor], Tensor]]:
    """This rank's blocks, and the sum over the ranks of what was made of them.

    An error that ends the blocks of one rank is raised on all of them, at the sum.
    """
    failed: list[UserError] = []

    def blocks() -> Iterator[Block]:
        try:
            yield from here
        except UserError as error:
            failed.append(error)

    def total(tensor: Tensor) -> Tensor:
        raise_together(failed[0] if failed else None, tensor.device)
        return sum_over_ranks(tensor)

    return blocks(), total


@dataclass(frozen=True)
class AllRows:
    """The loss over all training rows, by its derivatives; ``facts`` (the checkpoint's) count the passes, which
    ``watch`` is told of; ``check`` is called before each part of one, and may raise.
    """

    folder: ShardFolder
    seed: int
    facts: dict[str, Any]
    watch: Callable[[int], None]
    check: Callable[[], None]
    together: dict[str, Together] = field(default_factory=dict)
    """How draws go through the model for each derivative, once that is known."""

    def gradient(
        self,
        trainer: pl.Trainer,
        theta: Tensor,
        whitening: Whitening | None = None,
        draws: Draws = FEW,
        fresh: bool = False,
    ) -> Tensor:
        """float64 [P] of minus the ELBO (nats) at ``theta``; other draws at every step, and others if ``fresh``."""
        module = _module(trainer)
        return full_gradient(
            self._together("gradient", module.inference), theta, self._pass(module, trainer, fresh), whitening, draws
        )

    def product(self, trainer: pl.Trainer, theta: Tensor, along: Tensor) -> Tensor:
        """float64 [D]: the Hessian of minus the ELBO (nats) by the locations at ``theta``, times ``along`` [D]."""
        module = _module(trainer)
        return full_product(self._together("product", module.inference), theta, along, self._pass(module, trainer))

    def loss(self, trainer: pl.Trainer, theta: Tensor, draws: Draws, number: int) -> tuple[float, Tensor]:
        """Minus the ELBO (nats) at ``theta`` and its gradient [P], float64, by the draws of a ``number``."""
        module = _module(trainer)
        together = self._together("loss", problem_of(module.inference))
        return full_loss(together, theta, self._pass(module, trainer, 1 + number), draws)

    def hessian(self, trainer: pl.Trainer, theta: Tensor, size: int) -> Tensor:
        """float64 [D, D] of minus the ELBO (nats) by the first D = ``size`` parameters at ``theta``."""
        module = _module(trainer)
        return full_hessian(self._together("hessian", module.inference), theta, size, self._pass(module, trainer))

    def _together(self, derivative: str, inference: Inference) -> Together:
        return self.together.setdefault(derivative, terms_together(inference))

    def _pass(self, module: VariationalModule, trainer: pl.Trainer, fresh: int = 0) -> Pass:
        count, size = len(self.folder.block_rows), max(1, _TOGETHER // int(self.folder.block_rows[0]))
        groups = [range(first, min(first + size, count)) for first in range(0, count, size)]
        here, total = together(_groups(self.folder, trainer, self.check, groups))
        self.facts["passes"] = self.facts.get("passes", 0) + 1
        self.watch(self.facts["passes"])
        return Pass(here, len(groups), mixed_seed(self.seed, module.step, 0xF011 + fresh), total)


def _module(trainer: pl.Trainer) -> VariationalModule:
    module = trainer.lightning_module
    assert isinstance(module, VariationalModule)
    return module


def _groups(
    folder: ShardFolder, trainer: pl.Trainer, check: Callable[[], None], groups: Sequence[Sequence[int]]
) -> Iterator[Block]:
    """This rank's groups of neighbouring blocks, each as one block, the next one read ahead."""
    module, mine = _module(trainer), groups[trainer.global_rank :: trainer.world_size]
    thread = ReadThread(folder.timeout, folder.reading)
    try:
        for numbers, stored in zip(mine, thread.ahead(partial(_read, folder, module, numbers) for numbers in mine)):
            check()
            joined = _joined([_made(number, each, module) for number, each in zip(numbers, stored)])
            if module.first_pass is not None:
                module.first_pass.of_block(folder, joined, module.step)
            yield joined
        if module.first_pass is not None and sum(map(len, groups)) == len(folder.block_rows):
            module.first_pass.done(folder)
    finally:
        thread.close()


def _read(folder: ShardFolder, module: VariationalModule, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """The columns of each of these blocks, as they are stored."""
    names = (*module.inference.model.arguments, ROW_ID)
    return [{name: folder.read_block(number, name) for name in names} for number in numbers]


def _made(number: int, stored: dict[str, Any], module: VariationalModule, rows: int | None = None) -> Block:
    dtype, device = module.theta.dtype, module.device
    tensors = {name: to_tensor(values[:rows], dtype).to(device) for name, values in stored.items()}
    return Block(number, {name: tensors[name] for name in module.inference.model.arguments}, tensors[ROW_ID])


def _joined(some: list[Block]) -> Block:
    """Neighbouring blocks as one, by the first one's number."""
    columns = {name: cat([each.columns[name] for each in some]) for name in some[0].columns}
    return Block(some[0].number, columns, torch.cat([each.row_id for each in some]))
