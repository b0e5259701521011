"""Work on several threads: NumPy, Arrow, hashes and files let go of Python's lock for most of it."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
_LEAST_BYTES = 1 << 25  # of a table that is worth a second worker


def default_workers(table_bytes: int) -> int:
    """The cores that this process may use; 1 for a table of less than 32 MB."""
    return len(os.sched_getaffinity(0)) if table_bytes >= _LEAST_BYTES else 1


class Stopped(Exception):
    """Raised in a worker when another one failed, or the main thread was told to stop."""


class Progress:
    """Has ``workers`` threads work; counts and reports their rows, each of them ``passes`` times in all."""

    def __init__(self, report: Callable[[int, int | None], None] | None, total: int, workers: int, passes: int = 2):
        self._report, self._total, self._workers, self._passes, self._done = report, total, workers, passes, 0
        self._lock, self._stopping = threading.Lock(), threading.Event()

    def tick(self, rows: int) -> None:
        """``rows`` went by. Raises `Stopped` when work is to end."""
        if self._stopping.is_set():
            raise Stopped
        with self._lock:
            self._done += rows
            if self._report is not None and rows:
                self._report(min(self._done // self._passes, self._total), self._total)

    def run(self, work: Callable[[T], R], tasks: Sequence[T]) -> list[R]:
        """``work`` of each task, in order, on the workers' threads (one worker: on this one).

        Raises the error of the first task that fails, in their order; the others end at their next `tick`.
        """
        if self._workers == 1 or len(tasks) < 2:
            return [work(task) for task in tasks]
        pool = ThreadPoolExecutor(min(self._workers, len(tasks)), thread_name_prefix="pack")
        futures = [pool.submit(work, task) for task in tasks]
        try:
            return [future.result() for future in futures]
        except BaseException:
            self._stopping.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
