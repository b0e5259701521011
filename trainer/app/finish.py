"""The end of a run: the exact figures of the final parameters, and the files that hold them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from rich.console import Console
from torch import Tensor

from trainer.data.plan import Plan
from trainer.data.reader import ShardFolder
from trainer.data.store import atomic_write
from trainer.lit.datamodule import to_tensor
from trainer.lit.module import VariationalModule
from trainer.lit.signals import StopOnSignal
from trainer.lit.strategy import sum_over_ranks
from trainer.posterior.elbo import full_elbo, held_out_elbo_per_row
from trainer.posterior.summary import summarise, write_summary
from trainer.posterior.table import closing_table
from trainer.svi.plates import Batch

Rows = tuple[dict[str, Tensor], Tensor]


class Finish(Callback):
    """Evaluates the answer on all ranks (unless a signal ended the run) and writes metrics.json and summary.csv."""

    def __init__(
        self,
        run_dir: Path,
        folder: ShardFolder,
        held_out: ShardFolder | None,
        plan: Plan,
        seed: int,
        console: Console,
        signals: StopOnSignal,
    ):
        self.signals = signals
        self.run_dir, self.folder, self.held_out, self.plan = run_dir, folder, held_out, plan
        self.seed, self.console = seed, console
        self.headline = float("nan")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, VariationalModule)
        if self.signals.received:
            return
        seconds = module.seconds
        metrics = {**self._evaluate(trainer, module), **self._facts(module, seconds, trainer.world_size)}
        self.headline = metrics["held_out_elbo_per_row"] or metrics["elbo_per_row"]
        if trainer.is_global_zero:
            self._write(module, metrics)
            for logger in trainer.loggers:
                numbers = {f"final/{k}": v for k, v in metrics.items() if isinstance(v, (int, float))}
                logger.log_metrics(numbers, step=module.step)

    def _evaluate(self, trainer: pl.Trainer, module: VariationalModule) -> dict[str, Any]:
        share: dict[str, Any] = {
            "rank": trainer.global_rank,
            "world_size": trainer.world_size,
            "reduce": sum_over_ranks,
        }
        theta, inference = module.theta, module.inference
        fitted = full_elbo(
            inference, theta, self._rows(self.folder, trainer), num_obs=self.folder.num_rows, seed=self.seed, **share
        )
        held_out = None
        if self.held_out is not None:
            held_out = held_out_elbo_per_row(
                inference, theta, self._rows(self.held_out, trainer),
                num_obs=self.folder.num_rows, num_held_out=self.held_out.num_rows, seed=self.seed, kl=fitted.kl, **share,
            )  # fmt: skip
        return {
            "elbo": fitted.elbo,
            "elbo_se": fitted.elbo_se,
            "elbo_per_row": fitted.elbo_per_row,
            "expected_log_likelihood": fitted.expected_log_likelihood,
            "kl": fitted.kl,
            "held_out_elbo_per_row": held_out,
        }

    def _facts(self, module: VariationalModule, seconds: float, world_size: int) -> dict[str, Any]:
        epochs = module.step / self.plan.steps_per_epoch
        rows = round(epochs * self.folder.num_rows)
        done = module.step >= module.update.horizon
        return {
            "rows": self.folder.num_rows,
            "held_out_rows": self.held_out.num_rows if self.held_out else 0,
            "steps": module.step,
            "epochs": epochs,
            "seconds": seconds,
            "rows_per_second": rows / max(seconds, 1e-9),
            "world_size": world_size,
            "stop_reason": "budget" if done else "max_time",
        }

    def _rows(self, folder: ShardFolder, trainer: pl.Trainer) -> Iterator[Rows]:
        """This rank's blocks: its columns as tensors, and the row ids."""
        module = trainer.lightning_module
        assert isinstance(module, VariationalModule)
        names, dtype = module.inference.model.arguments, module.theta.dtype
        for block in range(trainer.global_rank, len(folder.index.block_rows), trainer.world_size):
            columns = {n: to_tensor(folder.read_block(block, n), dtype).to(module.device) for n in names}
            yield columns, torch.from_numpy(folder.read_block(block, "row_id")).to(module.device)

    def _write(self, module: VariationalModule, metrics: dict[str, Any]) -> None:
        with atomic_write(self.run_dir / "metrics.json") as file:
            file.write(json.dumps(metrics, indent=1).encode())
        rows = summarise(module.inference, module.theta, self._first_rows(module), seed=self.seed)
        write_summary(self.run_dir / "summary.csv", rows)
        self.console.print(closing_table(rows))
        held_out = metrics["held_out_elbo_per_row"]
        self.console.print(
            f"ELBO {metrics['elbo']:,.3f} ± {metrics['elbo_se']:.2g} nats ({metrics['elbo_per_row']:.6g} per row"
            + (f", held out {held_out:.6g}" if held_out is not None else "")
            + f") · {metrics['steps']:,} steps in {metrics['seconds']:.1f} s"
            f" ({metrics['rows_per_second']:,.0f} rows/s) · {self.run_dir}"
        )

    def _first_rows(self, module: VariationalModule) -> Batch:
        names, dtype = module.inference.model.arguments, module.theta.dtype
        columns = {n: to_tensor(self.folder.read_block(0, n)[:64].copy(), dtype).to(module.device) for n in names}
        row_id = torch.from_numpy(self.folder.read_block(0, "row_id")[:64].copy()).to(module.device)
        count = torch.tensor(len(row_id), device=module.device)
        return Batch(columns, count, self.folder.num_rows / count.double(), row_id)
