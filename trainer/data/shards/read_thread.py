"""A thread that reads, and a caller that does not wait for ever: a dead file system or server is an error that names
the shard, not a silent hang.

The thread is a daemon, since one that is stuck in the system cannot be ended, and must not keep the process.
"""

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

from trainer.errors import UserError

Answer = TypeVar("Answer")


class Reading(NamedTuple):
    """What a thread waits for: the name of a file, and for how many seconds nothing of it has come."""

    what: str
    quiet: float


class ReadThread:
    """Makes calls one after another; any exception of a call is raised, with its traceback, where its result is asked
    for. ``reading`` of a thread's ident: what it waits for, if it does; ``timeout``: seconds.
    """

    def __init__(self, timeout: float, reading: Callable[[int], Reading | None]):
        if not timeout > 0:
            raise UserError(f"data.timeout={timeout:g} must be more than 0 seconds.")
        self.timeout, self.reading = timeout, reading
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], object]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=_make, args=(self._calls,), name="reader", daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], Answer]) -> "Future[Answer]":
        future: Future[Answer] = Future()
        self._calls.put((future, call))
        return future

    def result(self, future: "Future[Answer]") -> Answer:
        """What the call gave. Raises UserError where nothing has arrived for ``timeout`` seconds."""
        asked = time.monotonic()
        while not future.done():
            quiet = self._quiet(asked)
            if quiet >= self.timeout:
                found = self._reading()
                raise UserError(
                    f"nothing of {'the data' if found is None else found.what} has arrived for {self.timeout:g} s "
                    "(data.timeout=): its disk, server or network does not answer; resume with ckpt_path=last when it "
                    "does."
                )
            wait([future], self.timeout - quiet)
        return future.result()

    def ahead(self, calls: Iterable[Callable[[], Answer]]) -> Iterator[Answer]:
        """What the calls give, the next one made while the caller uses this one."""
        last: Future[Answer] | None = None
        for call in calls:
            coming = self.submit(call)
            if last is not None:
                yield self.result(last)
            last = coming
        if last is not None:
            yield self.result(last)

    def close(self) -> None:
        """Ends the thread once it has made its call, if it does."""
        self._calls.put(None)
        asked = time.monotonic()
        while (left := self.timeout - self._quiet(asked)) > 0 and self._thread.is_alive():
            self._thread.join(left)

    def _quiet(self, asked: float) -> float:
        """Seconds since anything came, or since anything was ``asked`` for."""
        found = self._reading()
        return min(time.monotonic() - asked, math.inf if found is None else found.quiet)

    def _reading(self) -> Reading | None:
        assert self._thread.ident is not None
        return self.reading(self._thread.ident)


def within(timeout: float, reading: Callable[[int], Reading | None], call: Callable[[], Answer]) -> Answer:
    """What ``call`` gives, made by a thread for which the caller waits as a `ReadThread`'s does."""
    thread = ReadThread(timeout, reading)
    try:
        return thread.result(thread.submit(call))
    finally:
        thread.close()


def _make(calls: "SimpleQueue[tuple[Future[Any], Callable[[], object]] | None]") -> None:
    while (asked := calls.get()) is not None:
        future, call = asked
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
        del future, call, asked
