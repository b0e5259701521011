"""Waiting for other ranks, where a signal is heard."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

Answer = TypeVar("Answer")


def interruptible(wait: Callable[[], Answer]) -> Answer:
    """What ``wait()`` gives or raises. It runs in a thread of its own: Python calls no signal's handler while the main
    thread waits inside C++, as it does for other ranks.
    """
    outcome: Future[Answer] = Future()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def work() -> None:
        try:
            if device is not None:  # each thread has a current one of its own
                torch.cuda.set_device(device)
            outcome.set_result(wait())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join()
    return outcome.result()
