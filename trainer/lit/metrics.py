"""Where a run's figures go: metrics.csv always, and whatever loggers were chosen, on rank 0, by our own step."""

import csv
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback

from trainer.lit.module import VariationalModule

_ALL = 1000


class MetricsFile(Callback):
    """Rows of metrics.csv (step and wall seconds first), one per chunk for a while, then ever fewer (`is_kept`).

    A resumed run drops what it will write again.
    """

    def __init__(self, path: Path):
        self.path = path
        self.chunks = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, VariationalModule)
        if not trainer.is_global_zero or not self.path.exists():
            return
        with self.path.open(newline="") as file:
            header, *rows = csv.reader(file)
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerows([header, *(row for row in rows if int(row[0]) <= module.step)])

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        assert isinstance(module, VariationalModule)
        number, self.chunks = self.chunks, self.chunks + 1
        if not trainer.is_global_zero or not (is_kept(number) or module.step == module.update.horizon):
            return
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, module.last)
            if new:
                writer.writeheader()
            writer.writerow(module.last)
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in module.last.items() if k != "step"}, step=module.step)


def is_kept(number: int) -> bool:
    """Whether a process records its chunk ``number``: each of the first 1,000, then 500 each time the count doubles.

    A chunk takes about 0.1 s: ten seconds, an hour and a month make 100, 3,600 and 8,300 rows.
    """
    return number % (1 << (number // _ALL).bit_length()) == 0
