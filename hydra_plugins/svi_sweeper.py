"""`hydra/sweeper=optuna` of `svi train -m`. Hydra finds its plugins in this namespace package, at the start of every
Hydra program of an environment: nothing heavy is imported here.
"""

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSweeper(Sweeper):
    """Trials of an Optuna study as jobs of the chosen launcher; conf/hydra/sweeper/optuna.yaml has the options."""

    def __init__(  # noqa: PLR0913  the fields of its config
        self,
        n_trials: int,
        n_jobs: int,
        storage: str,
        study_name: str,
        sampler: DictConfig,
        pruner: DictConfig,
        params: DictConfig,
    ):
        self.n_trials, self.n_jobs, self.storage, self.study_name = n_trials, n_jobs, storage, study_name
        self.sampler, self.pruner, self.params = sampler, pruner, params

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from trainer.cli import guarded

        def search() -> float:
            try:
                from trainer.sweeps.sweep import sweep
            except ModuleNotFoundError as error:
                from trainer.errors import UserError

                raise UserError(
                    f"hydra/sweeper=optuna needs the package {error.name}: pip install 'svi-trainer[sweeps]'."
                ) from error
            return sweep(self, arguments)

        return guarded("train", search, bool(self.config.get("debug")))
