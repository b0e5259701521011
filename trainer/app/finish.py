"""The end of a run: the exact figures of the final parameters, and the files that hold them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from rich.console import Console

from trainer.app.blocks import block, blocks
from trainer.app.stop import Stop
from trainer.data.plan import Plan
from trainer.data.reader import ShardFolder
from trainer.data.store import atomic_write
from trainer.lit.module import VariationalModule
from trainer.lit.signals import StopOnSignal
from trainer.lit.strategy import sum_over_ranks
from trainer.posterior.elbo import full_elbo, held_out_elbo_per_row
from trainer.posterior.posterior import Posterior
from trainer.posterior.prior_check import far_from_prior
from trainer.posterior.summary import summarise, write_summary
from trainer.posterior.table import closing_table
from trainer.svi.guides import MeanField
from trainer.svi.plates import Batch

_SUMMARY_ROWS = 64  # of the data, for models whose latents take their shapes from it


class Finish(Callback):
    """Evaluates the answer on all ranks (unless a signal ended the run) and writes metrics.json and summary.csv.

    ``shown`` ends the closing line.
    """

    def __init__(
        self,
        run_dir: Path,
        folder: ShardFolder,
        held_out: ShardFolder | None,
        plan: Plan,
        seed: int,
        console: Console,
        signals: StopOnSignal,
        stop: Stop,
        shown: str,
    ):
        self.signals, self.stop = signals, stop
        self.run_dir, self.folder, self.held_out, self.plan = run_dir, folder, held_out, plan
        self.seed, self.console = seed, console
        self.shown = shown
        self.headline = float("nan")
        self.metrics: dict[str, Any] = {}

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, VariationalModule)
        if self.signals.received:
            return
        seconds = module.seconds
        metrics = {**self._evaluate(trainer, module), **self._facts(module, seconds, trainer.world_size)}
        self.metrics = metrics
        self.headline = metrics["held_out_elbo_per_row"] or metrics["elbo_per_row"]
        if trainer.is_global_zero:
            self._write(module, metrics)
            for logger in trainer.loggers:
                numbers = {f"final/{k}": v for k, v in metrics.items() if isinstance(v, (int, float))}
                logger.log_metrics(numbers, step=module.step)

    def _evaluate(self, trainer: pl.Trainer, module: VariationalModule) -> dict[str, Any]:
        theta, inference = module.theta, module.inference
        _, whitening, _ = module.update.split(module.state.slots)
        here, count = blocks(self.folder, trainer), len(self.folder.block_rows)
        fitted = full_elbo(inference, theta, here, count, self.seed, sum_over_ranks, whitening)
        held_out = None
        if self.held_out is not None:
            here, count = blocks(self.held_out, trainer), len(self.held_out.block_rows)
            held_out = held_out_elbo_per_row(inference, theta, here, count, self.seed, sum_over_ranks, fitted)
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
        passes = self.stop.facts.get("passes", 0)
        rows = round((epochs + passes) * self.folder.num_rows)
        done = module.step >= module.update.horizon
        return {
            "rows": self.folder.num_rows,
            "held_out_rows": self.held_out.num_rows if self.held_out else 0,
            "steps": module.step,
            "epochs": epochs,
            "passes": passes,
            "seconds": seconds,
            "rows_per_second": rows / max(seconds, 1e-9),
            "world_size": world_size,
            "stop_reason": self.stop.facts.get("stopped") or ("budget" if done else "max_time"),
            "evidence": self.stop.evidence and self.stop.evidence._asdict(),
        }

    def posterior(self, module: VariationalModule) -> Posterior:
        """The answer, with a few rows of the training data."""
        first = block(self.folder, 0, module, rows=_SUMMARY_ROWS)
        count = torch.tensor(len(first.row_id), device=module.device)
        rows = Batch(first.columns, count, self.folder.num_rows / count.double(), first.row_id)
        index = dataclasses.replace(self.folder.index, shards=())
        return Posterior(module.inference, module.theta.detach().clone(), rows, index, self.metrics)

    def _write(self, module: VariationalModule, metrics: dict[str, Any]) -> None:
        with atomic_write(self.run_dir / "metrics.json") as file:
            file.write(json.dumps(metrics, indent=1).encode())
        posterior = self.posterior(module)
        posterior.save(self.run_dir / "posterior.pt")
        sites = summarise(module.inference, module.theta, posterior.rows, seed=self.seed)
        write_summary(self.run_dir / "summary.csv", sites)
        for sentence in far_from_prior(module.inference, module.theta, posterior.rows):
            self.console.print(sentence)
        parameters = module.inference.parameters
        own = {n: v for n, v in parameters.constrain(parameters.unflatten(module.theta)).items() if n[:6] != "guide."}
        self.console.print(closing_table(sites, own if isinstance(module.inference.guide, MeanField) else None))
        held_out = metrics["held_out_elbo_per_row"]
        self.console.print(
            f"ELBO {metrics['elbo']:,.3f} ± {metrics['elbo_se']:.2g} nats ({metrics['elbo_per_row']:.6g} per row"
            + (f", held out {held_out:.6g}" if held_out is not None else "")
            + f") · {metrics['steps']:,} steps in {metrics['seconds']:.1f} s"
            f" ({metrics['rows_per_second']:,.0f} rows/s){self.shown}"
        )
