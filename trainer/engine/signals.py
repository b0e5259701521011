"""SIGTERM, SIGUSR1 and Ctrl-C: while it trains they set a flag, on which the ranks agree after each chunk.

Lightning's own handlers save and synchronize inside the handler, which hangs when one rank alone is told. Before
training, while it waits for a compiler, and at a second Ctrl-C, a signal ends the process at once. A pass over all rows
looks at the flag at each block; the rank that was told leaves, and the others, who miss it, follow
(`trainer.distributed.failure`).
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback

from trainer.engine.module import ChunkModule
from trainer.errors import Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopOnSignal(Callback):
    """Raises `Stopped` where a signal ends the run; handles signals as a context."""

    def __init__(self) -> None:
        self.received = 0
        """The signal's number, or 0."""
        self.waits = False
        """Whether a signal waits until it is looked for."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():  # Python lets no other handle signals
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def ignore(self) -> None:
        """From here on the process ends, with its own exit code, whatever comes (srun and torchrun hurry it)."""
        self._previous = dict.fromkeys(self._previous, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.received and number == signal.SIGINT
        self.received = number
        if again or not self.waits:
            raise Stopped(number)

    def check(self) -> None:
        """Raises Stopped on the rank that was told."""
        if self.received:
            raise Stopped(self.received)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Signals do not wait in this."""
        self.check()
        before, self.waits = self.waits, False
        try:
            yield
        finally:
            self.waits = before

    @contextmanager
    def at_the_end(self) -> Iterator[None]:
        """Signals wait for the end of this, which they do not cut in two."""
        before, self.waits = self.waits, True
        try:
            yield
        finally:
            self.waits = before
        self.check()

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        assert isinstance(module, ChunkModule)
        module.interruptible = self.at_once

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.waits = True
        for number in self._previous:  # in place of Lightning's, which call ours and more
            signal.signal(number, self._handle)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        assert isinstance(module, ChunkModule)
        self.received = module.comm.largest(self.received, module.device)
        if self.received:
            raise Stopped(self.received, agreed=True)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Stopped) and self.waits and isinstance(module, ChunkModule):
            exception.step = module.step
        self.waits = True  # for what is left to be saved

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.waits = False
