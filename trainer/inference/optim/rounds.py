"""How gradients become states: rounds of an optimizer and a schedule, and all that they change.

A round starts its optimizer and its average afresh: a second moment that remembers the way there makes the last steps
too small, and one that forgets soon is correlated with the gradient, which biases Adam's mean step by half of (1 -
beta2) times the gradient's skewness (rows of rare groups are skewed).

Shapes: P parameters, m rates.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.inference.optim.optimizers import Moments, Optimizer
from trainer.inference.optim.schedules import Schedule
from trainer.inference.optim.variance_reduction import Preconditioner, Snapshot


class State(NamedTuple):
    """All that changes while training."""

    step: Tensor
    """int64 []: steps taken; the only truth about progress."""
    theta: Tensor
    """[P] unconstrained parameters."""
    average: Tensor
    """[P] mean of the iterates since `Round.average_from`."""
    averaged: Tensor
    """int64 []: how many iterates that is."""
    moments: Moments
    """The optimizer's vectors by name, each [P]."""
    preconditioner: Preconditioner | None = None
    snapshot: Snapshot | None = None

    def named(self) -> dict[str, Tensor]:
        """Every tensor by its name, always in the same order."""
        return {
            **{name: getattr(self, name) for name in _OWN},
            **{f"optimizer.{name}": value for name, value in self.moments.items()},
            **{f"preconditioner.{name}": value for name, value in _of(self.preconditioner).items()},
            **{f"snapshot.{name}": value for name, value in _of(self.snapshot).items()},
        }

    @classmethod
    def of_named(cls, tensors: Mapping[str, Tensor]) -> "State":
        """The state of which `named` gives ``tensors``."""
        parts: dict[str, dict[str, Tensor]] = {"optimizer": {}, "preconditioner": {}, "snapshot": {}}
        for name, value in tensors.items():
            if name not in _OWN:
                part, _, own = name.partition(".")
                parts[part][own] = value
        curvature, point = parts["preconditioner"], parts["snapshot"]
        return cls(
            **{name: tensors[name] for name in _OWN},
            moments=parts["optimizer"],
            preconditioner=Preconditioner(**curvature) if curvature else None,
            snapshot=Snapshot(**point) if point else None,
        )

    def each(self, change: Callable[[Tensor], Tensor]) -> "State":
        """The state with ``change`` made to every tensor."""
        return State.of_named({name: change(value) for name, value in self.named().items()})


_OWN = ("step", "theta", "average", "averaged")


def _of(part: Preconditioner | Snapshot | None) -> dict[str, Tensor]:
    return {} if part is None else {name: value for name, value in part._asdict().items() if value is not None}


@dataclass(frozen=True)
class Round:
    """An optimizer and its schedule, from one step to another."""

    optimizer: Optimizer
    schedule: Schedule
    horizon: int
    """The step at which the schedule ends."""
    average_from: int
    """First step whose iterate enters the average; `horizon` for none."""
    start: int = 0
    """The step at which the schedule begins."""

    def lr(self, step: Tensor) -> Tensor:
        """The scheduled learning rate at ``step`` (int64 []), float64 []."""
        return self.optimizer.lr * self.schedule(step - self.start, self.horizon - self.start)

    def rates(self, step: Tensor, num_obs: float) -> Tensor:
        """The optimizer's rates [m] for the update at ``step`` (int64 []), float64."""
        return self.optimizer.rates(self.lr(step), step - self.start + 1, num_obs)

    def __call__(self, state: State, grad: Tensor, rates: Tensor) -> State:
        """The state after a step along ``grad`` [P], the gradient of loss / N."""
        fresh, preconditioner = state.step == self.start, state.preconditioner
        moments = {name: torch.where(fresh, 0.0, each) for name, each in state.moments.items()}
        if preconditioner is None:
            theta, new = self.optimizer.update(grad, moments, state.theta, rates)
        else:
            zero = torch.zeros_like(state.theta)
            moved, new = self.optimizer.update(preconditioner.of_gradient(grad), moments, zero, rates)
            theta = state.theta + preconditioner.of_step(moved)
        theta = theta.to(state.theta.dtype)
        moments = {name: new[name].to(old.dtype) for name, old in moments.items()}
        averaging = state.step >= self.average_from
        averaged = torch.where(averaging, state.averaged + 1, 0)
        mean = state.average + (theta - state.average) / averaged.clamp(min=1)
        average = torch.where(averaging, mean, theta)
        return state._replace(step=state.step + 1, theta=theta, average=average, averaged=averaged, moments=moments)


@dataclass(frozen=True)
class Update:
    """The rounds of a run, each beginning where the one before ends."""

    rounds: tuple[Round, ...]
    whitened: bool = False
    """Whether the state holds a `Preconditioner`."""
    anchored: int = 0
    """Locations of the state's `Snapshot`, at the head of theta; 0 for none."""

    @property
    def horizon(self) -> int:
        """The step at which the last round ends."""
        return self.rounds[-1].horizon

    def at(self, step: int) -> Round:
        """The round in which ``step`` lies."""
        return next(each for each in reversed(self.rounds) if step >= each.start)

    def init(self, theta: Tensor, preconditioner: Preconditioner | None = None) -> State:
        """The state before the first step; ``preconditioner`` where ``whitened``. A snapshot comes before the first."""
        zero = torch.zeros((), dtype=torch.int64, device=theta.device)
        snapshot = Snapshot.at(theta, self.anchored) if self.anchored else None
        moments = self.rounds[0].optimizer.init(theta)
        known = preconditioner and preconditioner.each(torch.clone)
        return State(zero, theta.clone(), theta.clone(), zero.clone(), moments, known, snapshot)


def one_round(
    optimizer: Optimizer,
    schedule: Schedule,
    horizon: int,
    average_from: int,
    *,
    whitened: bool = False,
    anchored: int = 0,
) -> Update:
    """An update of a single round."""
    return Update((Round(optimizer, schedule, horizon, average_from),), whitened, anchored)
