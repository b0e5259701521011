"""Reading: from the plan's runs to arrays. Every member is compared with the index before a row of it is used.

A block is read and hashed once per process; afterwards its rows are copied straight out of a map of the file into the
chunk (a map gives 12.9 GB/s where `pread` gives 6.2 from the same page cache). Nothing is parsed and nothing unpickled:
a member's two headers are known to the byte. A shard that is truncated while a run uses it ends the run with SIGBUS.

Shapes: K steps of a chunk, A lane groups of this rank, B rows of a group (padding included).
"""

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from trainer.data.index import INDEX_NAME, ROW_ID, Column, Shard, read_index
from trainer.data.plan import Pieces, Plan
from trainer.data.shards import member_name, npy_header, padding, payload_bytes, tar_header
from trainer.errors import UserError

_RING = 4  # one read, one ahead of the trainer's loop, one in use, one that may still be held
_LARGE = 2**22  # bytes that are worth a second thread
_OPEN_FILES = 64  # a process may open 1,024, and a folder may have more shards


class ShardFolder:
    """One split's shards. Raises UserError for a missing shard or one of the wrong size (not with ``check=False``)."""

    def __init__(self, path: Path, check: bool = True):
        self.path, self.index = path, read_index(path)
        self._file = lru_cache(maxsize=_OPEN_FILES)(_File)
        self._map = lru_cache(maxsize=_OPEN_FILES)(_Map)
        self._places: dict[tuple[int, str], tuple[Path, int, int, np.dtype, tuple[int, ...]]] = {}
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
    def _exceeds_memory(self) -> bool:
        """Whether the system may not keep all of the split in its page cache."""
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return 2 * sum(shard.bytes for shard in self.index.shards) > memory

    @cached_property
    def block_rows(self) -> np.ndarray:
        """int64 [blocks]."""
        return self.index.block_rows

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

    def view_block(self, block: int, name: str) -> np.ndarray:
        """As `read_block`, without a copy: the values where the file is mapped, checked on their first use."""
        if (block, name) not in self._checked:
            self.read_block(block, name)
        if (block, name) not in self._places:
            self._places[block, name] = self._where(block, name)
        file, start, size, dtype, shape = self._places[block, name]
        with _reading(file):
            shard = self._map(file)
            if size and self._exceeds_memory:
                shard.prefetch(start, size)
        return shard.values(start, size).view(dtype).reshape(shape)

    def _where(self, block: int, name: str) -> tuple[Path, int, int, np.dtype, tuple[int, ...]]:
        """File, first byte, bytes, type and shape of the values of a column in a block."""
        s, b = self._shard_of[block]
        shard, column = self.index.shards[s], self.index.column(name)
        start, rows = shard.offsets[name][b] + len(self._headers(column, s, b)[0]), shard.rows[b]
        dtype = np.dtype(column.dtype).newbyteorder("<")
        return self.path / shard.name, start, payload_bytes(column, rows), dtype, (rows, *column.shape)

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


class _Map:
    """A file in memory, unmapped with the last array that shows a part of it."""

    def __init__(self, path: Path):
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self.bytes = np.frombuffer(self.map, dtype=np.uint8)

    def values(self, start: int, size: int) -> np.ndarray:
        """Bytes [start, start + size)."""
        return self.bytes[start : start + size]

    def prefetch(self, start: int, size: int) -> None:
        """Has the system read bytes [start, start + size) in one go, not page by page as runs touch them."""
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        self.map.madvise(mmap.MADV_WILLNEED, page, start + size - page)


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
        self._blocks: dict[int, dict[str, np.ndarray]] = {}
        self._thread, self._helper = (ThreadPoolExecutor(1, thread_name_prefix="reader") for _ in range(2))

    def chunk(self, first: int, steps: int, into: dict[str, np.ndarray] | None = None) -> ChunkArrays:
        """The rows of global steps ``first`` to ``first + steps``, in memory of their own or in that of ``into``."""
        slots = steps * len(self.groups)
        slot, pieces = self._pieces(first, steps)
        valid = np.bincount(slot, pieces.rows, minlength=slots).astype(np.int64)
        slot, pieces = self._padded(slot, pieces, valid)
        before, self._blocks = self._blocks, {}
        for block in np.unique(pieces.block).tolist():
            held = before.get(block) or {c.name: self.folder.view_block(block, c.name) for c in self.columns}
            self._blocks[block] = held
        arrays = {} if into is None else into
        runs = list(zip(pieces.block.tolist(), pieces.first.tolist(), (pieces.first + pieces.rows).tolist()))
        for column in self.columns:
            target = _room(arrays, column, slots * self.capacity, self.dtypes[column.name])
            self._gather([self._blocks[block][column.name][start:stop] for block, start, stop in runs], target)
        shape = (steps, len(self.groups), self.capacity)
        found = {c.name: arrays[c.name][: slots * self.capacity].reshape(*shape, *c.shape) for c in self.columns}
        batch_rows = self.plan.rows_at(np.arange(first, first + steps)).sum(-1)
        row_id = found.pop(ROW_ID) if self.with_row_id else None
        return ChunkArrays(found, valid.reshape(shape[:2]), batch_rows, row_id)

    def chunks(self, spans: Iterable[tuple[int, int]]) -> Iterator[ChunkArrays]:
        """The chunk of each (first step, steps), the next one read while the caller uses this one.

        A chunk's memory is used again: it holds until the second chunk after it is asked for.
        """
        ring: list[dict[str, np.ndarray]] = [{} for _ in range(_RING)]
        ahead = None
        for number, (first, steps) in enumerate(spans):
            coming = self._thread.submit(self.chunk, first, steps, ring[number % _RING])
            if ahead is not None:
                yield ahead.result()
            ahead = coming
        if ahead is not None:
            yield ahead.result()

    def close(self) -> None:
        """Ends the threads; what they were reading is dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._helper.shutdown()

    def _gather(self, sources: list[np.ndarray], target: np.ndarray) -> None:
        """Copies ``sources`` one after the other into ``target``; two threads share what is large."""
        if target.nbytes < _LARGE:
            np.concatenate(sources, out=target, casting="same_kind")
            return
        half = len(sources) // 2
        rows = sum(map(len, sources[:half]))
        other = self._helper.submit(np.concatenate, sources[:half], out=target[:rows], casting="same_kind")
        np.concatenate(sources[half:], out=target[rows:], casting="same_kind")
        other.result()

    def _pieces(self, first: int, steps: int) -> tuple[np.ndarray, Pieces]:
        """The runs in the order of their places, and the slot (step, group) of each, int64 [runs]."""
        found = []
        for a, lanes in enumerate(self.groups):
            for lane in lanes:
                step, runs = self.plan.pieces_of(first, steps, lane)
                found.append((step * len(self.groups) + a, *runs))
        slot, *columns = (np.concatenate(each) for each in zip(*found))
        order = np.argsort(slot, kind="stable")  # lanes come in their order
        return slot[order], Pieces(*(column[order] for column in columns))

    def _padded(self, slot: np.ndarray, pieces: Pieces, valid: np.ndarray) -> tuple[np.ndarray, Pieces]:
        """The runs with what fills every slot up: its first row again, or the first of all where it has none."""
        missing = self.capacity - valid
        if not missing.any():
            return slot, pieces
        which = np.repeat(np.arange(len(valid)), missing)
        block, first = np.zeros(len(valid), dtype=np.int64), np.zeros(len(valid), dtype=np.int64)
        filled, start = np.unique(slot, return_index=True)
        block[filled], first[filled] = pieces.block[start], pieces.first[start]
        more = (block[which], first[which], np.ones(len(which), dtype=np.int64))
        order = np.argsort(np.concatenate([slot, which]), kind="stable")
        joined = Pieces(*(np.concatenate(pair)[order] for pair in zip(pieces, more)))
        return np.concatenate([slot, which])[order], joined


def _delivered(column: Column, floats: np.dtype | None) -> np.dtype:
    stored = np.dtype(column.dtype).newbyteorder("<")
    if floats is None:
        return stored
    return np.dtype(floats) if stored.kind == "f" else np.dtype(np.int64)


def _room(arrays: dict[str, np.ndarray], column: Column, rows: int, dtype: np.dtype) -> np.ndarray:
    """The first ``rows`` of the array of a column, which is made or grown."""
    if column.name not in arrays or len(arrays[column.name]) < rows:
        arrays[column.name] = np.empty((rows, *column.shape), dtype)
    return arrays[column.name][:rows]
