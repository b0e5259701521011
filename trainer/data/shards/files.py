"""The files of a split, in a folder of this machine; `cache` has those of an address."""

import errno
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Protocol

from trainer.data.shards.index import INDEX_NAME, Index, Shard, parse_index
from trainer.errors import CorruptDataError, UserError

AHEAD = 4
"""Shards that are fetched at once, of those that are wanted next."""


class OpenFile:
    """A file open for reading, closed with the last reference: another thread may still read what a cache drops."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)

    @cached_property
    def map(self) -> mmap.mmap:
        """The file in memory. It holds the file, with its lock, until the last view of a part of it is gone."""
        return mmap.mmap(self.number, 0, prot=mmap.PROT_READ)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class Files(Protocol):
    """Where an index and its shards come from; errors are UserErrors that name the file."""

    @property
    def place(self) -> str:
        """The folder or address."""
        ...

    @property
    def places(self) -> list[str]:
        """The folders or addresses, where they are several."""
        ...

    @property
    def far(self) -> bool:
        """Whether shards have to be fetched."""
        ...

    @property
    def room(self) -> float:
        """Bytes of this machine's disk that shards may take; inf where they are not fetched."""
        ...

    def exists(self) -> bool:
        """Whether there is an index."""
        ...

    def index(self) -> Index:
        """What it says, checked."""
        ...

    def path_of(self, shard: Shard) -> str:
        """Where a shard lies."""
        ...

    def check(self, shard: Shard) -> None:
        """Raises where it can be seen at once that the shard is absent or of the wrong size."""
        ...

    def open(self, shard: Shard) -> OpenFile:
        """The shard's file, on a disk of this machine."""
        ...

    def want(self, shards: Iterable[Shard]) -> None:
        """These will be opened next, in this order."""
        ...

    def quiet(self, shard: Shard) -> float:
        """Seconds since bytes of the shard last came, if they are on their way here; else inf."""
        ...

    def renew(self, shard: Shard) -> bool:
        """Whether `open` gives another copy of the shard, of which the last one was damaged."""
        ...


class LocalFiles:
    """Those of a folder."""

    far = False
    room = math.inf

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def place(self) -> str:
        return str(self.folder)

    @property
    def places(self) -> list[str]:
        return [self.place]

    def exists(self) -> bool:
        return (self.folder / INDEX_NAME).is_file()

    def path_of(self, shard: Shard) -> str:
        return str(self.folder / shard.name)

    def index(self) -> Index:
        path = self.folder / INDEX_NAME
        try:
            return parse_index(path.read_bytes(), str(path))
        except FileNotFoundError:
            raise UserError(
                f"{path} is missing: {self.folder} is not a finished shard folder; pack it again."
            ) from None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): copy it again, or check the disk.") from None

    def check(self, shard: Shard) -> None:
        file = self.folder / shard.name
        with reading(file):
            size = file.stat().st_size
        if size != shard.bytes:
            end = f" and ends in {block_at(shard, size)}" if size < shard.bytes else ""
            raise CorruptDataError(
                f"shard {file} has {size:,} bytes where the index says {shard.bytes:,}{end}: "
                "copy it again, or pack the table again."
            )

    def open(self, shard: Shard) -> OpenFile:
        with reading(self.folder / shard.name):
            return OpenFile(self.folder / shard.name)

    def want(self, shards: Iterable[Shard]) -> None:
        """They are here."""

    def quiet(self, shard: Shard) -> float:
        return math.inf

    def renew(self, shard: Shard) -> bool:
        return False


def files_of(place: Path | Files) -> Files:
    """Those of a folder, or ``place`` itself."""
    return LocalFiles(place) if isinstance(place, Path) else place


def read_index(place: Path | Files) -> Index:
    """The index of a split, checked. Raises UserError naming the file."""
    return files_of(place).index()


@contextmanager
def reading(file: object) -> Iterator[None]:
    """The system's errors as UserErrors that name the shard; `CorruptDataError` where it is the shard's."""
    try:
        yield
    except FileNotFoundError:
        raise CorruptDataError(f"shard {file} is missing: copy it back, or pack the table again.") from None
    except OSError as error:
        kind = (
            CorruptDataError if error.errno == errno.EIO else UserError
        )  # a bad sector; not a lack of rights or of memory
        raise kind(f"shard {file} cannot be read ({error.strerror}): copy it again, or check the disk.") from None


def members_of(shard: Shard) -> list[tuple[int, int, str, str]]:
    """Of every member where it begins, its block (from 0, in this shard), column and hash; in order."""
    hashes = ((name, b, found) for name, column in shard.xxh3.items() for b, found in enumerate(column))
    return sorted((shard.offsets[name][b], b, name, found) for name, b, found in hashes)


def block_at(shard: Shard, byte: int) -> str:
    """The block, from 0 in its shard, and the column that a byte belongs to, in words."""
    before = [(b, name) for place, b, name, _ in members_of(shard) if place <= byte]
    return f'block {before[-1][0]} of it, column "{before[-1][1]}"' if before else "its first block"
