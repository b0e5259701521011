"""Rows of varying numbers of entries as tensors of fixed shapes: what a model receives of a sparse or ragged column.

They index, slice and stack along their first axis as a tensor of rows does, so whatever handles columns handles them.
A model uses the entries themselves, or densifies them on the device.

Shapes: B rows, M entries that there is room for, of which the first `offsets[-1]` are used, D the width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from trainer.errors import UserError

V = TypeVar("V", bound="Jagged")


def _of_values(name: str) -> Callable[..., Tensor]:
    """A method of the values': new tensors of their type, on their device."""
    return lambda self, *args, **options: getattr(self.values, name)(*args, **options)


@dataclass(frozen=True, eq=False)
class Jagged:
    """Row i has the entries from ``offsets[i]`` to ``offsets[i + 1]``."""

    offsets: Tensor
    """int64 [B + 1], from 0."""
    values: Tensor
    """[M, ...]."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of them, by name."""
        named = ((each.name, getattr(self, each.name)) for each in fields(self))
        return {name: value for name, value in named if isinstance(value, Tensor)}

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.tensors.values())

    @property
    def lengths(self) -> Tensor:
        """int64 [B]: the entries of each row."""
        return self.offsets[..., 1:] - self.offsets[..., :-1]

    @property
    def row_of_entry(self) -> Tensor:
        """int64 [M]: the row of each entry, B for entries that are not used."""
        ends = self.offsets[1:]  # counting those that have passed takes a quarter of the time of searching among them
        passed = ends.new_zeros(self.values.shape[0] + 1).index_add(0, ends, torch.ones_like(ends))
        return passed[:-1].cumsum(0)

    def spread(self, rows: Tensor) -> Tensor:
        """To each entry [M, ...] its row's of ``rows`` [B, ...], the last row's where it is not used."""
        return rows[self.row_of_entry.clamp(max=len(self) - 1)]

    def total(self, entries: Tensor) -> Tensor:
        """The sum [B, ...] of ``entries`` [M, ...] over those of each row."""
        sums = entries.new_zeros(len(self) + 1, *entries.shape[1:])
        return sums.index_add(0, self.row_of_entry, entries)[:-1]

    new_zeros, new_ones, new_full, new_tensor = map(_of_values, ("new_zeros", "new_ones", "new_full", "new_tensor"))

    def is_floating_point(self) -> bool:
        return self.values.is_floating_point()

    def map(self: V, change: Callable[[Tensor], Tensor]) -> V:
        """Every tensor changed."""
        return replace(self, **{name: change(each) for name, each in self.tensors.items()})

    def to(self: V, *args: Any, **options: Any) -> V:
        """On another device, or with floats of another type."""
        dtypes = [each for each in (*args, *options.values()) if isinstance(each, torch.dtype)]
        if not dtypes:
            return self.map(lambda each: each.to(*args, **options))
        return self.map(lambda each: each.to(*args, **options) if each.is_floating_point() else each)

    def double(self: V) -> V:
        return self.to(torch.float64)

    def cpu(self: V) -> V:
        return self.map(Tensor.cpu)

    def clone(self: V) -> V:
        return self.map(Tensor.clone)

    def __len__(self) -> int:
        stacked = self.offsets.dim() > 1
        return self.offsets.shape[0] - (not stacked)

    def __getitem__(self: V, at: Any) -> V:
        """Along the first axis: of a stack its parts, else rows at a slice, a mask or places (never while traced)."""
        if at is None or self.offsets.dim() > 1:
            return self.map(lambda each: each[at])
        chosen = torch.arange(len(self), device=self.device)[at]
        lengths, starts = self.lengths[chosen], self.offsets[:-1][chosen]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        entries = torch.arange(int(offsets[-1]), device=self.device)
        entries = entries + torch.repeat_interleave(starts - offsets[:-1], lengths)
        taken = {name: each[entries] for name, each in self.tensors.items() if name != "offsets"}
        return replace(self, offsets=offsets, **taken)

    def padded(self: V, most: int) -> V:
        """With room for ``most`` entries."""
        unused = most - len(self.values)
        grown = {
            name: torch.cat([each, each.new_zeros(unused, *each.shape[1:])])
            for name, each in self.tensors.items()
            if name != "offsets"
        }
        return replace(self, **grown)


@dataclass(frozen=True, eq=False)
class Csr(Jagged):
    """Sparse rows: entry e is ``values[e]`` at ``indices[e]``, and those of a row at one index add up.

    ``x @ w``, ``len(x)``, ``x.shape``, ``x.dtype`` and ``x.new_zeros`` are those of the dense rows: a model that needs
    no more takes either.
    """

    indices: Tensor
    """int64 [M], from 0 to D - 1; 0 with value 0 where an entry is not used."""
    width: int
    """D."""

    @property
    def shape(self) -> tuple[int, int]:
        """(B, D)."""
        return len(self), self.width

    def dense(self) -> Tensor:
        """[B, D]."""
        room = self.values.new_zeros(len(self) + 1, self.width)
        return room.index_put((self.row_of_entry, self.indices), self.values, accumulate=True)[:-1]

    def __matmul__(self, weight: Tensor) -> Tensor:
        """[B, ...] for ``weight`` [D, ...]: the dense rows times it, at the cost of the entries alone."""
        values = self.values.reshape(-1, *(1,) * (weight.dim() - 1))
        return self.total(values * weight[self.indices])

    def _elementwise(self, other: Any) -> Any:
        raise UserError(
            "a sparse column has no arithmetic value by value: use x @ w, or x.dense(), which has every zero of its "
            f"{self.width:,} columns."
        )

    __mul__ = __rmul__ = __add__ = __radd__ = __sub__ = __rsub__ = __truediv__ = __rtruediv__ = __pow__ = _elementwise


@dataclass(frozen=True, eq=False)
class Ragged(Jagged):
    """Rows of lists: ``values`` [M, ...] one after another."""


Column: TypeAlias = Any
"""Tensor | Csr | Ragged."""


def each_tensor(column: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A column with its tensors changed."""
    return column.map(change) if isinstance(column, Jagged) else change(column)


def parts(column: Column) -> tuple[Tensor, ...]:
    """The tensors of a column, in a row."""
    return tuple(column.tensors.values()) if isinstance(column, Jagged) else (column,)


def maker(column: Column) -> tuple[int, Callable[..., Any]]:
    """How many `parts` a column has, and what makes one like it of them."""
    if isinstance(column, Csr):
        return 3, partial(_csr, column.width)
    return (2, Ragged) if isinstance(column, Ragged) else (1, _itself)


def _csr(width: int, offsets: Tensor, values: Tensor, indices: Tensor) -> Csr:
    return Csr(offsets, values, indices, width)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def cat(columns: Sequence[Any]) -> Any:
    """Columns one after another along the first axis."""
    first = columns[0]
    if not isinstance(first, Jagged):
        return torch.cat(list(columns))
    if first.offsets.dim() > 1:
        joined = {name: torch.cat([each.tensors[name] for each in columns]) for name in first.tensors}
        return replace(first, **joined)
    used = [each[:] for each in columns]
    starts = torch.tensor([0, *(len(each.values) for each in used)], device=first.device).cumsum(0).tolist()
    offsets = [each.offsets[:-1] + start for each, start in zip(used, starts)]
    joined = {name: torch.cat([each.tensors[name] for each in used]) for name in first.tensors if name != "offsets"}
    return replace(first, offsets=torch.cat([*offsets, first.offsets.new_tensor(starts[-1:])]), **joined)


def rolled(column: Any) -> Any:
    """The rows of a stack [K, A, B, ...], each slot's last one first."""
    if not isinstance(column, Jagged):
        return column.roll(1, dims=2)
    most = column.values.shape[2]

    def turned(group: Any) -> Any:
        return group[torch.arange(len(group)).roll(1)].padded(most)[None]

    slots = [[turned(slot[a]) for a in range(len(slot))] for slot in (column[k] for k in range(len(column)))]
    return cat([cat(groups)[None] for groups in slots])


def plain(column: Column) -> Any:
    """As tensors and numbers alone, for a file."""
    if not isinstance(column, Jagged):
        return column
    width = {"width": column.width} if isinstance(column, Csr) else {}
    return {**column.tensors, **width}


def of_plain(stored: Any) -> Column:
    """What `plain` was made of."""
    if isinstance(stored, Tensor):
        return stored
    return Csr(**stored) if "width" in stored else Ragged(**stored)
