"""The end of a run: the exact metrics of the final parameters, and the files that hold them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from rich.console import Console

from trainer.data.plan import Plan
from trainer.data.shards.verify import LEFT_OUT
from trainer.data.store import atomic_write
from trainer.engine.metrics import MetricsFile
from trainer.engine.module import ChunkModule
from trainer.errors import counted
from trainer.inference.estimates.full_elbo import full_elbo, held_out_elbo_per_row
from trainer.inference.model.plates import Batch
from trainer.posterior.draws import parameters_of
from trainer.posterior.full_data import FullData
from trainer.posterior.posterior import Posterior
from trainer.posterior.prior_check import far_from_prior
from trainer.posterior.summary import summarize, write_summary
from trainer.posterior.table import closing_table
from trainer.training.stop import Stop

_METRICS = "metrics.json"
_SUMMARY_ROWS = 64  # of the data, for models whose latents take their shapes from it


class FinalEvaluation:
    """The result of a run and its metrics, exact over all rows, on all ranks."""

    def __init__(self, rows: FullData, held_out: FullData | None, plan: Plan, seed: int, stop: Stop):
        self.rows, self.held_out, self.plan, self.seed, self.stop = rows, held_out, plan, seed, stop
        self.metrics: dict[str, Any] = {}
        self.theta: torch.Tensor | None = None
        """[P], of the posterior, once it is known."""

    def __call__(self, module: ChunkModule) -> dict[str, Any]:
        """Evaluates the parameters that training has come to, in some passes over all rows."""
        seconds, self.theta = module.seconds, self._result(module)
        self.metrics = {**self._evaluated(module, self.theta), **self._counts(module, seconds)}
        return self.metrics

    def _result(self, module: ChunkModule) -> torch.Tensor:
        """Where training has come to, with what the guide makes of the curvature there."""
        theta, guide, parameters = module.theta, module.inference.guide, module.inference.parameters
        if not guide.curved:
            return theta
        hessian = self.stop.end_round.loss.hessian(module.step, theta, guide.curved)
        values = {**parameters.unflatten(theta), **guide.ended(hessian)}
        return module.comm.from_first(parameters.flatten(values).to(theta.dtype))

    def _evaluated(self, module: ChunkModule, theta: torch.Tensor) -> dict[str, Any]:
        inference, sweep = module.inference, module.program.sweep()
        rows = self.rows.once(theta, module.step, self.seed)
        fitted = full_elbo(inference, theta, rows, module.state.preconditioner, sweep)
        held_out = None
        if self.held_out is not None:
            rows = self.held_out.once(theta, module.step, self.seed)
            held_out = held_out_elbo_per_row(inference, theta, rows, fitted, sweep)
        return {
            "elbo": fitted.elbo,
            "elbo_se": fitted.elbo_se,
            "elbo_per_row": fitted.elbo_per_row,
            "expected_log_likelihood": fitted.expected_log_likelihood,
            "kl": fitted.kl,
            "held_out_elbo_per_row": held_out,
        }

    def _counts(self, module: ChunkModule, seconds: float) -> dict[str, Any]:
        epochs = self.plan.epochs_at(module.step)
        passes = self.stop.record.passes
        rows = round((epochs + passes) * self.rows.folder.num_rows)
        done = module.step >= module.update.horizon
        return {
            "rows": self.rows.folder.num_rows,
            "held_out_rows": self.held_out.folder.num_rows if self.held_out else 0,
            **self._left_out(),
            "steps": module.step,
            "epochs": epochs,
            "passes": passes,
            "seconds": seconds,
            "rows_per_second": rows / max(seconds, 1e-9),
            "world_size": module.comm.size,
            "stop_reason": self.stop.record.stopped or ("budget" if done else "max_time"),
            "evidence": self.stop.record.evidence,
            "guide": module.inference.guide.kind,
        }

    def _left_out(self) -> dict[str, Any]:
        """What `data.on_corrupt=quarantine` left out: rows, and the blocks of each shard of each split."""
        train, held_out = (
            each.folder.index.meta.get(LEFT_OUT, {}) if each else {} for each in (self.rows, self.held_out)
        )
        return {
            "rows_left_out": train.get("rows", 0),
            "held_out_rows_left_out": held_out.get("rows", 0),
            "blocks_left_out": {"train": train.get("shards", {}), "held_out": held_out.get("shards", {})},
        }

    def posterior(self, module: ChunkModule) -> Posterior:
        """The posterior of what training has come to, with a few rows of the training data."""
        first = self.rows.block(0, module.theta, rows=_SUMMARY_ROWS)
        rows = Batch.whole(first.columns, first.row_id, self.rows.folder.num_rows)
        index = dataclasses.replace(self.rows.folder.index, shards=())
        theta = module.theta if self.theta is None else self.theta
        return Posterior(module.inference, theta.detach().clone(), rows, index, self.metrics)


class Finish(Callback):
    """Evaluates the result on all ranks and writes posterior.pt, summary.csv and, when all is there, metrics.json.

    ``shown`` ends the closing line.
    """

    def __init__(self, run_dir: Path, final: FinalEvaluation, console: Console, figures: MetricsFile, shown: str):
        self.run_dir, self.final, self.console, self.figures, self.shown = run_dir, final, console, figures, shown
        self.headline = float("nan")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, ChunkModule)
        metrics = self.final(module)
        self.headline = metrics["held_out_elbo_per_row"] or metrics["elbo_per_row"]
        if trainer.is_global_zero:
            self._write(module, metrics)
            numbers = {f"final/{k}": v for k, v in metrics.items() if isinstance(v, (int, float))}
            self.figures.to_loggers(trainer, numbers, module.step)

    def posterior(self, module: ChunkModule) -> Posterior:
        """The result; of a run that had ended before, as its file holds it."""
        found = self.final.posterior(module)
        if self.final.theta is None and module.inference.guide.curved:
            theta = torch.load(self.run_dir / "posterior.pt", weights_only=True)["theta"]
            return dataclasses.replace(found, theta=theta.to(module.device))
        return found

    def _write(self, module: ChunkModule, metrics: dict[str, Any]) -> None:
        posterior = self.posterior(module)
        posterior.save(self.run_dir / "posterior.pt")
        sites = summarize(module.inference, posterior.theta, posterior.rows, seed=self.final.seed)
        write_summary(self.run_dir / "summary.csv", sites)
        with atomic_write(self.run_dir / _METRICS) as file:
            file.write(f"{json.dumps(metrics, indent=1)}\n".encode())
        for sentence in far_from_prior(module.inference, posterior.theta, posterior.rows):
            self.console.print(sentence)
        self.console.print(closing_table(sites, parameters_of(module.inference, posterior.theta, posterior.rows)))
        held_out = metrics["held_out_elbo_per_row"]
        self.console.print(
            f"ELBO {metrics['elbo']:,.3f} ± {shown_error(metrics['elbo_se'])} nats "
            f"({metrics['elbo_per_row']:.6g} per row"
            + (f", held out {held_out:.6g}" if held_out is not None else "")
            + f") · {counted(metrics['steps'], 'step')} in {metrics['seconds']:.1f} s"
            f" ({metrics['rows_per_second']:,.0f} rows/s){self.shown}"
        )


def shown_error(se: float) -> str:
    """A standard error beside a figure of three decimals: one of rounding alone is none."""
    return "0.000" if se < 5e-4 else f"{se:.2g}"


def is_finished(run_dir: Path, step: int) -> bool:
    """Whether the result of ``step`` steps was evaluated, and written."""
    try:
        return bool(json.loads((run_dir / _METRICS).read_bytes())["steps"] == step)
    except (FileNotFoundError, ValueError, KeyError):
        return False
