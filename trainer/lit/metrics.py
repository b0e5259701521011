"""Where a run's figures go: metrics.csv always, and whatever loggers were chosen, on rank 0, by our own step."""

import csv
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback

from trainer.lit.module import VariationalModule


class MetricsFile(Callback):
    """One row of metrics.csv per chunk (step and wall seconds first). A resumed run drops what it will write again."""

    def __init__(self, path: Path):
        self.path = path

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
        if not trainer.is_global_zero:
            return
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, module.last)
            if new:
                writer.writeheader()
            writer.writerow(module.last)
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in module.last.items() if k != "step"}, step=module.step)
