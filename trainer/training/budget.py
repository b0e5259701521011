"""How long a run trains, and by which rounds of a schedule.

A budget in steps is that of the run, whatever its steps hold; one in epochs counts rows. Where a run goes on with
another end (another budget, or an epoch of more or fewer steps), what is past stays as it was, and the rounds to come
keep their places between now and the end.
"""

from dataclasses import asdict
from typing import NamedTuple, Protocol

from omegaconf import DictConfig, OmegaConf

from trainer.errors import UserError
from trainer.inference.objectives.objective import Objective
from trainer.inference.optim.rounds import Round, Update
from trainer.options import build
from trainer.options.verbs import Train

_ROUND_STEPS = 150  # of the shortest round


class Epochs(Protocol):
    """As much of a plan as a budget asks for."""

    @property
    def steps_per_epoch(self) -> int: ...

    def step_after(self, epochs: float) -> int:
        """The step by which so many epochs were taken."""
        ...


class Begun(NamedTuple):
    """What a run had taken and planned when it was saved."""

    step: int
    ends: list[int]
    """The steps at which its rounds end."""


def optimizer_of(cfg: Train, whitened: bool) -> DictConfig:
    """The optimizer's node, with the recipe's rates where it leaves them open."""
    rates = asdict(cfg.rates.whitened if whitened else cfg.rates.plain)
    left = {name: rates[name] for name, value in cfg.optimizer.items() if value is None and name in rates}
    return OmegaConf.merge(cfg.optimizer, left)  # type: ignore[return-value]


def update_of(cfg: Train, plan: Epochs, whitened: bool, anchored: int, begun: Begun | None = None) -> Update:
    """Optimizer, schedule and rounds, each of twice the steps of the one before; a round is at least an epoch."""
    epoch, horizon, share = plan.steps_per_epoch, _horizon(cfg, plan), cfg.averaging
    count, every = cfg.rounds, int(cfg.program.get("sync_every", 1))
    while count > 1 and horizon < (2**count - 1) * max(_ROUND_STEPS, epoch):
        count -= 1
    planned = [horizon * (2**number - 1) // (2**count - 1) for number in range(1, count)]
    if begun is not None:
        planned = moved(begun, horizon)
    optimizer, schedule = build.optimizer(cfg.optimizer), build.schedule(cfg.schedule)
    rounds, start = [], 0
    for end in (*(end // every * every for end in planned), horizon):
        if start < end <= horizon:
            length = int((end - start) * share)
            if length >= epoch:
                length = length // epoch * epoch
            rounds.append(Round(optimizer, schedule, end, end - length, start))
            start = end
    return Update(tuple(rounds), whitened, anchored)


def refuse_long_warmup(objective: Objective, update: Update) -> None:
    """Raises UserError where the result would be an average over steps of an objective's warm-up."""
    last = update.rounds[-1]
    if objective.warmup > last.average_from:
        raise UserError(
            f"objective.kl_warmup={objective.warmup} must be at most {last.average_from}, the step from which the "
            "result is averaged: shorten it, or train longer with max_steps=."
        )


def moved(begun: Begun, horizon: int) -> list[int]:
    """Where the rounds but the last end, for a run that now ends at ``horizon``."""
    step, (*ends, last) = begun
    return [end if end <= step else step + (end - step) * (horizon - step) // (last - step) for end in ends]


def _horizon(cfg: Train, plan: Epochs) -> int:
    limits = [n for n in (cfg.max_steps, cfg.max_epochs and plan.step_after(cfg.max_epochs)) if n]
    return min(limits) if limits else max(cfg.budget.steps, plan.step_after(cfg.budget.epochs))
