"""Waiting for other ranks, where a signal is heard, and work that a signal does not cut in two."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as until_done
from typing import TypeVar

import torch

Answer = TypeVar("Answer")


def interruptible(wait: Callable[[], Answer]) -> Answer:
    """What ``wait()`` gives or raises. It runs in a thread of its own: Python calls no signal's handler while the main
    thread waits inside C++, as it does for other ranks.
    """
    return _begun(wait).result()


def whole(work: Callable[[], Answer]) -> Answer:
    """What ``work()`` gives or raises, or after it what a signal's handler has raised meanwhile."""
    outcome, told = _begun(work), None
    while not outcome.done():
        try:
            until_done([outcome])
        except BaseException as error:
            told = told or error
    if told is not None:
        raise told
    return outcome.result()


def _begun(work: Callable[[], Answer]) -> Future[Answer]:
    """The outcome of ``work()``, which runs in a thread of its own."""
    outcome: Future[Answer] = Future()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if device is not None:  # each thread has a current one of its own
                torch.cuda.set_device(device)
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome
