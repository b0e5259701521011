"""Where a run's metrics go: metrics.csv always, and whatever loggers were chosen, on rank 0, by our own step."""

import csv
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback

from trainer.data.store import atomic_write
from trainer.engine.module import ChunkModule
from trainer.errors import first_line

_ALL = 1000


class MetricsFile(Callback):
    """Rows of metrics.csv (step and wall seconds first), one per chunk for a while, then ever fewer (`is_kept`).

    A resumed run drops what it will write again. ``say``: tells the user a sentence.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = print):
        self.path, self.say = path, say
        self.chunks = 0
        self.told: set[tuple[str, str]] = set()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, ChunkModule)
        if not trainer.is_global_zero or not self.path.exists():
            return
        with self.path.open(newline="") as file:
            header, *rows = [*csv.reader(file)] or [[]]
        if not rows:  # a full disk may have cut the first line short
            self.path.unlink()
            return
        text = io.StringIO(newline="")
        whole = (row for row in rows if len(row) == len(header))  # a full disk, or a kill, may have cut one short
        csv.writer(text).writerows([header, *(row for row in whole if int(row[0]) <= module.step)])
        with atomic_write(self.path) as file:
            file.write(text.getvalue().encode())

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        assert isinstance(module, ChunkModule)
        number, self.chunks = self.chunks, self.chunks + 1
        if not trainer.is_global_zero or not (is_kept(number) or module.step == module.update.horizon):
            return
        self.or_say(str(self.path), partial(self.append, module.last))
        numbers = {name: value for name, value in module.last.items() if name != "step"}
        self.to_loggers(trainer, numbers, module.step)

    def to_loggers(self, trainer: pl.Trainer, numbers: dict[str, float], step: int) -> None:
        """Hands ``numbers`` of ``step`` to every logger."""
        for logger in trainer.loggers:
            if (type(logger).__name__, "figures") not in self.told:  # each call to a server that is gone takes its time
                self.or_say(type(logger).__name__, partial(logger.log_metrics, numbers, step))

    def append(self, figures: dict[str, float]) -> None:
        """Writes a row, and before the first one the names."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, figures)
        if not self.path.exists() or not self.path.stat().st_size:
            writer.writeheader()
        writer.writerow(figures)
        with self.path.open("a", newline="") as file:
            file.write(text.getvalue())

    def or_say(self, what: str, log: Callable[[], None], lost: str = "figures") -> None:
        """What cannot be logged (a full disk, a server that is gone) is told once, and does not end the training."""
        try:
            log()
        except Exception as error:
            if (what, lost) not in self.told:
                self.told.add((what, lost))
                self.say(f"{what} takes no {lost} ({first_line(error)}): training continues without them.")


def is_kept(number: int) -> bool:
    """Whether a process records its chunk ``number``: each of the first 1,000, then 500 each time the count doubles.

    A chunk takes about 0.1 s: ten seconds, an hour and a month make 100, 3,600 and 8,300 rows.
    """
    return number % (1 << (number // _ALL).bit_length()) == 0
