"""The second pass of packing: the order of all rows is cut into blocks and these into shards, each made by itself.

A unit is a row, or a group of rows. The units of one side of the split, by place, are cut every ``block_rows``, and
these blocks every ``shard_blocks``: what a shard holds depends on the rows alone. To make one, the cells in which its
units lie are loaded, a few at a time.

Shapes: B rows loaded, U units of them, T rows of the longest group.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.fields import Rows, concatenate
from trainer.data.packing.columns import Recipe
from trainer.data.packing.ingest import Table, Tally
from trainer.data.packing.running_moments import RunningMoments
from trainer.data.packing.runs import Runs
from trainer.data.packing.shuffle import CELLS, PLACE, in_order
from trainer.data.shards.index import ROW_ID, Column, Shard
from trainer.data.shards.tar import ShardWriter, member_name, npy_header, padding, tar_header

SIDES = ("train", "held_out")
_INDEX_BYTES = 40  # a row's share of the sort: its place, its position, and the copies that they need


@dataclass(frozen=True)
class Cut:
    """How the rows of ``runs`` become shards. ``units``: int64 [2 CELLS], of each cell; ``longest``: T, with groups."""

    table: Table
    tally: Tally
    runs: Runs
    units: np.ndarray
    longest: int | None
    load_bytes: int
    """How much is loaded at a time, where one cell is not more."""

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """Those of the shards, without statistics."""
        made = []
        for recipe in self.table.recipes:
            shape = recipe.shape if self.longest is None else (self.longest, *recipe.shape)
            made.append(Column(recipe.name, self._dtype(recipe), shape, recipe.vocabulary, None, recipe.kind))
        if self.longest is not None:
            made.append(Column("length", "int64"))
        return (*made, Column(ROW_ID, "int64"))

    def _dtype(self, recipe: Recipe) -> str:
        """As which a column is stored."""
        if recipe.name in self.table.standardize:
            return self.table.float_dtype or "float32"
        if not recipe.follows:
            return recipe.dtype
        wide = self.table.shifts is None and self.tally.moments[recipe.name].needs_float64
        return "float64" if wide else "float32"

    @cached_property
    def described(self) -> tuple[str, ...]:
        """The columns whose statistics are those of what the training shards hold."""
        numeric = [r.name for r in self.table.recipes if r.is_dense and (r.vocabulary is None)]
        return (
            *(name for name in numeric if name not in self.table.standardize),
            *(("length",) if self.longest is not None else ()),
        )

    @cached_property
    def shifts(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """What standardizing subtracts and divides by."""
        if self.table.shifts is not None:
            return {name: (np.array(each["mean"]), np.array(each["sd"])) for name, each in self.table.shifts.items()}
        return {name: self.tally.moments[name].shift() for name in self.table.standardize}

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """As which each column is stored."""
        return {column.name: column.dtype for column in self.columns}

    @cached_property
    def block_rows(self) -> int:
        """Of every block but the last: fewer where a block of as many would not fit a shard."""
        return min(self.table.block_rows, max(1, self.table.shard_bytes // self._bytes_of(1, False)))

    @cached_property
    def shard_blocks(self) -> int:
        """Blocks of every shard but the last."""
        return max(1, (self.table.shard_bytes - 1024) // self._bytes_of(self.block_rows, True))

    def _bytes_of(self, rows: int, with_headers: bool) -> int:
        """Of a block of ``rows`` rows."""
        packed, total = self.tally.training + self.tally.held_out, 0
        for column in self.columns:
            for part, of_entries in column.members:
                count = rows * self.tally.entries[column.name] // packed if of_entries else rows
                size = count * math.prod(part.shape) * np.dtype(part.dtype).itemsize
                if with_headers:
                    size += len(npy_header(part, rows))
                    size += padding(size) + len(tar_header(member_name(0, part.name), size))
                total += size
        return max(1, total)

    @cached_property
    def tasks(self) -> list[tuple[int, int]]:
        """The shards to make: side (0, or 1 for held out) and number."""
        rows = self.block_rows * self.shard_blocks
        return [(side, number) for side in (0, 1) for number in range(-(-int(self._starts(side)[-1]) // rows))]

    def _starts(self, side: int) -> np.ndarray:
        """int64 [CELLS + 1]: the number of each cell's first unit, on its side."""
        return np.concatenate([[0], np.cumsum(self.units[side * CELLS : (side + 1) * CELLS])])

    def make(
        self, side: int, number: int, folder: Path, tick: Callable[[int], None]
    ) -> tuple[Shard, dict[str, RunningMoments]]:
        """Writes one shard into ``folder``; also the moments of `described` where it is one of training rows."""
        first = number * self.block_rows * self.shard_blocks
        writer = ShardWriter(folder, self.columns, 1 << 62, number, number * self.shard_blocks)
        moments = {name: RunningMoments() for name in self.described} if side == 0 else {}
        try:
            for block in self._blocks(side, first, first + self.block_rows * self.shard_blocks, tick):
                writer.write(block)
                for name, each in moments.items():
                    each.add(self._real(name, block))
            return writer.close()[0], moments
        finally:
            writer.abort()

    def _real(self, name: str, block: Mapping[str, Any]) -> np.ndarray:
        """The values of a block without those that fill up groups."""
        values: np.ndarray = block[name]
        if self.longest is None or name == "length":
            return values
        real: np.ndarray = values[np.arange(self.longest) < block["length"][:, None]]
        return real

    def _blocks(self, side: int, first: int, stop: int, tick: Callable[[int], None]) -> Iterator[dict[str, Rows]]:
        """The units from ``first`` to ``stop`` of a side, in blocks."""
        carried: list[dict[str, Rows]] = []
        room = self.block_rows
        for loaded in self._loads(side, first, stop):
            start, count = 0, len(loaded)
            while start < count:
                taken = min(room, count - start)
                carried.append(loaded.take(start, start + taken))
                tick(loaded.rows(start, start + taken))
                start, room = start + taken, room - taken
                if not room:
                    yield _joined(carried)
                    carried, room = [], self.block_rows
        if carried:
            yield _joined(carried)

    def _loads(self, side: int, first: int, stop: int) -> "Iterator[_Units]":
        """The units from ``first`` to ``stop``, as many cells at a time as fit the memory."""
        starts = self._starts(side)
        stop = min(stop, int(starts[-1]))
        cell, end = (int(np.searchsorted(starts, at, "right")) - 1 for at in (first, stop - 1))
        for low, high in self.spans(side * CELLS + cell, side * CELLS + end + 1, self.table.row_bytes + _INDEX_BYTES):
            before = int(starts[low - side * CELLS])
            units = _Units(self, self.runs.load(low, high))
            yield units.part(max(0, first - before), min(len(units), stop - before))

    def spans(self, low: int, high: int, row_bytes: int) -> Iterator[tuple[int, int]]:
        """The cells from ``low`` to ``high`` in ranges whose rows fit the memory."""
        ends = np.cumsum(self.runs.counts[low:high]) * row_bytes
        while low < high:
            before = 0 if low == high - len(ends) else int(ends[low - (high - len(ends)) - 1])
            next_low = high - len(ends) + int(np.searchsorted(ends, before + self.load_bytes, "right"))
            next_low = min(high, max(low + 1, next_low))
            yield low, next_low
            low = next_low


class _Units:
    """Loaded rows in the order of their places."""

    def __init__(self, cut: Cut, rows: dict[str, Any]):
        self._cut, self._rows = cut, rows
        places = rows.pop(PLACE)
        self._order = in_order(places, rows[ROW_ID])
        self._starts = np.arange(len(places))
        if cut.longest is not None:
            self._starts = first_of_groups(places.take(self._order))
        self._sizes = np.diff(self._starts, append=len(places))

    def __len__(self) -> int:
        return len(self._starts)

    def part(self, first: int, stop: int) -> "_Units":
        """Some of the units, in place."""
        self._starts, self._sizes = self._starts[first:stop], self._sizes[first:stop]
        return self

    def rows(self, first: int, stop: int) -> int:
        """How many source rows units have."""
        return int(self._sizes[first:stop].sum())

    def take(self, first: int, stop: int) -> dict[str, Rows]:
        """Units as the shards hold them."""
        starts, sizes, longest = self._starts[first:stop], self._sizes[first:stop], self._cut.longest
        places = starts
        if longest is not None:
            places = starts[:, None] + np.minimum(np.arange(longest), sizes[:, None] - 1)
        rows = self._order.take(places)
        block: dict[str, Rows] = {}
        for recipe in self._cut.table.recipes:
            values, dtype = self._rows[recipe.name], self._cut.dtypes[recipe.name]
            if recipe.name in self._cut.shifts:
                mean, sd = self._cut.shifts[recipe.name]
                block[recipe.name] = ((values.take(rows, axis=0) - mean) / sd).astype(dtype)
            elif recipe.is_dense:
                block[recipe.name] = values.take(rows, axis=0).astype(dtype, copy=False)
            else:
                chosen = values[rows]
                block[recipe.name] = replace(chosen, values=chosen.values.astype(dtype, copy=False))
        if longest is not None:
            rows, block["length"] = rows[:, 0], sizes
        block[ROW_ID] = self._rows[ROW_ID].take(rows)
        return block


def first_of_groups(places: np.ndarray) -> np.ndarray:
    """Where each group begins among sorted ``places``."""
    return np.flatnonzero(np.concatenate([np.ones(min(1, len(places)), bool), places[1:] != places[:-1]]))


def _joined(parts: Sequence[dict[str, Rows]]) -> dict[str, Rows]:
    if len(parts) == 1:
        return parts[0]
    return {name: concatenate([part[name] for part in parts]) for name in parts[0]}
