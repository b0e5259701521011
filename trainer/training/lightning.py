"""`VariationalModule`: a Pyro model and its guide in your own Lightning trainer, with the recipe of `svi train`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from rich.console import Console
from torch import Tensor

from trainer.distributed.comm import ALONE
from trainer.distributed.ranks import World
from trainer.engine.checkpoint import packed, unpacked
from trainer.engine.module import ChunkModule
from trainer.engine.train_state import TrainState
from trainer.errors import UserError
from trainer.inference.estimates.full_elbo import rough_elbo_per_row
from trainer.inference.estimates.passes import Pass
from trainer.inference.model.plates import Batch
from trainer.inference.setup import guide_factory
from trainer.inference.step import in_dtype
from trainer.options.allowed import typed
from trainer.options.entrance import of_call
from trainer.options.verbs import Train
from trainer.posterior.posterior import Posterior
from trainer.posterior.predictive import Asked, Prediction, predicted
from trainer.training.assemble import assembled
from trainer.training.final_evaluation import FinalEvaluation
from trainer.training.loader import AverageRounds, LoaderRun, begun
from trainer.training.prepare import Context, Given, prepare
from trainer.training.resume import Saved
from trainer.training.run import opened_splits
from trainer.training.shard_data import ShardData

_ENTRY = "svi_trainer"
_LOGGED = ("elbo", "elbo_per_row", "expected_log_likelihood", "kl_global", "kl_local", "learning_rate", "grad_norm")


class VariationalModule(ChunkModule):
    """Fits ``guide`` to the posterior of a Pyro ``model`` in ``pl.Trainer(...).fit(module, data)``.

    ``model``, ``guide``: as for `fit`. ``optimizer``: a choice of ``conf/optimizer``, as "adam". ``options``: anything
    else that `svi train` takes, as {"optimizer.lr": 0.01, "stop": "budget"}. ``num_obs``: N, where the data are not
    `ShardData` but a loader of dicts of tensors [B, ...], which cannot tell. ``progress``: whether rank 0 prints what
    is going on.

    A training step of Lightning's is a chunk of some optimization steps. With `ShardData` the result is bit for bit
    that of `svi train` with the same options. ``max_epochs`` and ``max_steps`` of the trainer are the budget;
    ``max_epochs=-1`` leaves it to the recipe. Logged, at each chunk and by the optimization step: ``elbo`` (nats),
    ``elbo_per_row``, its parts, ``learning_rate``, ``grad_norm``; by validation ``val_elbo_per_row``.

    Raises UserError, in ``fit``, for what cannot be right.
    """

    def __init__(  # noqa: PLR0913  what its user gives, by name
        self,
        model: Any,
        guide: Any = "mean_field",
        *,
        optimizer: str | None = None,
        options: Mapping[str, Any] | None = None,
        num_obs: int | None = None,
        seed: int = 0,
        dtype: str | None = None,
        progress: bool = True,
    ):
        super().__init__()
        given = {"seed": seed, "optimizer": optimizer, "dtype": dtype, **(options or {})}
        self.chosen = {name: value for name, value in given.items() if value is not None}
        self._takers, self._num_obs = Given(model, guide, keep=False), num_obs
        self.save_hyperparameters(ignore=["model", *(["guide"] if guide != "mean_field" else [])])
        self.progress = progress
        self.carrier = torch.nn.Parameter(torch.zeros(()))
        """What Lightning's optimizer holds and DDP wraps; the parameters are those of ``state``."""
        self._float_type = torch.get_default_dtype()
        self._progress: TrainState | None = None
        self._saved: Saved | None = None
        self._trains = False
        self._posterior: dict[str, Any] | None = None
        self._final: FinalEvaluation | None = None
        self._loader: LoaderRun | None = None
        self.steering: list[Callback] = []

    def configure_callbacks(self) -> list[Callback]:
        return [_Steering()]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.carrier], lr=0.0)

    def setup(self, stage: str) -> None:
        self._trains = stage == "fit"
        if not self._trains:
            return
        self._saved = self._final = self._loader = None
        if self._shards is None and self._num_obs is None:
            raise UserError("num_obs= is missing: a loader cannot tell how many rows there are in all, so give it.")

    def _begin_on_shards(self, data: ShardData) -> None:
        """Prepares the run that `svi train` would make of the same options."""
        context = self._context()
        with in_dtype(torch.get_default_dtype()):  # a run chooses its own
            cfg, splits = opened_splits(self._config(data.chosen), context)
            prepared = prepare(cfg, context, splits, self._takers, self._saved)
            self._float_type = torch.get_default_dtype()
            made = assembled(prepared, context, by_epoch=True)
            update, state, record = prepared.update, prepared.state, prepared.record
            self.begin(update, made.program, state, made.data, record.seconds, context.console.print)
        made.data.trainer = self.trainer
        self._progress, self.steering = record, [*made.snapshots, made.stop]
        self._final = FinalEvaluation(made.full, made.held, prepared.plan, cfg.seed, made.stop)
        data.serve(self, made.data, made.full, made.held)

    def _context(self) -> Context:
        trainer = self.trainer
        here = World(trainer.world_size, trainer.num_devices, trainer.global_rank, external=True)
        console = Console(quiet=not self.progress or here.rank != 0, highlight=False, soft_wrap=True)
        return Context(Path(trainer.default_root_dir), here, torch.get_num_threads(), console)

    def _config(self, of_data: Mapping[str, Any]) -> Train:
        """The record of `svi train`, the trainer's budget in it."""
        epochs, steps = self.trainer.max_epochs, self.trainer.max_steps
        budget = {"max_epochs": epochs if epochs and epochs > 0 else None, "max_steps": steps if steps > 0 else None}
        chosen = {**self.chosen, **of_data, **{name: count for name, count in budget.items() if count is not None}}
        names = typed([f"{name}={value}" for name, value in chosen.items()])
        made: Train = of_call("train", {"allow": names, **chosen})
        return made

    @property
    def _shards(self) -> ShardData | None:
        """The trainer's data, where they are shards."""
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, ShardData) else None

    def on_fit_start(self) -> None:
        if self._shards is not None:  # a checkpoint, which may change the plan, has been read
            self._begin_on_shards(self._shards)
            with in_dtype(self._float_type):
                super().on_fit_start()

    def on_train_start(self) -> None:
        if self._final is None:
            self._begin_on_loader()
        super().on_train_start()

    def _begin_on_loader(self) -> None:
        """Prepares a run on the trainer's own loader, which is not to be had before."""
        assert self._num_obs is not None
        context, steps = self._context(), int(self.trainer.estimated_stepping_batches)
        with in_dtype(torch.get_default_dtype()):  # a run chooses its own
            cfg = self._config({"data.path": "a loader", "max_steps": steps})
            run = begun(self.trainer, cfg, context, self._takers, self._num_obs, self._saved)
            self._float_type = torch.get_default_dtype()
        self._loader, self._progress, self.steering = run, run.record, [AverageRounds()]
        self.begin(run.update, run.program, run.state, None, run.record.seconds, context.console.print)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        with in_dtype(self._float_type):
            chunk = batch if self._loader is None else self._loader.chunk(batch)
            super().training_step(chunk, batch_idx)
        optimizer: Any = self.optimizers()
        optimizer.param_groups[0]["lr"] = self.last["learning_rate"]
        optimizer.step()  # of nothing: Lightning counts chunks by it
        shown = {name: self.last[name] for name in _LOGGED}
        self.log_dict({**shown, "step": float(self.step)}, batch_size=1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self._final is None and self._loader is None and self.trainer.sanity_checking:
            return  # before there is anything to validate
        with in_dtype(self._float_type), torch.enable_grad():
            if self._final is not None and self._final.held_out is not None:
                rows, size = self._final.held_out.once(self.theta, self.step, self._seed), 1
            else:
                block = self._run_of_loader().block(batch, batch_idx)
                rows, size = Pass([block], 1, self._seed, ALONE.sum), len(block.row_id)
            found = rough_elbo_per_row(self.inference, self.theta, rows)
        self.log("val_elbo_per_row", found, batch_size=size, sync_dist=self._final is None, prog_bar=True)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Prediction]:
        with in_dtype(self._float_type), torch.enable_grad():
            rows = batch if isinstance(batch, Batch) else self._run_of_loader().rows(batch)
            return predicted(self.inference, self._result, rows, Asked(seed=self._seed))

    def on_train_end(self) -> None:
        self.program.abandon()
        if self._final is not None:
            with in_dtype(self._float_type):
                self._final(self)

    def posterior(self) -> Posterior:
        """The fitted posterior, of the parameters so far; after `load_from_checkpoint` that of the checkpoint.

        Raises UserError where nothing was fitted.
        """
        with in_dtype(self._float_type):
            if self._final is not None:
                return self._final.posterior(self)
            if self._loader is not None:
                return self._loader.posterior(self)
            if self._posterior is None:
                raise UserError("the module has no posterior yet: call trainer.fit(module, data) first.")
            return Posterior.of_content(
                self._posterior,
                self._takers.model,
                lambda columns, plate: guide_factory(self._takers.guide, columns, plate),
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._progress is None:
            return
        self._progress.seconds = self.seconds
        content = packed(self.state, self._progress.state_dict())
        checkpoint[_ENTRY] = {**content, "posterior": self.posterior().content()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if _ENTRY not in checkpoint:
            raise UserError(
                "the checkpoint is not one of a VariationalModule that has trained: give another ckpt_path=."
            )
        if self._trains:
            state, facts = unpacked(checkpoint[_ENTRY], "the checkpoint")
            self._saved = state, TrainState.of(facts)
        else:
            self._posterior = checkpoint[_ENTRY]["posterior"]

    @property
    def _result(self) -> Tensor:
        """theta [P] of the posterior."""
        return self.theta if self._final is None or self._final.theta is None else self._final.theta

    @property
    def _seed(self) -> int:
        return int(self.chosen["seed"])

    def _run_of_loader(self) -> LoaderRun:
        if self._loader is None:
            raise UserError("the module has no parameters yet: call trainer.fit(module, loader) first.")
        return self._loader


class _Steering(Callback):
    """Has the recipe's callbacks see what the trainer's see, before those that save."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        _pass_on("on_train_start", trainer, module)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        _pass_on("on_train_batch_start", trainer, module, *args)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        assert isinstance(module, VariationalModule)
        _pass_on("on_train_batch_end", trainer, module, *args)
        if module.step >= module.update.horizon:
            trainer.should_stop = True

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(module, VariationalModule) and hasattr(module, "program"):
            module.program.abandon()  # what compiles meanwhile


def _pass_on(hook: str, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
    assert isinstance(module, VariationalModule)
    with in_dtype(module._float_type):
        for each in module.steering:
            getattr(each, hook)(trainer, module, *args)
