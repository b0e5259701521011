"""Reading: from the plan's runs to arrays. Every member is compared with the index before a row of it is used.

`preadv` into a block, hash once per process, gather whole runs into the chunk. Nothing is parsed and nothing unpickled:
a member's two headers are known to the byte.

Shapes: K steps of a chunk, A lane groups of this rank, B rows of a group (padding included).
"""

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from trainer.data.index import INDEX_NAME, ROW_ID, Column, Shard, read_index
from trainer.data.plan import Plan
from trainer.data.shards import member_name, npy_header, padding, payload_bytes, tar_header
from trainer.errors import UserError

_OPEN_FILES = 64  # a process may open 1,024, and a folder may have more shards


class ShardFolder:
    """One split's shards. Raises UserError for a missing shard or one of the wrong size (not with ``check=False``)."""

    def __init__(self, path: Path, check: bool = True):
        self.path, self.index = path, read_index(path)
        self._file = lru_cache(maxsize=_OPEN_FILES)(_File)
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
    """Chunks of the lanes of this rank: ``groups`` lists the lanes of each draw's group, all of the same number."""

    def __init__(
        self,
        folder: ShardFolder,
        plan: Plan,
        columns: Sequence[str],
        groups: Sequence[Sequence[int]],
        with_row_id: bool = False,
    ):
        self.folder, self.plan, self.groups, self.with_row_id = folder, plan, groups, with_row_id
        self.columns = [folder.index.column(name) for name in (*columns, *([ROW_ID] if with_row_id else []))]
        self.capacity = len(groups[0]) * plan.capacity
        self._blocks: OrderedDict[tuple[int, str], np.ndarray] = OrderedDict()
        self._keep = 2 * plan.pool_blocks * sum(map(len, groups)) * len(self.columns)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reader")

    def chunk(self, first: int, steps: int) -> ChunkArrays:
        """The rows of global steps ``first`` to ``first + steps``."""
        shape = (steps, len(self.groups), self.capacity)
        arrays = {c.name: np.empty((*shape, *c.shape), np.dtype(c.dtype).newbyteorder("<")) for c in self.columns}
        valid = np.zeros(shape[:2], dtype=np.int64)
        batch_rows = np.array([self.plan.rows_at(first + k).sum() for k in range(steps)])
        for k in range(steps):
            for a, lanes in enumerate(self.groups):
                valid[k, a] = self._fill(arrays, k, a, first + k, lanes)
        return ChunkArrays(arrays, valid, batch_rows, arrays.pop(ROW_ID) if self.with_row_id else None)

    def chunks(self, spans: Iterable[tuple[int, int]]) -> Iterator[ChunkArrays]:
        """The chunk of each (first step, steps), the next one read while the caller uses this one."""
        ahead = None
        for first, steps in spans:
            coming = self._thread.submit(self.chunk, first, steps)
            if ahead is not None:
                yield ahead.result()
            ahead = coming
        if ahead is not None:
            yield ahead.result()

    def close(self) -> None:
        """Ends the thread; what it was reading is dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _fill(self, arrays: dict[str, np.ndarray], k: int, a: int, step: int, lanes: Sequence[int]) -> int:
        """Gathers one group's rows of one step and pads them; returns how many count."""
        at = 0
        for lane in lanes:
            for block, first, rows in zip(*(column.tolist() for column in self.plan.pieces(step, lane))):
                for column in self.columns:
                    source = self._block(block, column.name)
                    arrays[column.name][k, a, at : at + rows] = source[first : first + rows]
                at += rows
        for column in self.columns:
            target = arrays[column.name][k, a]
            target[at:] = target[0] if at else self._block(0, column.name)[0]
        return at

    def _block(self, block: int, name: str) -> np.ndarray:
        """A block's values, the most recently used kept."""
        key = (block, name)
        if key in self._blocks:
            self._blocks.move_to_end(key)
        else:
            self._blocks[key] = self.folder.read_block(block, name)
            if len(self._blocks) > self._keep:
                self._blocks.popitem(last=False)
        return self._blocks[key]
