"""The options of what a config has made: those of our own classes, and of others' that files of conf/ name.

A record here has the options that a class takes, by its full name in `RECORDS`; a class of anybody else's has its own,
which are compared with its signature when it is made. ``IS_OPEN``: a class of others', with more options than these.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from trainer.options.kinds import Count, Names, NotNegative, Part, Positive, Range, Seed, Share, Within


@dataclass(frozen=True)
class Adam:
    lr: Positive | None
    beta1: Share
    beta2: Share | None
    eps: Positive
    weight_decay: NotNegative
    decoupled: bool


@dataclass(frozen=True)
class ClippedAdam(Adam):
    clip: Positive


@dataclass(frozen=True)
class SGD:
    lr: Positive | None
    momentum: Share


@dataclass(frozen=True)
class Nothing:
    """A class that takes no options."""


@dataclass(frozen=True)
class RobbinsMonro:
    delay: NotNegative
    forgetting: Annotated[float, Range(0.5, 1, "(]")]


@dataclass(frozen=True)
class Cosine:
    final: Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class OneCycle:
    warmup: Within
    start: Annotated[float, Range(0, 1)]
    final: Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class LocalSteps:
    sync_every: Count


@dataclass(frozen=True)
class Objective:
    kl: Literal["analytic", "monte_carlo", "sticking_the_landing"]
    antithetic: bool
    pairs: Annotated[int, Range(1, 10_000)] | None
    kl_weight: Annotated[float, Range(0, 1)]
    kl_warmup: Count


@dataclass(frozen=True)
class Renyi:
    alpha: Annotated[float, Range(0, 1)]
    draws: Annotated[int, Range(1, 10_000)]
    doubly: bool


@dataclass(frozen=True)
class Gaussian:
    init_scale: Positive


@dataclass(frozen=True)
class LowRank(Gaussian):
    rank: Count | None


@dataclass(frozen=True)
class BySite(Gaussian):
    sites: dict[str, str]
    others: Literal["mean_field", "block", "full_rank"]


@dataclass(frozen=True)
class Arrow(Gaussian):
    top: Names | None


@dataclass(frozen=True)
class Rule:
    mc_error: Positive
    scale_error: Positive
    rhat: Annotated[float, Range(1)]
    gradient: Positive
    gain: Positive


@dataclass(frozen=True)
class TensorBoard:
    IS_OPEN: ClassVar[bool] = True
    save_dir: str
    name: str | None
    version: Literal[""] | int | str | None


@dataclass(frozen=True)
class MLFlow:
    IS_OPEN: ClassVar[bool] = True
    experiment_name: str
    tracking_uri: str | None
    artifact_location: str | None


@dataclass(frozen=True)
class Wandb:
    IS_OPEN: ClassVar[bool] = True
    project: str | None
    name: str | None
    group: str | None
    job_type: str | None
    save_dir: str


@dataclass(frozen=True)
class OptunaSweeper:
    n_trials: Count
    n_jobs: Annotated[int, Range(1, 100_000)]
    storage: str
    study_name: str
    params: dict[str, Any]
    sampler: Part
    pruner: Part


@dataclass(frozen=True)
class Sampler:
    IS_OPEN: ClassVar[bool] = True
    seed: Annotated[int, Range(0, 2**32 - 1)] | None


@dataclass(frozen=True)
class Tpe(Sampler):
    n_startup_trials: Annotated[int, Range(0)]
    multivariate: bool
    constant_liar: bool


@dataclass(frozen=True)
class Grid:
    seed: Seed | None


@dataclass(frozen=True)
class MedianPruner:
    IS_OPEN: ClassVar[bool] = True
    n_startup_trials: Annotated[int, Range(0)]
    n_warmup_steps: Annotated[int, Range(0)]


@dataclass(frozen=True)
class HalvingPruner:
    IS_OPEN: ClassVar[bool] = True
    min_resource: Count | Literal["auto"]
    reduction_factor: Annotated[int, Range(2)]


@dataclass(frozen=True)
class SlurmLauncher:
    IS_OPEN: ClassVar[bool] = True
    timeout_min: Count
    cpus_per_task: Count | None
    array_parallelism: Count
    additional_parameters: dict[str, Any]


RECORDS: dict[str, type] = {
    "trainer.inference.optim.optimizers.Adam": Adam,
    "trainer.inference.optim.optimizers.ClippedAdam": ClippedAdam,
    "trainer.inference.optim.optimizers.SGD": SGD,
    "trainer.inference.optim.schedules.Constant": Nothing,
    "trainer.inference.optim.schedules.RobbinsMonro": RobbinsMonro,
    "trainer.inference.optim.schedules.Cosine": Cosine,
    "trainer.inference.optim.schedules.OneCycle": OneCycle,
    "trainer.inference.programs.auto.Auto": Nothing,
    "trainer.inference.programs.program.Eager": Nothing,
    "trainer.inference.programs.fused.Fused": Nothing,
    "trainer.inference.programs.local_steps.LocalSteps": LocalSteps,
    "trainer.inference.objectives.elbo.ELBO": Objective,
    "trainer.inference.objectives.renyi.Renyi": Renyi,
    "trainer.inference.guides.mean_field.MeanField": Gaussian,
    "trainer.inference.guides.full_rank.FullRank": Gaussian,
    "trainer.inference.guides.block.Block": Gaussian,
    "trainer.inference.guides.low_rank.LowRank": LowRank,
    "trainer.inference.guides.by_site.BySite": BySite,
    "trainer.inference.guides.arrow.Arrow": Arrow,
    "trainer.inference.guides.point.Point": Nothing,
    "trainer.inference.guides.auto_laplace.LaplaceOfGlobals": Nothing,
    "trainer.inference.recipe.convergence.Rule": Rule,
    "pytorch_lightning.loggers.TensorBoardLogger": TensorBoard,
    "pytorch_lightning.loggers.MLFlowLogger": MLFlow,
    "pytorch_lightning.loggers.WandbLogger": Wandb,
    "hydra_plugins.svi_sweeper.OptunaSweeper": OptunaSweeper,
    "optuna.samplers.RandomSampler": Sampler,
    "optuna.samplers.TPESampler": Tpe,
    "trainer.sweeps.study.Grid": Grid,
    "optuna.pruners.MedianPruner": MedianPruner,
    "optuna.pruners.SuccessiveHalvingPruner": HalvingPruner,
    "optuna.pruners.NopPruner": Nothing,
    "hydra_plugins.svi_launcher.SlurmLauncher": SlurmLauncher,
}
