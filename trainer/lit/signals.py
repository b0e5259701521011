"""SIGTERM, SIGUSR1 and Ctrl-C only set a flag; the ranks agree on it between chunks, save together and leave.

Lightning's own handlers save and synchronise inside the handler, which hangs when one rank alone is told.
A second Ctrl-C interrupts at once.
"""

import signal
import threading
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback

from trainer.lit.strategy import max_over_ranks

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopOnSignal(Callback):
    """Stops training at the end of the chunk in which any rank was told to; `received` is the signal's number, or 0."""

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets only the main thread handle signals
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        self.received = max_over_ranks(self.received, module.device)
        if self.received:
            trainer.should_stop = True

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)
