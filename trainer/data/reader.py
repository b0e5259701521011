"""Reading: from the plan's runs to arrays. Every member is compared with the index before a row of it is used.

A block is read and hashed once per process; its rows are copied straight out of a map of the file into the chunk (a map
gives 12.9 GB/s where `pread` gives 6.2 from the same page cache). Nothing is parsed and nothing unpickled: a member's
two headers are known to the byte. Sizes are compared when a folder is opened; a shard that is truncated while a run
uses it ends the run with SIGBUS.

Shapes: K steps of a chunk, A lane groups of this rank, B rows of a group (padding included).
"""

import math
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from trainer.data.gather import gather
from trainer.data.index import INDEX_NAME, ROW_ID, Column, Shard, read_index
from trainer.data.plan import Pieces, Plan
from trainer.data.shards import RECORD, member_name, npy_header, padding, payload_bytes, tar_header
from trainer.errors import UserError

_RING = 3  # one in use, one that Lightning's loop holds ahead of it, one that is read
_LINE = 64  # bytes; copies to an address that is no multiple of it took up to 1.7 x as long
_OPEN_FILES = 64  # a process may open 1,024, and a folder may have more shards


class ShardFolder:
    """One split's shards. Raises UserError for a missing shard or one of the wrong size (not with ``check=False``)."""

    def __init__(self, path: Path, check: bool = True):
        self.path, self.index = path, read_index(path)
        self._file = lru_cache(maxsize=_OPEN_FILES)(_File)
        self._map = lru_cache(maxsize=_OPEN_FILES)(_map)
        self._checked: set[tuple[int, str]] = set()
        self._shard_of = [(s, b) for s, shard in enumerate(self.index.shards) for b in range(len(shard.rows))]
        self._block_names = np.cumsum([0, *(len(shard.rows) for shard in self.index.shards)])
        for shard in self.index.shards if check else ():
            self.check_size(shard)

    @property
    def num_rows(self) -> int:
        """N of this split."""
        return self.index.num_rows

    @cached_property
    def block_rows(self) -> np.ndarray:
        """int64 [blocks]."""
        return self.index.block_rows

    @cached_property
    def shard_of(self) -> np.ndarray:
        """int64 [blocks]."""
        return np.array([s for s, _ in self._shard_of])

    @cached_property
    def _exceeds_memory(self) -> bool:
        """Whether the system may not keep all of the split in its page cache."""
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return 2 * sum(shard.bytes for shard in self.index.shards) > memory

    def check_size(self, shard: Shard) -> None:
        """Raises UserError where the file of ``shard`` is missing or has not the bytes that the index says."""
        file = self.path / shard.name
        with _reading(file):
            size = file.stat().st_size
        if size != shard.bytes:
            raise UserError(
                f"shard {file} has {size:,} bytes where the index says {shard.bytes:,}: "
                "copy it again, or pack the table again."
            )

    def read_block(self, block: int, name: str) -> np.ndarray:
        """The values [rows, ...] of a column in a block. Raises UserError naming shard and block."""
        s, b = self._shard_of[block]
        shard, column = self.index.shards[s], self.index.column(name)
        header, size = self._headers(column, s, b)
        data = payload_bytes(column, shard.rows[b])
        member: Any = np.empty(len(header) + data + padding(size), dtype=np.uint8)
        with _reading(self.path / shard.name):
            file = self._file(self.path / shard.name)
            count = os.preadv(file.number, [member], shard.offsets[name][b])
        if count != len(member):
            raise self._damaged(s, b, name, "ends too early")
        if (block, name) not in self._checked:
            if member[: len(header)].tobytes() != header:
                raise self._damaged(s, b, name, "has a header that is not what the index says")
            if xxhash.xxh3_64_hexdigest(member) != shard.xxh3[name][b]:
                raise self._damaged(s, b, name, "does not match its hash")
            self._checked.add((block, name))
        values = member[len(header) : len(header) + data].view(np.dtype(column.dtype).newbyteorder("<"))
        return values.reshape(shard.rows[b], *column.shape)

    def map_of(self, s: int) -> mmap.mmap:
        """Shard ``s`` in memory. What it shows was compared with the index only where `make_ready` was called."""
        file = self.path / self.index.shards[s].name
        with _reading(file):
            return self._map(file)

    def make_ready(self, block: int, name: str) -> None:
        """Compares a column of a block with the index, once; later has the system read it in one go, not page by page.

        The latter only where the split may not stay in memory: for pages that are there it costs a tenth of a copy.
        """
        if (block, name) not in self._checked:
            self.read_block(block, name)
        elif self._exceeds_memory:
            s, b = self._shard_of[block]
            shard, column = self.index.shards[s], self.index.column(name)
            start = shard.offsets[name][b]
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            size = len(self._headers(column, s, b)[0]) + payload_bytes(column, shard.rows[b])
            self.map_of(s).madvise(mmap.MADV_WILLNEED, page, start + size - page)

    def values_at(self, column: Column) -> np.ndarray:
        """int64 [blocks]: the byte of its shard at which the values of a column begin, for each block."""
        before = {rows: RECORD + len(npy_header(column, rows)) for rows in set(self.block_rows.tolist())}
        places = [place for shard in self.index.shards for place in shard.offsets[column.name]]
        return np.array(places) + [before[rows] for rows in self.block_rows.tolist()]

    def _headers(self, column: Column, s: int, b: int) -> tuple[bytes, int]:
        """The bytes before the values of a member, and the size that its tar header gives."""
        rows = self.index.shards[s].rows[b]
        npy = npy_header(column, rows)
        size = len(npy) + payload_bytes(column, rows)
        return tar_header(member_name(int(self._block_names[s]) + b, column.name), size) + npy, size

    def _damaged(self, s: int, b: int, name: str, how: str) -> UserError:
        shard = self.index.shards[s]
        return UserError(
            f'shard {self.path / shard.name}, block {self._block_names[s] + b}, column "{name}" {how}: '
            "copy the shard again, or pack the table again."
        )


class _File:
    """A file open for reading, closed with the last reference: another thread may still read what a cache drops."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def _map(path: Path) -> mmap.mmap:
    """A file in memory, unmapped with the last view of a part of it."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """The system's errors as UserErrors that name the shard."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"shard {file} is missing: copy it back, or pack the table again.") from None
    except OSError as error:
        raise UserError(f"shard {file} cannot be read ({error.strerror}): copy it again, or mend the disk.") from None


def open_split(path: Path, split: str) -> ShardFolder | None:
    """The ``split`` ("train" or "held_out") of a folder that `svi shard` made, or of a split's own folder; else None.

    Raises UserError where ``path`` is no shard folder at all, or its ``split`` has lost its index.
    """
    if (path / split).is_dir():
        return ShardFolder(path / split)
    if (path / INDEX_NAME).is_file():
        folder = ShardFolder(path)
        # A split's own folder, given by itself, is what is asked for: to train on, or (in `train`) nothing held out.
        return folder if split == "train" or folder.index.split == split else None
    if not (path / "train" / INDEX_NAME).is_file():
        raise UserError(f"{path} is no shard folder (it holds no {INDEX_NAME}): svi shard source=TABLE out={path}")
    return None


class ChunkArrays(NamedTuple):
    """K steps of this rank's rows."""

    columns: dict[str, np.ndarray]
    """Each [K, A, B, ...]; rows past `valid` repeat a real row."""
    valid: np.ndarray
    """int64 [K, A]."""
    batch_rows: np.ndarray
    """int64 [K]: rows of the global batch, over all ranks."""
    row_id: np.ndarray | None
    """int64 [K, A, B]."""


class Reader:
    """Chunks of the lanes of this rank: ``groups`` lists the lanes of each draw's group, all of the same number.

    ``floats``: deliver floats as this type and everything else as int64; None: as they are stored.
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
        self.dtypes = {column.name: _delivered(column, floats) for column in self.columns}
        self.capacity = len(groups[0]) * plan.capacity
        self._values_at = [folder.values_at(column) for column in self.columns]
        self._used, self._chunks = np.full(len(folder.block_rows), -2), 0
        self._ring: Iterator[dict[str, np.ndarray]] = cycle([{} for _ in range(_RING)])
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reader")

    def chunk(self, first: int, steps: int, into: dict[str, np.ndarray] | None = None) -> ChunkArrays:
        """The rows of global steps ``first`` to ``first + steps``, in memory of their own or in that of ``into``."""
        shape = (steps, len(self.groups), self.capacity)
        lane_rows = self.plan.rows_at(np.arange(first, first + steps))
        valid = np.stack([lane_rows[:, lanes].sum(-1) for lanes in self.groups], axis=1)
        runs, place = self._places(first, steps, valid.ravel())
        self._make_ready(runs.block)
        memory = {} if into is None else into
        stored = [_room(memory, c, math.prod(shape), _stored(c)) for c in self.columns]
        self._gather(stored, runs, place)
        self._pad(stored, valid.ravel())
        found = {}
        for column, array in zip(self.columns, stored):
            delivered = _room(memory, column, len(array), self.dtypes[column.name])
            if delivered.dtype != array.dtype:
                np.copyto(delivered, array, casting="unsafe")
            found[column.name] = delivered.reshape(*shape, *column.shape)
        row_id = found.pop(ROW_ID) if self.with_row_id else None
        return ChunkArrays(found, valid, lane_rows.sum(-1), row_id)

    def chunks(self, spans: Iterable[tuple[int, int]]) -> Iterator[ChunkArrays]:
        """The chunk of each (first step, steps), the next one read while the caller uses this one.

        A chunk's memory is used again: it holds until the second chunk after it is asked for.
        """
        ahead = None
        for first, steps in spans:
            coming = self._thread.submit(self.chunk, first, steps, next(self._ring))
            if ahead is not None:
                yield ahead.result()
            ahead = coming
        if ahead is not None:
            yield ahead.result()

    def close(self) -> None:
        """Ends the thread; what it was reading is dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)

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
        for block in np.unique(new).tolist() if len(new) else ():
            for column in self.columns:
                self.folder.make_ready(block, column.name)

    def _gather(self, targets: list[np.ndarray], runs: Pieces, place: np.ndarray) -> None:
        """Copies runs to the rows of ``targets`` at which they begin, from a bounded number of maps at a time."""
        shard = self.folder.shard_of[runs.block]
        numbers = np.flatnonzero(np.bincount(shard))
        if len(numbers) > _OPEN_FILES:
            for half in (slice(None, len(place) // 2), slice(len(place) // 2, None)):
                self._gather(targets, Pieces(*(column[half] for column in runs)), place[half])
            return
        maps = [np.frombuffer(self.folder.map_of(s), np.uint8) for s in numbers.tolist()]
        address = np.zeros(len(self.folder.index.shards), dtype=np.int64)
        address[numbers] = [each.ctypes.data for each in maps]
        for column, target, values_at in zip(self.columns, targets, self._values_at):
            first = values_at[runs.block] + runs.first * payload_bytes(column, 1)
            gather(address[shard] + first, runs.rows, place, target)

    def _pad(self, targets: list[np.ndarray], valid: np.ndarray) -> None:
        """Fills every slot up: with its first row again, or the first of all where it has none; ``valid`` [K A]."""
        missing = self.capacity - valid
        if not missing.any():
            return
        slot = np.repeat(np.arange(len(valid)), missing)
        row = np.arange(len(slot)) + np.repeat(
            (np.arange(len(valid)) + 1) * self.capacity - np.cumsum(missing), missing
        )
        for column, target in zip(self.columns, targets):
            target[row] = target[slot * self.capacity]
            if not valid.all():
                target[row[valid[slot] == 0]] = self.folder.read_block(0, column.name)[0]


def _stored(column: Column) -> np.dtype:
    return np.dtype(column.dtype).newbyteorder("<")


def _delivered(column: Column, floats: np.dtype | None) -> np.dtype:
    stored = _stored(column)
    if floats is None:
        return stored
    return np.dtype(floats) if stored.kind == "f" else np.dtype(np.int64)


def _room(memory: dict[str, np.ndarray], column: Column, rows: int, dtype: np.dtype) -> np.ndarray:
    """The first ``rows`` of the array of a column, which is made or grown, and begins on a cache line."""
    name = f"{column.name} {dtype}"
    if name not in memory or len(memory[name]) < rows:
        count = rows * math.prod(column.shape) * dtype.itemsize
        room = np.empty(count + _LINE, dtype=np.uint8)
        start = -room.ctypes.data % _LINE
        memory[name] = room[start : start + count].view(dtype).reshape(rows, *column.shape)
    return memory[name][:rows]
