"""Waiting for other ranks, where a signal is heard."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

Answer = TypeVar("Answer")


def interruptible(wait: Callable[[], Answer]) -> Answer:
    """Returns what ``wait()`` returns or raises. It runs in a thread of its own: Python calls no handler of a signal
    while the main thread waits inside C++, as it does for other ranks.
    """
    outcome: Future[Answer] = Future()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if device is not None:  # each thread has a current one of its own
                torch.cuda.set_device(device)
            outcome.set_result(wait())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome.result()
