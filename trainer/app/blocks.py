"""A rank's blocks of a shard folder as tensors, for what is evaluated over all rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from trainer.data.index import ROW_ID
from trainer.data.reader import ShardFolder
from trainer.lit.datamodule import to_tensor
from trainer.lit.module import VariationalModule
from trainer.lit.strategy import sum_over_ranks
from trainer.posterior.elbo import Block
from trainer.posterior.gradient import FEW, Draws, Pass, full_gradient, full_product
from trainer.svi.noise import mixed_seed
from trainer.svi.variance import Whitening

_TOGETHER = 65_536  # rows that are evaluated at once, where blocks are smaller


def block(folder: ShardFolder, number: int, module: VariationalModule, rows: int | None = None) -> Block:
    """Block ``number``, or its first ``rows`` rows, on the module's device."""

    def values(name: str) -> Tensor:
        return to_tensor(folder.read_block(number, name)[:rows], module.theta.dtype).to(module.device)

    return Block(number, {name: values(name) for name in module.inference.model.arguments}, values(ROW_ID))


def blocks(folder: ShardFolder, trainer: pl.Trainer) -> Iterator[Block]:
    """This rank's blocks."""
    module = _module(trainer)
    for number in range(trainer.global_rank, len(folder.block_rows), trainer.world_size):
        yield block(folder, number, module)


@dataclass(frozen=True)
class AllRows:
    """The loss over all training rows, by its derivatives; ``facts`` (the checkpoint's) count the passes, which
    ``watch`` is told of.
    """

    folder: ShardFolder
    seed: int
    facts: dict[str, Any]
    watch: Callable[[int], None]

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
        return full_gradient(module.inference, theta, self._pass(module, trainer, fresh), whitening, draws)

    def product(self, trainer: pl.Trainer, theta: Tensor, along: Tensor) -> Tensor:
        """float64 [D]: the Hessian of minus the ELBO (nats) by the locations at ``theta``, times ``along`` [D]."""
        module = _module(trainer)
        return full_product(module.inference, theta, along, self._pass(module, trainer))

    def _pass(self, module: VariationalModule, trainer: pl.Trainer, fresh: bool = False) -> Pass:
        count, together = len(self.folder.block_rows), max(1, _TOGETHER // int(self.folder.block_rows[0]))
        starts = range(0, count, together)
        here = (
            _joined([block(self.folder, number, module) for number in range(first, min(first + together, count))])
            for first in starts[trainer.global_rank :: trainer.world_size]
        )
        self.facts["passes"] = self.facts.get("passes", 0) + 1
        self.watch(self.facts["passes"])
        return Pass(here, len(starts), mixed_seed(self.seed, module.step, 0xF011 + fresh), sum_over_ranks)


def _module(trainer: pl.Trainer) -> VariationalModule:
    module = trainer.lightning_module
    assert isinstance(module, VariationalModule)
    return module


def _joined(some: list[Block]) -> Block:
    """Neighbouring blocks as one, by the first one's number."""
    columns = {name: torch.cat([each.columns[name] for each in some]) for name in some[0].columns}
    return Block(some[0].number, columns, torch.cat([each.row_id for each in some]))
