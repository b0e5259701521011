"""What a watcher sees while it trains: a Rich bar on a terminal or in a notebook, a line now and then in a log file."""

from importlib.util import find_spec
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from trainer.engine.module import ChunkModule

_LINES = 10  # in a log file: about one for each tenth of the run


class ProgressBar(Callback):
    """Steps of the horizon, ELBO per row, rows/s and time left, on rank 0."""

    def __init__(self, console: Console, horizon: int):
        self.console, self.horizon = console, horizon
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.next_line = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, ChunkModule)
        if not (trainer.is_global_zero and _can_show(self.console)):
            return
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} steps"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.bar.add_task("", total=self.horizon, completed=module.step, figures="")
        self.bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        assert isinstance(module, ChunkModule)
        if not trainer.is_global_zero:
            return
        last = module.last
        figures = f"ELBO/row {last['elbo_per_row']:.5g}  {last['rows_per_second'] / 1e6:.3g} M rows/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=module.step, figures=figures)
        elif module.step >= self.next_line:
            self.console.print(
                f"step {module.step:,}/{self.horizon:,}  {figures}  {module.seconds:.0f} s", highlight=False
            )
            self.next_line = module.step + max(1, self.horizon // _LINES)

    def on_pass(self, number: int) -> None:
        """What is shown during a pass over all rows."""
        if self.bar is not None:
            self.bar.update(self.task, figures=f"pass {number:,} over all rows")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _can_show(console: Console) -> bool:
    """Whether a bar can be drawn over: in a notebook by ipywidgets."""
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
