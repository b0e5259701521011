"""One optimization step as one pure function: `step(state, noise, batch, rates) -> (state, terms, grad_norm)`.

Every rank evaluates the draws whose lanes it holds, sums are all-reduced, and every rank makes the same update from the
same gradient. Global terms count once over all ranks; terms inside the data plate are sums over the rows that each
rank holds, at scale N / (rows of the global batch). Robbins and Monro (1951); Hoffman et al. (2013).

Shapes: P parameters, S sites, A lane groups of this rank, R = pairs draws per group, B rows of a group.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from trainer.distributed.comm import Comm
from trainer.inference.guides.gaussian import GaussianView
from trainer.inference.guides.mean_field import Guide, Noise
from trainer.inference.model.parameters import Parameters
from trainer.inference.model.plates import Batch, PlatedModel
from trainer.inference.model.ragged import Column
from trainer.inference.objectives.elbo import Kind, Objective, elbo_terms
from trainer.inference.optim.optimizers import Optimizer, Slots
from trainer.inference.optim.schedules import Schedule
from trainer.inference.optim.variance_reduction import Preconditioner, Snapshot


@contextmanager
def in_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch's default floating type, for models that make tensors of their own."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class State(NamedTuple):
    """All that changes while training."""

    step: Tensor
    """int64 []: steps taken; the only truth about progress."""
    theta: Tensor
    """[P] unconstrained parameters."""
    slots: Slots
    """The optimizer's vectors, each [P]."""
    average: Tensor
    """[P] mean of the iterates since `average_from`."""
    averaged: Tensor
    """int64 []: how many iterates that is."""


class StepNoise(NamedTuple):
    elements: Tensor
    """[A, R, E]."""
    rows: Tensor | None
    """[A, R, B, n]."""
    seeds: tuple[tuple[int, ...], ...]
    """[A][R] seeds for draws that are no transformation of a normal."""


class StepBatch(NamedTuple):
    columns: dict[str, Column]
    """Each [A, B, ...]."""
    valid: Tensor
    """int64 [A]."""
    batch_rows: Tensor
    """int64 []: valid rows of the global batch, over all ranks."""
    row_id: Tensor | None
    """int64 [A, B]."""


@dataclass(frozen=True)
class Inference:
    """A model with its guide, objective and parameters, over N rows."""

    model: PlatedModel
    guide: Guide
    parameters: Parameters
    objective: Objective
    num_obs: float
    sites: tuple[str, ...]
    """The names of the terms, in order."""
    kinds: tuple[Kind, ...]
    wide: bool = True
    """Whether the model can be evaluated in float64."""
    derived: tuple[str, ...] = ()
    """Deterministic sites that latents outside the data plate alone decide."""

    @property
    def gaussian(self) -> GaussianView | None:
        """The guide as a Gaussian, if it is one."""
        return self.guide.gaussian(self.parameters.places)

    def terms(self, theta: Tensor, noise: StepNoise, batch: StepBatch, share: float) -> Tensor:
        """This rank's part of the ELBO's terms [S], float64 nats; ``share``: a group's part in what counts once."""
        scale = self.num_obs / batch.batch_rows.double()
        objective = self.objective
        weight = 1.0 / (objective.pairs * len(objective.signs))

        def all_groups(values: dict[str, Tensor]) -> Tensor:
            total = torch.zeros(len(self.sites), dtype=torch.float64, device=theta.device)
            for a in range(len(batch.valid)):
                rows = None if batch.row_id is None else batch.row_id[a]
                group = Batch({k: v[a] for k, v in batch.columns.items()}, batch.valid[a], scale, rows)
                for r in range(objective.pairs):
                    for sign in objective.signs:
                        here = Noise(
                            sign * noise.elements[a, r],
                            None if noise.rows is None else sign * noise.rows[a, r],
                            noise.seeds[a][r],
                        )
                        terms = elbo_terms(self.model, self.guide, values, here, group, objective.kl)
                        each = [terms[s].value * (weight if terms[s].scaled else weight * share) for s in self.sites]
                        total = total + torch.stack(each)
            return total

        with pyro.validation_enabled(False):  # the first batch was checked with it on
            return self.parameters.call(self.parameters.unflatten(theta), all_groups)


@dataclass(frozen=True)
class Update:
    """How a gradient becomes the next state: a round of a schedule, after those before it.

    A round starts its optimizer and its average afresh: a second moment that remembers the way there makes the last
    steps too small, and one that forgets soon is correlated with the gradient, which biases Adam's mean step by half of
    (1 - beta2) times the gradient's skewness (rows of rare groups are skewed).
    """

    optimizer: Optimizer
    schedule: Schedule
    horizon: int
    """The step at which the schedule ends."""
    average_from: int
    """First step whose iterate enters the average; `horizon` for none."""
    start: int = 0
    """The step at which the schedule begins."""
    before: "Update | None" = None
    """What governs the steps before ``start``."""
    whitened: bool = False
    """Whether the state holds a `Preconditioner`."""
    anchored: int = 0
    """Locations of the state's `Snapshot`, at the head of theta; 0 for none."""

    def at(self, step: int) -> "Update":
        """The round in which ``step`` lies."""
        return self if self.before is None or step >= self.start else self.before.at(step)

    @property
    def rounds(self) -> "tuple[Update, ...]":
        """All rounds, in order."""
        return (*(self.before.rounds if self.before else ()), self)

    def init(self, theta: Tensor, preconditioner: Preconditioner | None = None) -> State:
        """The state before the first step; ``preconditioner`` where ``whitened``. A snapshot comes before the first."""
        zero = torch.zeros((), dtype=torch.int64, device=theta.device)
        anchor = Snapshot.at(theta, self.anchored) if self.anchored else ()
        slots = (*self.optimizer.init(theta), *(each.clone() for each in preconditioner or ()), *anchor)
        return State(zero, theta.clone(), slots, theta.clone(), zero.clone())

    def rates(self, step: Tensor, num_obs: float) -> Tensor:
        """The optimizer's rates [m] for the update at ``step`` (int64 []), float64."""
        factor = self.schedule(step - self.start, self.horizon - self.start)
        return self.optimizer.rates(self.optimizer.lr * factor, step - self.start + 1, num_obs)

    def split(self, slots: Slots) -> tuple[Slots, Preconditioner | None, Snapshot | None]:
        """The optimizer's own slots, and what follows them."""
        own = len(slots) - 2 * self.whitened - 2 * bool(self.anchored)
        preconditioner = Preconditioner(*slots[own : own + 2]) if self.whitened else None
        return slots[:own], preconditioner, Snapshot(*slots[-2:]) if self.anchored else None

    def __call__(self, state: State, grad: Tensor, rates: Tensor) -> State:
        own, preconditioner, _ = self.split(state.slots)
        fresh = state.step == self.start
        own = tuple(torch.where(fresh, 0.0, each) for each in own)
        if preconditioner is None:
            theta, slots = self.optimizer.update(grad, own, state.theta, rates)
        else:
            zero = torch.zeros_like(state.theta)
            moved, slots = self.optimizer.update(preconditioner.of_gradient(grad), own, zero, rates)
            theta = state.theta + preconditioner.of_step(moved)
        theta = theta.to(state.theta.dtype)
        slots = (*(new.to(old.dtype) for new, old in zip(slots, own)), *state.slots[len(own) :])
        averaging = state.step >= self.average_from
        averaged = torch.where(averaging, state.averaged + 1, 0)
        mean = state.average + (theta - state.average) / averaged.clamp(min=1)
        return State(state.step + 1, theta, slots, torch.where(averaging, mean, theta), averaged)


def step(
    inference: Inference,
    update: Update,
    comm: Comm,
    state: State,
    noise: StepNoise,
    batch: StepBatch,
    rates: Tensor,
) -> tuple[State, Tensor, Tensor]:
    """The state after one step, this rank's terms [S] in full-data nats and the norm of the gradient of loss / N (over
    all ranks).

    ``rates``: `update.rates` at this step. The terms are left for the caller to sum over the ranks once a chunk.
    """
    share = 1.0 / (comm.size * len(batch.valid))
    _, preconditioner, anchor = update.split(state.slots)

    def gradient(theta: Tensor) -> tuple[Tensor, Tensor]:
        theta = theta.detach().requires_grad_()
        with torch.enable_grad():
            terms = inference.terms(theta, noise, batch, share)
            (grad,) = torch.autograd.grad(-terms.sum() / inference.num_obs, theta)
        return terms.detach(), grad

    terms, grad = gradient(state.theta)
    if preconditioner is not None:
        view = inference.gaussian
        assert view is not None
        chance = preconditioner.control_variate(view.sd(state.theta), noise.elements, share)
        grad = grad - view.by_log_sd(chance, state.theta) / inference.num_obs
    if anchor is not None:
        grad = anchor.minus(grad, gradient(anchor.theta)[1])
    grad = comm.sum(grad)
    if anchor is not None:
        grad = anchor.plus(grad)
    new = update(state, grad, rates)
    return new, terms, grad.double().norm()
