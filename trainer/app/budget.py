"""How long a run trains, and by which rounds of a schedule.

A budget in steps is that of the run, whatever its steps hold; one in epochs counts rows. Where a run goes on with
another end (another budget, or an epoch of more or fewer steps), what is past stays as it was, and the rounds to come
keep their places between now and the end.
"""

import math
from typing import Any, NamedTuple

from omegaconf import DictConfig

from trainer.app import build
from trainer.data.plan import Plan
from trainer.errors import UserError
from trainer.svi.step import Update

_ROUND_STEPS = 150  # of the shortest round


class Begun(NamedTuple):
    """What a run had taken and planned when it was saved."""

    step: int
    ends: list[int]
    """The steps at which its rounds end."""


def update_of(cfg: DictConfig, plan: Plan, whitened: bool, anchored: int, begun: Begun | None = None) -> Update:
    """Optimiser, schedule and rounds, each of twice the steps of the one before; a round is at least an epoch."""
    epoch, horizon, share = plan.steps_per_epoch, _horizon(cfg, plan), float(cfg.averaging)
    if not 0 <= share < 1:
        raise UserError(f"averaging={share} must lie in [0, 1): the last share of a round whose iterates are averaged.")
    count, every = int(cfg.rounds), int(cfg.program.get("sync_every", 1))
    if count < 1:
        raise UserError(f"rounds={count} must be at least 1.")
    while count > 1 and horizon < (2**count - 1) * max(_ROUND_STEPS, epoch):
        count -= 1
    planned = [horizon * (2**number - 1) // (2**count - 1) for number in range(1, count)]
    if begun is not None:
        planned = moved(begun, horizon)
    rates = cfg.rates.whitened if whitened else cfg.rates.plain
    for name in [name for name, value in cfg.optimizer.items() if value is None and name in rates]:
        cfg.optimizer[name] = rates[name]
    optimizer, schedule = build.optimizer(cfg.optimizer), build.schedule(cfg.schedule)
    update, start = None, 0
    for end in (*(end // every * every for end in planned), horizon):
        if start < end <= horizon:
            length = int((end - start) * share)
            if length >= epoch:
                length = length // epoch * epoch
            update = Update(optimizer, schedule, end, end - length, start, update, whitened, anchored)
            start = end
    assert update is not None
    return update


def moved(begun: Begun, horizon: int) -> list[int]:
    """Where the rounds but the last end, for a run that now ends at ``horizon``."""
    step, (*ends, last) = begun
    return [end if end <= step else step + (end - step) * (horizon - step) // (last - step) for end in ends]


def _horizon(cfg: DictConfig, plan: Plan) -> int:
    steps, epochs = (_limit(name, cfg[name]) for name in ("max_steps", "max_epochs"))
    limits = [int(n) for n in (steps, epochs and plan.step_after(epochs)) if n]
    return min(limits) if limits else max(int(cfg.budget.steps), plan.step_after(float(cfg.budget.epochs)))


def _limit(name: str, value: Any) -> float | None:
    try:
        found = None if value is None else float(value)
    except (TypeError, ValueError):
        found = 0.0
    if found is not None and not (0 < found < math.inf and (name != "max_steps" or found == int(found))):
        raise UserError(f"{name}={value} must be a number above 0{', and whole' if name == 'max_steps' else ''}.")
    return found
