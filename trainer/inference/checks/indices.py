"""Indices out of range, seen before they are used: row by row, on any device, those that would wrap around included.

torch raises a bare IndexError on a CPU, ends the process on a GPU, and takes -1 for the last place.

Shapes: B rows of a batch, M entries of a column of varying length.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.inference.model.ragged import Column, Csr, Jagged, parts

_aten = torch.ops.aten
_BY_PLACE = (_aten.index, _aten.index_put, _aten.index_put_)
"""(table, [index or None of each dimension], ...): negative ones count from the end."""
_BY_DIMENSION = (
    _aten.index_select, _aten.gather, _aten.scatter, _aten.scatter_, _aten.scatter_add, _aten.scatter_add_,
    _aten.index_add, _aten.index_add_,
)  # fmt: skip
"""(table, dimension, index, ...)."""


@dataclass(frozen=True, eq=False)
class Lookup:
    """One use of an index with a value for each row, or for each entry of the rows."""

    size: int
    """Of the table: its places are 0 to size - 1."""
    index: Tensor
    """[B or M, ...]."""
    row: Tensor
    """int64 [B or M]: the row of each."""
    wraps: bool
    """Whether torch takes -1 for the last place here."""

    @property
    def low(self) -> int:
        """The smallest index that torch takes."""
        return -self.size if self.wraps else 0

    def outside(self, low: int) -> tuple[Tensor, Tensor]:
        """The rows [n] whose index is below ``low`` or beyond the table, and such an index of each [n]."""
        flat = self.index.reshape(len(self.row), -1)
        bad = (flat < low) | (flat >= self.size)
        where = bad.any(1).nonzero()[:, 0]
        return self.row[where], flat[where].gather(1, bad[where].int().argmax(1, keepdim=True))[:, 0]

    @property
    def is_of_rows(self) -> bool:
        """Whether it counts the rows themselves, as in ``logits[torch.arange(len(y)), y]``."""
        return self.index.numel() == len(self.row) and _equal(self.index, self.row)

    def column(self, columns: dict[str, Column]) -> str | None:
        """The name of the column that the index is; None where it is made from columns."""
        for name, column in columns.items():
            if any(each.numel() == self.index.numel() and _equal(each, self.index) for each in parts(column)):
                return name
        return None


class WatchIndices(TorchDispatchMode):
    """Notes each `Lookup` by rows of ``columns`` in ``found``, and takes 0 for what is out of range, so that the model
    is evaluated to its end.
    """

    def __init__(self, columns: dict[str, Column]):
        super().__init__()
        self.found: list[Lookup] = []
        self.rows = {len(c.values): c.row_of_entry for c in columns.values() if isinstance(c, Jagged)}
        self.rows |= {len(c): torch.arange(len(c), device=c.device) for c in columns.values()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet in _BY_PLACE:
            table, indices, *rest = args
            if not any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in indices):
                sizes = table.shape
                made = [each if each is None else self._noted(each, sizes[i], True) for i, each in enumerate(indices)]
                args = (table, made, *rest)
        elif packet in _BY_DIMENSION and args[0].dim():
            table, dim, index, *rest = args
            args = (table, dim, self._noted(index, table.shape[dim], False), *rest)
        elif packet is _aten.embedding:
            table, index, *rest = args
            args = (table, self._noted(index, table.shape[0], False), *rest)
        return func(*args, **(kwargs or {}))

    def _noted(self, index: Tensor, size: int, wraps: bool) -> Tensor:
        along = next((dim for dim, length in enumerate(index.shape) if length in self.rows), None)
        if along is None or not size:
            return index
        seen = Lookup(size, index.movedim(along, 0), self.rows[index.shape[along]], wraps)
        self.found.append(seen)
        return index.masked_fill((index < seen.low) | (index >= size), 0)


def always_fits(lookup: Lookup, column: Column | None) -> bool:
    """Whether no row can be out of range: what counts the rows, and the entries of sparse rows in a table as wide."""
    return lookup.is_of_rows or (isinstance(column, Csr) and column.width <= lookup.size)


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool((one.reshape(-1) == other.reshape(-1)).all())
