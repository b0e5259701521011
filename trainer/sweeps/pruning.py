"""A run that is a trial of a study tells it how far it has come, and ends early where the study's pruner says so."""

from functools import cached_property
from typing import Any

import optuna
import pytorch_lightning as pl
from omegaconf import OmegaConf
from pytorch_lightning import Callback

from trainer.data.shards.folder import ShardFolder
from trainer.engine.module import ChunkModule
from trainer.engine.train_state import TrainState
from trainer.errors import UserError
from trainer.inference.estimates.full_elbo import rough_elbo_per_row
from trainer.options import build
from trainer.options.allowed import refuse_others
from trainer.options.verbs import Trial
from trainer.posterior.full_data import FullData
from trainer.sweeps.study import open_storage

PARTS = 15  # of the budget, each with a report at its end: rounds end after 1, 3 and 7 of them
_ROWS = 16_384  # at least, that a report looks at: the same ones in all trials, whose noise is then common to them


class PruningCallback(Callback):
    """Reports the ELBO per row of ``rows`` (the held-out ones, where there are any) at each step of `ends`.

    ``node``: the option `trial`; ``unit``: what the steps of `ends` are multiples of; ``record``
    keeps the reason to stop.
    """

    def __init__(
        self,
        node: Trial,
        rows: FullData,
        seed: int,
        horizon: int,
        unit: int,
        record: TrainState,
    ):
        self.node, self.rows, self.seed, self.record = node, rows, seed, record
        self.ends = [part * horizon // PARTS // unit * unit for part in range(1, PARTS)]

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        assert isinstance(module, ChunkModule)
        if module.step not in self.ends or trainer.should_stop:
            return
        rows = self.rows.once(module.theta, module.step, self.seed, few_blocks(self.rows.folder))
        value = rough_elbo_per_row(module.inference, module.theta, rows)
        end = trainer.is_global_zero and self._is_pruned(self.ends.index(module.step) + 1, value)
        if module.comm.largest(int(end), module.device):
            self.record.stopped = "pruned"
            trainer.should_stop = True

    def _is_pruned(self, part: int, value: float) -> bool:
        found = self._study._storage.get_trial(self._trial._trial_id)
        if found.state.is_finished():
            raise UserError(
                f"trial {found.number} of study {self.node.study} was given up by its sweep: nothing awaits it."
            )
        if part not in found.intermediate_values:  # else: resumed
            self._trial.report(value, part)
        if not self._trial.should_prune():
            return False
        self._trial.set_user_attr("pruned", part)
        return True

    @cached_property
    def _trial(self) -> optuna.Trial:
        number = self.node.number
        return optuna.Trial(self._study, self._study.get_trials(deepcopy=False)[number]._trial_id)

    @cached_property
    def _study(self) -> optuna.Study:
        """Opened once, not at every report."""
        study = optuna.load_study(storage=open_storage(self.node.storage), study_name=self.node.study)
        pruner = OmegaConf.create(study.user_attrs["pruner"])
        refuse_others(pruner, ["optuna.pruners"])
        study.pruner = build.make(pruner)
        return study


def few_blocks(folder: ShardFolder) -> int:
    """How many blocks a report looks at."""
    rows = folder.block_rows.cumsum()
    return min(len(rows), int((rows < _ROWS).sum()) + 1)
