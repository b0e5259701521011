"""A run folder belongs to one run at a time."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from trainer.errors import UserError

_LOCK = ".lock"
_PATIENCE = 1.0  # seconds, for who only looks whether it is held


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Holds ``run_dir``, which is made, against other processes; the system lets go of it however the process ends.

    Raises UserError where another run holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / _LOCK)
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        raise UserError(f"{run_dir} is in use by another run: wait for it, or give another run_dir=.") from None
    try:
        yield
    finally:
        if [path.name for path in run_dir.iterdir()] == [_LOCK]:  # the run came to nothing
            (run_dir / _LOCK).unlink()
            with suppress(OSError):
                run_dir.rmdir()
        lock.release()


def is_held(lock: Path) -> bool:
    """Whether a process holds the lock file."""
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def is_locked(run_dir: Path) -> bool:
    """Whether a run of this machine (or of one that shares its locks) holds the folder."""
    return is_held(run_dir / _LOCK)
