"""A pass over all rows: the blocks that this rank reads, and the sum over the ranks of what it makes of them."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

from trainer.inference.model.plates import Batch
from trainer.inference.model.ragged import Column


class Block(NamedTuple):
    """One block of rows: its ``number`` names its noise."""

    number: int
    columns: dict[str, Column]
    """Each [B, ...]."""
    row_id: Tensor
    """int64 [B]."""

    @property
    def batch(self) -> Batch:
        """All of its rows, at scale 1."""
        return Batch.whole(self.columns, self.row_id)


Reduce = Callable[[Tensor], Tensor]


class Pass(NamedTuple):
    """Once over all rows."""

    blocks: Iterable[Block]
    """This rank's."""
    num_blocks: int
    """Of all ranks."""
    seed: int
    """Names the draws."""
    reduce: Reduce
    """The sum over the ranks."""
