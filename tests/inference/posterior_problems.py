"""What tests of full passes and posteriors share: problems set up, blocks of rows, simulated ranks. float64."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.inference.estimates.full_elbo import ElboEstimate, full_elbo
from trainer.inference.estimates.passes import Block, Pass, Reduce
from trainer.inference.guides.mean_field import MeanField
from trainer.inference.model.plates import Batch
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.setup import set_up
from trainer.inference.step import Inference

F64 = torch.float64
Columns = dict[str, Tensor]


def batch_of(columns: Columns) -> Batch:
    rows = len(next(iter(columns.values())))
    return Batch.whole(columns, torch.arange(rows))


def build(
    model: Any, columns: Columns, guide: Any = MeanField, kl: str = "analytic", **options: Any
) -> tuple[Inference, Tensor]:
    batch = batch_of(columns)
    return set_up(model, guide, batch, batch.size, ELBO(kl=kl), **options)


def at(loc: Sequence[float] | Tensor, scale: Sequence[float] | Tensor) -> Tensor:
    """theta of a mean-field guide."""
    return torch.cat([torch.as_tensor(loc, dtype=F64), torch.as_tensor(scale, dtype=F64).log()])


def blocks_of(columns: Columns, sizes: Sequence[int]) -> list[Block]:
    """Consecutive rows, ``sizes`` of them to a block."""
    pieces = {name: column.split(list(sizes)) for name, column in columns.items()}
    ids = torch.arange(sum(sizes)).split(list(sizes))
    return [Block(b, {name: piece[b] for name, piece in pieces.items()}, ids[b]) for b in range(len(sizes))]


def alone(tensor: Tensor) -> Tensor:
    return tensor


def elbo(inference: Inference, theta: Tensor, blocks: list[Block], seed: int = 0) -> ElboEstimate:
    """On one rank."""
    return full_elbo(inference, theta, Pass(blocks, len(blocks), seed, alone))


class _NotYetSummed(Exception):
    pass


def on_ranks(world_size: int, call: Callable[[int, Reduce], Any]) -> list[Any]:
    """``call(rank, reduce)`` of every rank, as if they ran together: each run goes one reduction further."""
    sums: list[Tensor] = []
    while True:
        given: list[Tensor] = []
        results = []
        for rank in range(world_size):
            done = iter(sums)

            def reduce(tensor: Tensor, done: Any = done, given: Any = given) -> Tensor:
                known = next(done, None)
                if known is None:
                    given.append(tensor)
                    raise _NotYetSummed
                return known

            try:
                results.append(call(rank, reduce))
            except _NotYetSummed:
                continue
        if not given:
            return results
        assert len(given) == world_size, "some rank makes fewer reductions than others"
        sums.append(torch.stack(given).sum(0))
