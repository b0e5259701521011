"""One optimization step as one pure function: `step(state, given) -> (state, terms, grad_norm)`.

Every rank evaluates the draws whose lanes it holds, sums are all-reduced, and every rank makes the same update from the
same gradient. Global terms count once over all ranks; terms inside the data plate are sums over the rows that each
rank holds, at scale N / (rows of the global batch). Robbins and Monro (1951); Hoffman et al. (2013).

Shapes: P parameters, S sites, A lane groups of this rank, R = pairs draws per group, B rows of a group.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from trainer.distributed.comm import Comm
from trainer.inference.guides.gaussian import GaussianView
from trainer.inference.guides.mean_field import Guide, Noise
from trainer.inference.model.parameters import Parameters
from trainer.inference.model.plates import Batch, PlatedModel
from trainer.inference.objectives.elbo import elbo_terms
from trainer.inference.objectives.objective import Kind, Objective, Terms
from trainer.inference.optim.rounds import Round, State
from trainer.inference.rows.options import DEFAULT, RowOptions


@contextmanager
def in_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch's default floating type, for models that make tensors of their own."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class StepNoise(NamedTuple):
    elements: Tensor
    """[A, R, E]."""
    rows: Tensor | None
    """[A, R, B, n]."""
    seeds: tuple[tuple[int, ...], ...]
    """[A][R] seeds for draws that are no transformation of a normal."""


class StepInput(NamedTuple):
    """What a step takes from outside."""

    noise: StepNoise
    batch: Batch
    """This rank's rows [A, B, ...]."""
    rates: Tensor
    """`Inference.rates` at this step."""


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
    rows: RowOptions = DEFAULT
    """How latents of rows are held."""

    @property
    def gaussian(self) -> GaussianView | None:
        """The guide as a Gaussian, if it is one."""
        return self.guide.gaussian(self.parameters.places)

    @property
    def float_type(self) -> torch.dtype:
        """Of exact arithmetic: float64 wherever the model can."""
        return torch.float64 if self.wide else torch.float32

    def rates(self, round_: Round, step: Tensor) -> Tensor:
        """All that depends on ``step`` (int64 []) alone, float64: `Round.rates` [m], then the weight of the KL terms
        where the objective has a warm-up.
        """
        rates = round_.rates(step, self.num_obs)
        if not self.objective.warmup:
            return rates
        return torch.stack([*rates.unbind(), self.objective.kl_weight_at(step)])

    def raised(self, terms: Tensor, rates: Tensor) -> Tensor:
        """What a step raises [], of its ``terms`` [S]: their sum, weighted during a warm-up."""
        if not self.objective.warmup:
            return terms.sum()
        likelihood = sum(value for kind, value in zip(self.kinds, terms.unbind()) if kind == "likelihood")
        others = sum(value for kind, value in zip(self.kinds, terms.unbind()) if kind != "likelihood")
        return likelihood + rates[-1] * others

    def terms(self, theta: Tensor, noise: StepNoise, batch: Batch, share: float) -> Tensor:
        """This rank's part of the ELBO's terms [S], float64 nats; ``share``: a group's part in what counts once."""
        objective = self.objective

        def at(values: dict[str, Tensor], a: int, r: int, sign: float) -> Terms:
            group = batch.slot(a)._replace(num_obs=self.num_obs)
            own = None if noise.rows is None else sign * noise.rows[a, r]
            draw = Noise(sign * noise.elements[a, r], own, noise.seeds[a][r])
            return elbo_terms(self.model, self.guide, values, draw, group, objective.kl)

        def all_groups(values: dict[str, Tensor]) -> Tensor:
            pairs = [(r, sign) for r in range(objective.pairs) for sign in objective.signs]
            draws = [[at(values, a, r, sign) for r, sign in pairs] for a in range(len(batch.valid))]
            terms = objective.combined(draws, share)
            return torch.stack([terms[site] for site in self.sites])

        with pyro.validation_enabled(False):  # the first batch was checked with it on
            return self.parameters.call(self.parameters.unflatten(theta), all_groups)

    def of_sample(
        self, objective: Objective, theta: Tensor, normals: Tensor, rows: Batch, seeds: Sequence[int] = ()
    ) -> Tensor:
        """The terms [S] (nats) of another ``objective`` at ``theta`` [P], of one lane group ``rows`` at the scale of
        all rows, by fixed ``normals`` [R, E] and ``seeds`` [R], in exact arithmetic.
        """
        dtype = self.float_type
        noise = StepNoise(normals[None].to(dtype), None, (tuple(seeds) or (0,) * len(normals),))
        return replace(self, objective=objective).terms(theta.to(dtype), noise, rows.floats_as(dtype), share=1.0)


def step(
    inference: Inference, round_: Round, comm: Comm, state: State, given: StepInput
) -> tuple[State, Tensor, Tensor]:
    """The state after one step, this rank's terms [S] in full-data nats and the norm of the gradient of loss / N (over
    all ranks).

    The terms are left for the caller to sum over the ranks once a chunk.
    """
    state, terms, grad = step_and_gradient(inference, round_, comm, state, given)
    return state, terms, grad.double().norm()


def step_and_gradient(
    inference: Inference, round_: Round, comm: Comm, state: State, given: StepInput
) -> tuple[State, Tensor, Tensor]:
    """As `step`, with the gradient [P] itself."""
    noise, batch, rates = given
    share = 1.0 / (comm.size * len(batch.valid))
    preconditioner, snapshot = state.preconditioner, state.snapshot

    def gradient(theta: Tensor) -> tuple[Tensor, Tensor]:
        theta = theta.detach().requires_grad_()
        with torch.enable_grad():
            terms = inference.terms(theta, noise, batch, share)
            (grad,) = torch.autograd.grad(-inference.raised(terms, rates) / inference.num_obs, theta)
        return terms.detach(), grad

    terms, grad = gradient(state.theta)
    if preconditioner is not None and inference.objective.is_elbo:  # the noise of the ELBO's gradient
        view = inference.gaussian
        assert view is not None
        chance = view.covariance.by_chance(preconditioner.curvature, state.theta, noise.elements, share)
        grad = grad - view.by_covariance(chance, state.theta) / inference.num_obs
    if snapshot is not None:
        grad = snapshot.minus(grad, gradient(snapshot.theta)[1])
    grad = comm.sum(grad)
    if snapshot is not None:
        grad = snapshot.plus(grad)
    return round_(state, grad, rates), terms, grad
