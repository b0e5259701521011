"""Files that are made once and kept between runs, whichever of several processes comes first."""

import atexit
import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock, Timeout

_LONG = 600.0  # seconds that a process may make a file while others wait: then they make it too
_DAY = 86_400.0


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/svi-trainer, or ~/.cache/svi-trainer; without a home a folder that goes with this process."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(base or Path.home() / ".cache") / "svi-trainer"
    except RuntimeError:
        return _without_home() / "svi-trainer"


@functools.cache
def _without_home() -> Path:
    folder = tempfile.mkdtemp(prefix="svi-cache-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["XDG_CACHE_HOME"] = folder  # of the processes that this one starts, too
    print("this user has no home folder, so nothing compiled is kept: set XDG_CACHE_HOME to a folder.", file=sys.stderr)
    return Path(folder)


def kept(path: Path, make: Callable[[Path], None]) -> Path:
    """``path``, made by ``make(temporary path)`` and renamed if it is not there; other processes wait for it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                with TemporaryDirectory(dir=path.parent) as folder:
                    make(Path(folder) / path.name)
                    os.replace(Path(folder) / path.name, path)
    return path


def used(path: Path) -> bool:
    """Whether ``path`` is there; if so, it counts as used now."""
    with suppress(OSError):  # a folder that cannot be written can still be read
        os.utime(path)
    return path.exists()


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Lets one process of this machine at a time make ``path``, and leaves no lock file behind.

    Where no lock can be had, all of them make it: nothing but time is lost, since `put` renames.
    """
    lock = FileLock(path.with_suffix(".lock"), timeout=_LONG)
    with suppress(OSError, NotImplementedError, Timeout):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # whoever waits for the file that goes finds the result
                os.unlink(lock.lock_file)
            lock.release()


def without_lock(path: Path) -> None:
    """Removes the lock file that a killed process left beside ``path``, unless another holds it."""
    lock = FileLock(path.with_suffix(".lock"), timeout=0)
    if os.path.exists(lock.lock_file):
        with suppress(OSError, NotImplementedError, Timeout), lock:
            os.unlink(lock.lock_file)


def put(made: Path, path: Path) -> None:
    """Copies ``made`` to ``path``, which is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        with made.open("rb") as source, part.open("wb") as target:
            shutil.copyfileobj(source, target)
            target.flush()
            os.fsync(target.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def prune(folder: Path, days: float = 90, most: int = 2**30) -> None:
    """Removes files of ``folder`` that nobody has used for ``days``, then those used least recently until the rest take
    at most ``most`` bytes; and what killed processes left there.

    A process that has such a file open keeps what it has.
    """
    now, files = time.time(), []
    with suppress(OSError):
        for path in folder.iterdir():
            with suppress(OSError):
                found = path.stat()
                files.append((found.st_mtime, found.st_size, path))
    total = 0
    for when, size, path in sorted(files, reverse=True):
        oldest = now - (days if path.suffix == ".so" else 1) * _DAY
        total += size
        if when < oldest or total > most:
            with suppress(OSError):
                path.unlink()
