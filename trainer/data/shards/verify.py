"""Every byte of a shard folder against its index, and the index of what is intact."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

from trainer.data.shards.files import Files
from trainer.data.shards.folder import ShardFolder
from trainer.data.shards.index import Index
from trainer.data.shards.read_thread import within
from trainer.errors import CorruptDataError, UserError

_THREADS = 8  # hashing lets go of Python's lock; more would wait for the disk or the network
LEFT_OUT = "left_out"
"""What `Index.meta` of an index that `intact` made says of the blocks it is without."""
Show = Callable[[int, int], None]
Found = TypeVar("Found")


@dataclass(frozen=True)
class Verification:
    """What was found intact, and a sentence for each shard that is not (or for the index)."""

    shards: int
    blocks: int
    rows: int
    damaged: tuple[str, ...]


def verify(files: Path | Files, progress: Show | None = None) -> Verification:
    """Checks every member's headers and hash and every shard's sha256 (so the bytes between members too).

    Several shards at once. A bad one is named with its first bad block, and the others are checked still.
    ``progress``: called after each shard with (rows done, rows in all).
    """
    try:
        folder = ShardFolder(files, check=False)
    except UserError as error:
        return Verification(0, 0, 0, (str(error),))
    shards = folder.index.shards
    blocks = rows = 0
    damaged = []
    for number, problem in _of_shards(partial(_problem, folder), folder, range(len(shards)), progress):
        if problem is None:
            blocks, rows = blocks + len(shards[number].rows), rows + sum(shards[number].rows)
        else:
            damaged.append(problem)
    return Verification(len(shards) - len(damaged), blocks, rows, tuple(damaged))


def bad_blocks(folder: ShardFolder, shards: Collection[int], progress: Show | None = None) -> dict[int, str]:
    """The blocks of some shards that are not what the index says, and for each the sentence.

    ``progress``: as for `verify`, of the rows of these shards. Raises UserError where a shard may be intact, but
    cannot be reached or kept.
    """
    found: dict[int, str] = {}
    for _, bad in _of_shards(partial(_watched, _bad, folder), folder, shards, progress):
        found |= bad
    return found


def intact(index: Index, bad: Collection[int]) -> Index:
    """``index`` without its blocks ``bad``, which are not all. `Index.meta` tells how many rows and blocks are left
    out, of which index, and of each shard which, by their numbers in it; statistics go, since they are of all rows.
    """
    shards, first, rows, left = [], 0, 0, {}
    for shard, numbers in zip(index.shards, index.block_numbers):
        kept = [b for b in range(len(shard.rows)) if first + b not in bad]
        if len(kept) < len(shard.rows):
            left[shard.name] = [numbers[b] for b in range(len(shard.rows)) if first + b in bad]
        first += len(shard.rows)
        rows += sum(shard.rows) - sum(shard.rows[b] for b in kept)
        if kept:
            shards.append(shard.part(kept, numbers))
    columns = tuple(replace(column, statistics=None) for column in index.columns) if bad else index.columns
    told = {"rows": rows, "blocks": len(bad), "shards": left, "of": index.digest}
    return replace(index, columns=columns, shards=tuple(shards), meta={**index.meta, LEFT_OUT: told})


def _of_shards(
    look: Callable[[int, int], Found], folder: ShardFolder, shards: Iterable[int], progress: Show | None
) -> Iterator[tuple[int, Found]]:
    """Each shard's number and what ``look`` finds of it, given its number and that of its first block."""
    numbers, done = list(shards), 0
    sizes = [len(shard.rows) for shard in folder.index.shards]
    firsts = list(accumulate(sizes, initial=0))
    rows = [sum(folder.index.shards[number].rows) for number in numbers]
    threads = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), thread_name_prefix="verify")
    try:
        found = threads.map(lambda number: look(number, firsts[number]), numbers)
        for number, each, count in zip(numbers, found, rows):
            done += count
            yield number, each
            if progress is not None:
                progress(done, sum(rows))
    finally:
        threads.shutdown(cancel_futures=True)  # an error, or Ctrl-C, does not wait for the rest


def _watched(look: Callable[[ShardFolder, int, int], Found], folder: ShardFolder, number: int, first: int) -> Found:
    """What ``look`` finds of a shard. Raises UserError where nothing of it comes."""

    def call() -> Found:
        folder.note([number])
        return look(folder, number, first)

    return within(folder.timeout, folder.reading, call)


def _problem(folder: ShardFolder, number: int, first: int) -> str | None:
    """The sentence for a shard that is not what the index says."""
    try:
        _watched(_check, folder, number, first)
    except UserError as error:
        return str(error)
    return None


def _check(folder: ShardFolder, number: int, first: int) -> None:
    """Raises UserError where shard ``number``, whose blocks start at ``first``, is not what the index says."""
    shard = folder.index.shards[number]
    folder.files.check(shard)
    for block in range(first, first + len(shard.rows)):
        for column in folder.index.columns:
            folder.read_block(block, column.name)
    if folder.sha256(number) != shard.sha256:
        raise UserError(
            f"shard {folder.files.path_of(shard)} does not match its sha256 outside its blocks: "
            "copy the shard again, or pack the table again."
        )


def _bad(folder: ShardFolder, number: int, first: int) -> dict[int, str]:
    """The bad blocks of shard ``number``, whose blocks start at ``first``; all, where it cannot be opened."""
    shard, found = folder.index.shards[number], {}
    try:
        folder.files.open(shard)
    except CorruptDataError as error:
        return dict.fromkeys(range(first, first + len(shard.rows)), str(error))
    for block in range(first, first + len(shard.rows)):
        try:
            for column in folder.index.columns:
                folder.read_block(block, column.name)
        except CorruptDataError as error:
            found[block] = str(error)
    return found
