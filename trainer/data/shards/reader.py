"""Reading: from the plan's runs to arrays.

Rows are copied straight out of a map of the file into the chunk (a map gives 12.9 GB/s where `pread` gives 6.2 from the
same page cache).

Shapes: K steps of a chunk, A lane groups of this rank, B rows of a group (padding included).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np

from trainer.data.fields import Rows, VaryingRows
from trainer.data.plan import Pieces, Plan
from trainer.data.shards.folder import ShardFolder
from trainer.data.shards.gather import gather
from trainer.data.shards.index import ROW_ID, Column
from trainer.data.shards.ragged import Slots, entries_of, rows_of
from trainer.data.shards.read_thread import ReadThread
from trainer.data.shards.tar import payload_bytes
from trainer.errors import UserError, counted

_RING = 3  # one in use, one that Lightning's loop holds ahead of it, one that is read
_LINE = 64  # bytes; copies to an address that is not a multiple of it took up to 1.7 x as long


class ChunkArrays(NamedTuple):
    """K steps of this rank's rows."""

    columns: dict[str, Rows]
    """Each [K, A, B, ...]; rows past `valid` repeat a real row.

    Of a csr or ragged column: its arrays [K, A, M, ...] with offsets [K, A, B + 1]. M depends on the plan and the index
    alone; entries past a slot's last are 0 at index 0, or repeat the slot's first (ragged).
    """
    valid: np.ndarray
    """int64 [K, A]."""
    batch_rows: np.ndarray
    """int64 [K]: rows of the global batch, over all ranks."""
    row_id: np.ndarray | None
    """int64 [K, A, B]."""


class Reader:
    """Chunks of the lanes of this rank: ``groups`` lists the lanes of each draw's group, all of the same number.

    ``floats``: deliver floats, and the values of csr columns, as this type, truth values as bool and everything else
    as int64; None: as they are stored. The memory of `chunks` is that of three chunks, as stored and as delivered: 3
    `step_bytes` a step.
    """

    def __init__(
        self,
        folder: ShardFolder,
        plan: Plan,
        columns: Sequence[str],
        groups: Sequence[Sequence[int]],
        with_row_id: bool = False,
        floats: np.dtype | None = None,
    ):
        self.folder, self.plan, self.groups, self.with_row_id = folder, plan, groups, with_row_id
        self.columns = [folder.index.column(name) for name in (*columns, *([ROW_ID] if with_row_id else []))]
        self.dtypes = {
            part.name: _delivered(part, floats, column.kind) for column in self.columns for part, _ in column.members
        }
        self.capacity = len(groups[0]) * plan.capacity
        self.entries = {
            column.name: folder.most_entries(plan, column.name, len(groups[0]))
            for column in self.columns
            if column.kind != "dense"
        }
        """M of each csr and ragged column."""
        self._values_at = {part.name: folder.values_at(part) for column in self.columns for part, _ in column.members}
        self._used, self._chunks = np.full(len(folder.block_rows), -2), 0
        self._ring: Iterator[dict[str, np.ndarray]] = cycle([{} for _ in range(_RING)])
        self._thread = ReadThread(folder.timeout, folder.reading)

    @property
    def step_bytes(self) -> int:
        """What a step takes in memory: its values as they are stored, and again where they are delivered otherwise."""
        rows, total = len(self.groups) * self.capacity, 0
        for column in self.columns:
            for part, of_entries in column.members:
                types = {_stored(part), self.dtypes[part.name]}
                if part.name.endswith(".ends"):
                    types = {np.dtype("<i4"), np.dtype("<i8")}  # the latter of the offsets
                values = len(self.groups) * self.entries[column.name] if of_entries else rows
                total += values * math.prod(part.shape) * sum(each.itemsize for each in types)
        return total

    def most_steps(self, memory: int, unit: int = 1) -> int:
        """The steps of a chunk, a multiple of ``unit``, so that all chunks stay within ``memory`` bytes.

        Raises UserError where there is no room for ``unit`` steps.
        """
        needed = _RING * unit * self.step_bytes
        if needed > memory:
            raise UserError(
                f"the rows of {counted(unit, 'step')} take {needed // _RING:,} bytes on a rank, {_RING} times over "
                f"since it reads ahead, where data.memory={memory}: give data.memory={needed}, a smaller batch_size=, "
                "or more ranks."
            )
        return memory // needed * unit

    def chunk(self, first: int, steps: int, into: dict[str, np.ndarray] | None = None) -> ChunkArrays:
        """The rows of global steps ``first`` to ``first + steps``, in memory of their own or in that of ``into``."""
        shape = (steps, len(self.groups), self.capacity)
        lane_rows = self.plan.rows_at(np.arange(first, first + steps))
        valid = np.stack([lane_rows[:, lanes].sum(-1) for lanes in self.groups], axis=1)
        runs, place = self._places(first, steps, valid.ravel())
        self._make_ready(runs.block)
        memory = {} if into is None else into
        slots = Slots(math.prod(shape[:2]), self.capacity, runs, place, self._padded(valid.ravel()))
        dense = [column for column in self.columns if column.kind == "dense"]
        stored = [_room(memory, column, math.prod(shape), _stored(column)) for column in dense]
        self._gather(dense, stored, runs, place)
        if self.with_row_id:
            _shift(stored[-1], runs.rows, place, self.folder.first_ids[runs.block])
        self._pad(dense, stored, valid.ravel(), *slots.padded)
        found: dict[str, Any] = {}
        for column, array in zip(dense, stored):
            found[column.name] = self._deliver(memory, column, array).reshape(*shape, *column.shape)
        for column in self.columns:
            if column.kind != "dense":
                found[column.name] = self._varying(memory, column, slots, shape[:2])
        row_id = found.pop(ROW_ID) if self.with_row_id else None
        return ChunkArrays(found, valid, lane_rows.sum(-1), row_id)

    def chunks(self, spans: Iterable[tuple[int, int]]) -> Iterator[ChunkArrays]:
        """The chunk of each (first step, steps), the next one read while the caller uses this one.

        A chunk's memory is used again: it holds until the second chunk after it is asked for.
        """
        return self._thread.ahead(partial(self.chunk, first, steps, next(self._ring)) for first, steps in spans)

    def close(self) -> None:
        """Ends the thread; what it was reading is dropped."""
        self._thread.close()

    def _places(self, first: int, steps: int, valid: np.ndarray) -> tuple[Pieces, np.ndarray]:
        """The runs of all lanes, and the row of the chunk at which each begins, int64 [runs]; ``valid`` [K A]."""
        order = [(a, lane) for a, lanes in enumerate(self.groups) for lane in lanes]
        steps_of, pieces = zip(*(self.plan.pieces_of(first, steps, lane) for _, lane in order))
        slot = (np.concatenate(steps_of) - first) * len(self.groups)
        slot += np.repeat([a for a, _ in order], [len(each) for each in steps_of])
        by_slot = np.argsort(slot, kind="stable")  # lanes stay in their order
        slot, runs = slot[by_slot], Pieces(*(np.concatenate(column)[by_slot] for column in zip(*pieces)))
        skipped = np.arange(len(valid)) * self.capacity - np.cumsum(valid) + valid
        return runs, np.cumsum(runs.rows) - runs.rows + skipped[slot]

    def _make_ready(self, blocks: np.ndarray) -> None:
        """Readies those of ``blocks`` that the chunk before did not use."""
        new = blocks[self._used[blocks] < self._chunks - 1]
        self._used[blocks] = self._chunks
        self._chunks += 1
        new = np.unique(new)
        for i, block in enumerate(new.tolist()):
            self.folder.want(new[i:])
            for column in self.columns:
                self.folder.make_ready(block, column.name)

    def _gather(self, parts: list[Column], targets: list[np.ndarray], runs: Pieces, place: np.ndarray) -> None:
        """Copies runs to the rows of ``targets`` at which they begin, from a bounded number of maps at a time.

        A member of entries takes runs of entries.
        """
        shard = self.folder.shard_of[runs.block]
        numbers = np.flatnonzero(np.bincount(shard))
        if len(numbers) > self.folder.open_at_once:
            for half in (slice(None, len(place) // 2), slice(len(place) // 2, None)):
                self._gather(parts, targets, Pieces(*(column[half] for column in runs)), place[half])
            return
        maps = [np.frombuffer(self.folder.map_of(s), np.uint8) for s in numbers.tolist()]
        self.folder.note(numbers.tolist())
        address = np.zeros(len(self.folder.index.shards), dtype=np.int64)
        address[numbers] = [each.ctypes.data for each in maps]
        for part, target in zip(parts, targets):
            first = self._values_at[part.name][runs.block] + runs.first * payload_bytes(part, 1)
            gather(address[shard] + first, runs.rows, place, target)

    def _padded(self, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The slot and the row of the chunk of each row past ``valid`` [K A]."""
        missing = self.capacity - valid
        slot = np.repeat(np.arange(len(valid)), missing)
        ends = (np.arange(len(valid)) + 1) * self.capacity - np.cumsum(missing)
        return slot, np.arange(len(slot)) + np.repeat(ends, missing)

    def _pad(
        self, columns: list[Column], targets: list[np.ndarray], valid: np.ndarray, slot: np.ndarray, row: np.ndarray
    ) -> None:
        """Fills every slot up: with its first row again, or the first of all where it has none; ``valid`` [K A]."""
        for column, target in zip(columns, targets) if len(row) else ():
            target[row] = target[slot * self.capacity]
            if not valid.all():
                target[row[valid[slot] == 0]] = self.folder.read_block(0, column.name)[0]

    def _varying(
        self, memory: dict[str, np.ndarray], column: Column, slots: Slots, shape: tuple[int, ...]
    ) -> VaryingRows:
        """A csr or ragged column of the chunk."""

        def room(part: Column, count: int) -> np.ndarray:
            return _room(memory, part, count, _stored(part))

        spare = self.folder.read_block(0, column.name)[:1] if len(slots.padded[0]) else None
        try:
            offsets, stored = entries_of(column, slots, self.entries[column.name], self._gather, room, spare)
        except ValueError as error:
            raise UserError(
                f'the index of {self.folder.place} is wrong on column "{column.name}" ({error}): pack the table again.'
            ) from None
        parts = [part for part, of_entries in column.members if of_entries]
        arrays = [
            self._deliver(memory, part, each).reshape(*shape, -1, *part.shape) for part, each in zip(parts, stored)
        ]
        return rows_of(column, offsets.reshape(*shape, -1), arrays)

    def _deliver(self, memory: dict[str, np.ndarray], part: Column, array: np.ndarray) -> np.ndarray:
        """``array`` as the type in which it is asked for."""
        delivered = _room(memory, part, len(array), self.dtypes[part.name])
        if delivered.dtype != array.dtype:
            np.copyto(delivered, array, casting="unsafe")
        return delivered


def _shift(ids: np.ndarray, rows: np.ndarray, place: np.ndarray, first: np.ndarray) -> None:
    """Adds ``first[i]`` to ``rows[i]`` row ids from ``place[i]`` on; int64 [runs] each."""
    if first.any():
        ends = np.cumsum(rows)
        ids[np.arange(ends[-1]) + np.repeat(place - (ends - rows), rows)] += np.repeat(first, rows)


def _stored(column: Column) -> np.dtype:
    return np.dtype(column.dtype).newbyteorder("<")


def _delivered(part: Column, floats: np.dtype | None, kind: str) -> np.dtype:
    stored = _stored(part)
    if floats is None or stored.kind == "b":
        return stored
    is_float = stored.kind == "f" or (kind == "csr" and part.name.endswith(".values"))
    return np.dtype(floats) if is_float else np.dtype(np.int64)


def _room(memory: dict[str, np.ndarray], column: Column, rows: int, dtype: np.dtype) -> np.ndarray:
    """The first ``rows`` of the array of a column, which is made or grown, and begins on a cache line."""
    name = f"{column.name} {dtype}"
    if name not in memory or len(memory[name]) < rows:
        count = rows * math.prod(column.shape) * dtype.itemsize
        room = np.empty(count + _LINE, dtype=np.uint8)
        start = -room.ctypes.data % _LINE
        memory[name] = room[start : start + count].view(dtype).reshape(rows, *column.shape)
    return memory[name][:rows]
