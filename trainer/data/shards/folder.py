"""A split's shards, opened: every member is compared with the index before a row of it is used.

A block is read and hashed once per process. Nothing is parsed and nothing unpickled: a member's two headers are known
to the byte. Sizes are compared when a folder is opened; a shard that is truncated while a run uses it ends the run with
SIGBUS.
"""

import hashlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from trainer.data.address import Place
from trainer.data.fields import Rows
from trainer.data.plan import Plan
from trainer.data.shards.cache import ShardCache
from trainer.data.shards.concatenated import ConcatenatedFiles, first_ids_of
from trainer.data.shards.files import AHEAD, Files, OpenFile, files_of, read_index, reading
from trainer.data.shards.index import ROW_ID, Column, Index, Shard
from trainer.data.shards.ragged import most_entries, rows_of
from trainer.data.shards.read_thread import Reading
from trainer.data.shards.splits import split_of
from trainer.data.shards.tar import RECORD, member_name, npy_header, padding, payload_bytes, tar_header
from trainer.errors import CorruptDataError, UserError

if TYPE_CHECKING:
    from webdataset import FluidWrapper

TIMEOUT = 300.0
OPEN_FILES = 64  # a process may open 1,024, and a folder may have more shards


class ShardFolder:
    """One split's shards, in a folder or (`cache`) at an address.

    ``timeout``: seconds after which threads that read it take a read that gives nothing for an error; ``index``: in
    place of its own, of fewer blocks. Raises UserError for a missing shard or one of the wrong size (not with
    ``check=False``).
    """

    def __init__(self, files: Path | Files, check: bool = True, timeout: float = TIMEOUT, index: Index | None = None):
        self.files, self.timeout = files_of(files), timeout
        self.index = index or read_index(self.files)
        self.open_at_once = _open_at_once(self.files, self.index.shards)
        self._open = self._opener()
        self._checked: set[tuple[int, str]] = set()
        self._reading: dict[int, tuple[Sequence[int], float]] = {}
        self._shard_of = [(s, b) for s, shard in enumerate(self.index.shards) for b in range(len(shard.rows))]
        self._numbers = self.index.block_numbers
        for shard in self.index.shards if check else ():
            self.files.check(shard)

    @property
    def place(self) -> str:
        """The folder or address."""
        return self.files.place

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
    def first_ids(self) -> np.ndarray:
        """int64 [blocks]: what is added to the row ids that lie in the shards."""
        of_shards = np.array([shard.first_id for shard in self.index.shards], np.int64)
        of_blocks: np.ndarray = of_shards[self.shard_of]
        return of_blocks

    @cached_property
    def _exceeds_memory(self) -> bool:
        """Whether the system may not keep all of the split in its page cache."""
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return 2 * sum(shard.bytes for shard in self.index.shards) > memory

    def read_block(self, block: int, name: str) -> Any:
        """The values [rows, ...] of a column in a block, `CsrRows` or `RaggedRows` of such a column.

        Raises UserError naming shard and block.
        """
        column = self.index.column(name)
        arrays = [self._read(block, part) for part, _ in column.members]
        if column.kind == "dense":
            return arrays[0]
        ends, *entries = arrays
        offsets = np.concatenate([[0], ends]).astype(np.int64)
        if (block, name) not in self._checked:
            sound = offsets[-1] == len(entries[0]) and bool((np.diff(offsets) >= 0).all())
            if column.kind == "csr" and len(entries[0]):
                sound = sound and entries[0].min() >= 0 and entries[0].max() < column.shape[0]
            if not sound:
                raise self._damaged(*self._shard_of[block], name, "has entries that are not what the index says")
            self._checked.add((block, name))
        return rows_of(column, offsets, entries)

    def read_blocks(self, shards: Iterable[Sequence[int]], names: Sequence[str]) -> Iterator[dict[str, Rows]]:
        """Read columns of blocks, given by shard, as `read_block` does.

        What is opened belongs to this call, so that a process that was forked from this one may read too.
        """
        own, ahead = ShardFolder(deepcopy(self.files), False, self.timeout, self.index), list(shards)
        for number, blocks in enumerate(ahead):
            own.want(np.concatenate(ahead[number : number + AHEAD]))
            for block in blocks:
                yield {name: own.read_block(block, name) for name in names}

    def webdataset(
        self, shuffle: bool | int = False, batch_size: int | None = None, columns: Sequence[str] | None = None
    ) -> "FluidWrapper":
        """Give the rows as a stock WebDataset pipeline (a `webdataset.DataPipeline`), for a loader of your own.

        A row is a dict: column -> its value as it is stored, and `row_id`, the row's number in the source (int64). A
        csr column is a dict of ``indices`` (int64) and ``values`` [entries] of the row, a ragged one the array of its
        entries. Every row comes once an epoch over all ranks and workers, which WebDataset tells apart and gives whole
        shards, or blocks where there are fewer shards than ranks or workers. Each block is compared with its hash.

        ``shuffle``: rows that wait in memory to be drawn from (True: those of two blocks), shards in random order;
        Python's `random` seeds both. ``batch_size``: rows of a batch, a dict of arrays [rows, ...]; of a csr or ragged
        column ``offsets`` (int64 [rows + 1]) and the entries of all rows. None: single rows. ``columns``: which (None:
        all). Raises UserError for an option that makes no sense, and while reading as `read_block` does.
        """
        from trainer.data.shards.pipeline import row_pipeline

        return row_pipeline(self.index, self.read_blocks, columns, shuffle, batch_size)

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process: it opens the shards for itself."""
        return ShardFolder, (self.files, False, self.timeout, self.index)

    def _read(self, block: int, part: Column) -> np.ndarray:
        """The values of a member of a block, from another copy of the shard where there is one and this is damaged."""
        s, b = self._shard_of[block]
        try:
            found = self._member(s, b, block, part)
        except UserError:
            if not self.files.renew(self.index.shards[s]):
                raise
            self._open = self._opener()
            found = self._member(s, b, block, part)
        return found + self.index.shards[s].first_id if part.name == ROW_ID else found

    def _member(self, s: int, b: int, block: int, part: Column) -> np.ndarray:
        shard, name = self.index.shards[s], part.name
        self.note([s])
        header, size = self._headers(part, s, b)
        data = payload_bytes(part, self._count(part, s, b))
        member: Any = np.empty(len(header) + data + padding(size), dtype=np.uint8)
        with reading(self.files.path_of(shard)):
            file = self._open(s)  # held: another thread may renew what is open
            count = os.preadv(file.number, [member], shard.offsets[name][b])
        if count != len(member):
            raise self._damaged(s, b, name, "ends too early")
        if (block, name) not in self._checked:
            if member[: len(header)].tobytes() != header:
                raise self._damaged(s, b, name, "has a header that is not what the index says")
            if xxhash.xxh3_64_hexdigest(member) != shard.xxh3[name][b]:
                raise self._damaged(s, b, name, "does not match its hash")
            self._checked.add((block, name))
        values: np.ndarray = member[len(header) : len(header) + data].view(np.dtype(part.dtype).newbyteorder("<"))
        return values.reshape(-1, *part.shape)

    def sha256(self, s: int) -> str:
        """Of all bytes of shard ``s``."""
        held = self._open(s)
        with os.fdopen(os.dup(held.number), "rb") as file:
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()

    def map_of(self, s: int) -> mmap.mmap:
        """Shard ``s`` in memory. What it shows was compared with the index only where `make_ready` was called."""
        self.note([s])
        return self._open(s).map

    def note(self, shards: Sequence[int]) -> None:
        """Tells `reading` that this thread now reads ``shards``."""
        self._reading[threading.get_ident()] = (shards, time.monotonic())

    def reading(self, thread: int) -> Reading | None:
        """What a thread reads, or read last."""
        if thread not in self._reading:
            return None
        shards, since = self._reading[thread]
        first, last = (self.index.shards[s] for s in (shards[0], shards[-1]))
        names = f"shard {self.files.path_of(first)}" + (f" to {last.name}" if first is not last else "")
        return Reading(names, min(time.monotonic() - since, self.files.quiet(first)))

    def want(self, blocks: np.ndarray) -> None:
        """Has the shards of ``blocks`` fetched, if they are somewhere else."""
        if self.files.far:
            self.files.want(self.index.shards[s] for s in dict.fromkeys(self.shard_of[blocks].tolist()))

    def make_ready(self, block: int, name: str) -> None:
        """Compares a column of a block with the index, once; later has the system read it in one go, not page by page.

        The latter only where the split may not stay in memory: for pages that are there it costs a tenth of a copy.
        """
        if (block, name) not in self._checked:
            self.read_block(block, name)
        elif self._exceeds_memory:
            s, b = self._shard_of[block]
            for part, _ in self.index.column(name).members:
                start = self.index.shards[s].offsets[part.name][b]
                page = start // mmap.PAGESIZE * mmap.PAGESIZE
                size = len(self._headers(part, s, b)[0]) + payload_bytes(part, self._count(part, s, b))
                self.map_of(s).madvise(mmap.MADV_WILLNEED, page, start + size - page)

    def values_at(self, part: Column) -> np.ndarray:
        """int64 [blocks]: the byte of its shard at which the values of a member begin, for each block."""
        counts = [self._count(part, s, b) for s, b in self._shard_of]
        before = {count: RECORD + len(npy_header(part, count)) for count in set(counts)}
        places = [place for shard in self.index.shards for place in shard.offsets[part.name]]
        return np.array(places) + [before[count] for count in counts]

    def most_entries(self, plan: Plan, name: str, lanes: int) -> int:
        """The entries of a csr or ragged column that ``lanes`` lanes of a step of ``plan`` never exceed."""
        of_shards = [shard.widest[name] for shard in self.index.shards]
        longest = max(map(len, of_shards))
        widest = [max(each[min(j, len(each) - 1)] for each in of_shards) for j in range(longest)]
        return most_entries(plan, widest, sum(sum(shard.entries[name]) for shard in self.index.shards), lanes)

    def _count(self, part: Column, s: int, b: int) -> int:
        """How many values a member has in block ``b`` of shard ``s``."""
        name, _, of = part.name.partition(".")
        shard = self.index.shards[s]
        return shard.entries[name][b] if of in ("indices", "values") else shard.rows[b]

    def _headers(self, part: Column, s: int, b: int) -> tuple[bytes, int]:
        """The bytes before the values of a member, and the size that its tar header gives."""
        count = self._count(part, s, b)
        npy = npy_header(part, count)
        size = len(npy) + payload_bytes(part, count)
        return tar_header(member_name(self._numbers[s][b], part.name), size) + npy, size

    def _damaged(self, s: int, b: int, name: str, how: str) -> CorruptDataError:
        return CorruptDataError(
            f'shard {self.files.path_of(self.index.shards[s])}, block {self._numbers[s][b]}, column "{name}" {how}: '
            "copy the shard again, pack the table again, or leave the block out (data.on_corrupt=quarantine, in a new "
            "run_dir)."
        )

    def _opener(self) -> Callable[[int], OpenFile]:
        """The file of shard s, of the last few. It does not keep the folder alive."""
        files, shards = self.files, self.index.shards
        return lru_cache(maxsize=self.open_at_once)(lambda s: files.open(shards[s]))


def _open_at_once(files: Files, shards: Sequence[Shard]) -> int:
    """Few enough that the disk has room for them, and for those that are fetched meanwhile."""
    sizes = [shard.bytes for shard in shards]
    if sum(sizes) <= (room := files.room):
        return OPEN_FILES
    return int(min(OPEN_FILES, max(room // max(sizes) - AHEAD, 2)))


def open_split(
    place: Place | Sequence[Place], split: str, cache: ShardCache | None = None, check: bool = True
) -> ShardFolder | None:
    """The ``split`` ("train" or "held_out") of a folder that `svi shard` made, or of a split's own folder; else None.

    ``place``: a folder, or an address, whose shards are kept in ``cache`` (by default in the user's cache folder); or
    several of them, whose rows are one data set (see `joined`). ``check``: as for `ShardFolder`. Raises UserError
    where one is not a shard folder at all, its ``split`` has lost its index, or they do not go together.
    """
    if isinstance(place, str | Path):
        files = split_of(place, split, cache)
        return None if files is None else ShardFolder(files, check)
    found = [split_of(each, split, cache) for each in place]
    folders = [files for files in found if files is not None]
    if len(found) == 1 or not folders:
        return ShardFolder(folders[0], check) if folders else None
    before = [files or split_of(each, "train", cache) for files, each in zip(found, place)]
    indexes = [files.index() for files in before if files is not None]
    here = [(first, index) for files, first, index in zip(found, first_ids_of(indexes), indexes) if files is not None]
    joined = ConcatenatedFiles(folders, [first for first, _ in here])
    return ShardFolder(joined, check, index=joined.join([index for _, index in here]))
