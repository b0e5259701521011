"""Shards of a remote folder on this machine's disk, by what they hold, never by their names.

A file is there whole and right, or not at all: it is written beside, compared with the index's sha256, and renamed. A
lock lets one process of a machine fetch a shard while the others wait for it. Whoever reads a file holds a shared lock
on it, and what is held is not removed.
"""

import errno
import fcntl
import hashlib
import math
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO
from weakref import WeakValueDictionary

import xxhash
from filelock import FileLock, Timeout

from trainer.cache import cache_folder
from trainer.data.shards.files import AHEAD, OpenFile, block_at, members_of
from trainer.data.shards.index import INDEX_NAME, Index, Shard, parse_index
from trainer.data.shards.remote import Store
from trainer.data.shards.tar import RECORD
from trainer.errors import CorruptDataError, UserError

_PIECE = 1 << 22  # bytes that are asked for at once
_ATTEMPTS = 3  # at a shard that arrives and is wrong
_FREE = 0.1  # share of the disk that is left alone where no limit is given


class ShardCache:
    """`SHA256.tar` for each shard in ``folder`` (None: the user's cache folder), of at most ``limit`` bytes together
    (None: what leaves a tenth of the disk free); the ones that were used least recently go first.

    ``timeout``: seconds in which 4 MB have to come.
    """

    def __init__(self, folder: Path | None = None, limit: int | None = None, timeout: float = 60.0):
        self.folder, self.limit, self.timeout = folder or cache_folder() / "shards", limit, timeout

    @property
    def room(self) -> int:
        """Bytes that may be used, those that are among them."""
        if self.limit is not None:
            return self.limit
        self.folder.mkdir(parents=True, exist_ok=True)
        disk = os.statvfs(self.folder)
        used = sum(stat.st_size for _, stat in self._files("*.tar"))
        return used + int(disk.f_frsize * (disk.f_bavail - _FREE * disk.f_blocks))

    def open(self, shard: Shard, store: Store) -> OpenFile:
        """The shard, fetched from ``store`` if it is not here. It stays as long as the file is open.

        Raises UserError where the store has other bytes than the index says, and where the disk is full.
        """
        path = self._path(shard)
        while True:
            held = _held(path, shard)
            if held is not None:
                return held
            with _disk(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                with FileLock(path.with_suffix(".lock")):
                    if not path.exists():
                        self._make_room(shard.bytes, path.with_suffix(".part"))
                        self._fetch(shard, store, path)

    def quiet(self, shard: Shard) -> float:
        """Seconds since a process of this machine last got bytes of the shard that it fetches; inf where none does."""
        try:
            return time.time() - self._path(shard).with_suffix(".part").stat().st_mtime
        except OSError:
            return math.inf

    def drop(self, shard: Shard) -> None:
        """Removes the file of a shard that has turned out to be damaged."""
        self._path(shard).unlink(missing_ok=True)

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _fetch(self, shard: Shard, store: Store, path: Path) -> None:
        part = path.with_suffix(".part")
        try:
            for attempt in range(1, _ATTEMPTS + 1):
                wrong = _download(shard, store, part)
                if wrong is None:
                    os.replace(part, path)
                    return
                if attempt == _ATTEMPTS:
                    raise CorruptDataError(
                        f"shard {store.url}/{shard.name} {wrong}, {attempt} times: put it there again from where it "
                        "was packed, or pack the table again."
                    )
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, needed: int, part: Path) -> None:
        """Removes what was used least recently, and is not in use, until ``needed`` bytes more are within the limit,
        and takes them, as ``part``.
        """
        with FileLock(self.folder / "room.lock"):
            for other in self.folder.glob("*.part"):  # of processes that were killed
                with suppress(Timeout), FileLock(other.with_suffix(".lock"), timeout=0):
                    other.unlink(missing_ok=True)
            files = sorted((stat.st_mtime, stat.st_size, path) for path, stat in self._files("*.tar"))
            coming = sum(stat.st_size for _, stat in self._files("*.part"))
            total, limit = coming + sum(size for _, size, _ in files), self.room
            for _, size, path in files:
                if total + needed <= limit:
                    break
                if _removed(path):
                    total -= size
            part.touch()
            os.truncate(part, needed)

    def _files(self, names: str) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.glob(names):
            with suppress(FileNotFoundError):
                yield path, path.stat()


class RemoteFiles:
    """Those at an address; shards that are wanted are fetched by threads of their own, a few ahead of need."""

    far = True

    def __init__(self, store: Store, cache: ShardCache):
        self.store, self.cache = store, cache
        self._coming: dict[str, Future[OpenFile]] = {}
        self._here: WeakValueDictionary[str, OpenFile] = WeakValueDictionary()
        self._threads: ThreadPoolExecutor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """To a copy and to another process, which fetch for themselves."""
        return RemoteFiles, (self.store, self.cache)

    @property
    def place(self) -> str:
        return self.store.url

    @property
    def places(self) -> list[str]:
        return [self.place]

    @property
    def room(self) -> float:
        return self.cache.room

    def exists(self) -> bool:
        return self.store.exists(INDEX_NAME)

    def path_of(self, shard: Shard) -> str:
        return f"{self.place}/{shard.name}"

    def index(self) -> Index:
        try:
            return parse_index(self.store.read(INDEX_NAME), f"{self.place}/{INDEX_NAME}")
        except FileNotFoundError:
            raise UserError(
                f"{self.place}/{INDEX_NAME} is missing: {self.place} is not a finished shard folder; pack it again."
            ) from None

    def check(self, shard: Shard) -> None:
        """Nothing is asked of the store before it is needed."""

    def open(self, shard: Shard) -> OpenFile:
        coming = self._coming.pop(shard.name, None)
        file = self.cache.open(shard, self.store) if coming is None else coming.result()
        self._here[shard.name] = file
        return file

    def want(self, shards: Iterable[Shard]) -> None:
        for shard in islice(shards, AHEAD):
            if shard.name not in self._coming and shard.name not in self._here:
                self._threads = self._threads or ThreadPoolExecutor(AHEAD, thread_name_prefix="fetch")
                self._coming[shard.name] = self._threads.submit(self.cache.open, shard, self.store)

    def quiet(self, shard: Shard) -> float:
        return self.cache.quiet(shard)

    def renew(self, shard: Shard) -> bool:
        self._coming.pop(shard.name, None)
        self._here.pop(shard.name, None)
        self.cache.drop(shard)
        return True


def _held(path: Path, shard: Shard) -> OpenFile | None:
    """The file with a shared lock, None where it is absent; one of a wrong size goes."""
    try:
        file = OpenFile(path)
    except FileNotFoundError:
        return None
    fcntl.flock(file.number, fcntl.LOCK_SH)
    found = os.fstat(file.number)
    if not found.st_nlink:  # removed since it was opened
        return None
    if found.st_size != shard.bytes:
        path.unlink(missing_ok=True)
        return None
    os.utime(path)
    return file


def _removed(path: Path) -> bool:
    """Whether the file could be removed: not while somebody holds it."""
    try:
        file = OpenFile(path)
        fcntl.flock(file.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    path.unlink(missing_ok=True)
    return True


def _download(shard: Shard, store: Store, part: Path) -> str | None:
    """Writes the shard's bytes; what is wrong with them, if anything."""
    sha256 = hashlib.sha256()
    with part.open("r+b") as file:
        for first in range(0, shard.bytes, _PIECE):
            last = min(first + _PIECE, shard.bytes)
            try:
                piece = store.read(shard.name, first, last)
            except FileNotFoundError:
                raise CorruptDataError(
                    f"shard {store.url}/{shard.name} is missing: put it there again, or pack the table again."
                ) from None
            if len(piece) != last - first:
                end = first + len(piece)
                return f"ends after {end:,} bytes where the index says {shard.bytes:,}, in {block_at(shard, end)}"
            file.write(piece)
            sha256.update(piece)
        if sha256.hexdigest() == shard.sha256:
            file.flush()
            os.fsync(file.fileno())
            return None
        file.seek(0)
        return f"does not match its sha256, {_first_bad(shard, file)}"


def _first_bad(shard: Shard, file: BinaryIO) -> str:
    """Which member is not what the index says; members lie side by side."""
    members = members_of(shard)
    ends = [*(place for place, *_ in members[1:]), shard.bytes - 2 * RECORD]
    for (place, b, name, found), end in zip(members, ends):
        file.seek(place)
        if xxhash.xxh3_64_hexdigest(file.read(end - place)) != found:
            return f'block {b} of it, column "{name}"'
    return "beyond its blocks"


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space is left for shards in {folder}: free some, or give another folder (data.cache.dir=)."
            ) from error
        raise UserError(
            f"shards cannot be kept in {folder} ({error.strerror or error}): give another folder (data.cache.dir=)."
        ) from error
