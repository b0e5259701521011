"""The optimum of the ELBO over all rows, for guides whose parameters may be of any kind.

With its draws fixed the ELBO is a function without noise, whose optimum L-BFGS finds (Liu and Nocedal 1989; Giordano,
Ingram and Broderick, "Black box variational inference with a deterministic objective", JMLR 25 (2024)). What other
draws would still gain there, in nats, says how near it is to the optimum of the ELBO itself. A draw that is no smooth
function of noise (Gamma, Beta, Dirichlet) has no such function, but a gradient: there natural-gradient steps lead to
the optimum, as far as a trust region lets them (Amari 1998; Schulman et al. 2015), by the Fisher information of the
guide itself, and their mean is the answer.

Shapes: P parameters, K draws.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple, Protocol

import pyro
import torch
from torch import Tensor

from trainer.inference.estimates.full_gradient import Draws
from trainer.inference.model.noise import mixed_seed
from trainer.inference.model.noise_mode import seed_generators
from trainer.inference.model.parameters import Parameters
from trainer.inference.model.plates import Batch
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.step import Inference

LEVELS = (Draws(16, 16_384), Draws(64, 16_384), Draws(256, 16_384))
_ONE = Draws(1, 1)  # all draws are alike
ENOUGH = 0.001  # nats for each parameter, with which a level of draws is enough
_TOGETHER, _TIMES = 5, 40  # iterations of L-BFGS between two looks, and looks
_SETTLED = 1e-4  # nats that so many iterations gain, at the end
_SCORES = 64, 4  # draws of the guide for its Fisher information: at least, and for each parameter
_RADIUS = 0.5  # nats of KL that a step may go
_CLOSE = 0.1  # nats that a step would gain, from which on steps are averaged
_MOST_STEPS, _AVERAGED = 60, 8
_RIDGE = 1e-6  # of the largest eigenvalue of the scaled Fisher information


class Loss(Protocol):
    """Minus the ELBO over all rows (nats) and its gradient [P] at theta [P], float64, by the draws of a ``number``."""

    def __call__(self, theta: Tensor, draws: Draws, number: int) -> tuple[float, Tensor]: ...


class Optimum(NamedTuple):
    theta: Tensor
    """[P]."""
    gain: float
    """Nats that are left by fresh draws."""


def can_be_settled(inference: Inference) -> bool:
    """Whether all that is learnt is a guide of Pyro's or the user's with global latents alone, and draws enough are to
    be had.
    """
    guide = inference.guide
    of_rows = guide.noise_size[1] or any(kind == "kl_local" for kind in inference.kinds)
    return bool(inference.gaussian is None and not of_rows and _levels(inference))


def problem_of(inference: Inference) -> Inference:
    """With the gradient whose noise vanishes where the guide is the posterior (Roeder, Wu and Duvenaud 2017), where it
    need not be that of a function.
    """
    if inference.guide.log_q_of_a_draw is None:
        return inference
    signs, pairs = inference.objective.signs, inference.objective.pairs
    return replace(inference, objective=ELBO("sticking_the_landing", len(signs) > 1, pairs))


def _levels(inference: Inference) -> tuple[Draws, ...]:
    """With how many draws the optimum is looked for: a full covariance, or a flow, would fit to too few of them."""
    guide, size = inference.guide, inference.parameters.size - inference.guide.curved**2
    if guide.still:
        return (_ONE,)
    needed = 0 if size <= 2 * guide.noise_size[0] else size // 2
    return tuple(draws for draws in LEVELS[1:] if draws.pairs >= needed)


def settled(inference: Inference, theta: Tensor, loss: Loss, rows: Batch) -> Optimum | None:
    """``theta`` [P] brought to the optimum; None where no steps lead on. ``rows``: any of the data."""
    log_q = inference.guide.log_q_of_a_draw
    if log_q is None:
        found = by_fixed_draws(theta, loss, _levels(inference))
    else:
        found = by_natural_gradient(theta, loss, partial(fisher, inference.parameters, log_q, rows=rows))
    check = _levels(inference)[0]
    if found is None or not loss(found.theta, check, 3000)[0] <= loss(theta, check, 3000)[0] + found.gain:
        return None
    return found


def by_fixed_draws(theta: Tensor, loss: Loss, levels: Sequence[Draws]) -> Optimum | None:
    """The mean of the optima of two sets of draws; the more draws, the nearer these are to each other."""
    fewest = min(LEVELS[0], levels[0])
    first = _lowest(theta, partial(loss, draws=fewest, number=0))
    theta, found = theta if first is None else first, None
    for level, draws in enumerate(levels, start=1):
        one = _lowest(theta, partial(loss, draws=draws, number=2 * level))
        two = None if one is None else _lowest(one, partial(loss, draws=draws, number=2 * level + 1))
        if one is None or two is None:
            return found
        gain = loss(one, draws, 2 * level + 1)[0] - loss(two, draws, 2 * level + 1)[0]
        theta = (one + two) / 2
        found = Optimum(theta, max(gain, 0.0) / 4)  # the mean errs by half as much as their difference
        if found.gain <= ENOUGH * len(theta):
            break
    return found


def _lowest(theta: Tensor, loss: Callable[[Tensor], tuple[float, Tensor]]) -> Tensor | None:
    """Where ``loss`` is lowest, by L-BFGS from ``theta`` [P]; None where it is not finite on the way."""
    at = theta.detach().double().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [at], max_iter=_TOGETHER, history_size=50, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0
    )
    best = math.inf, at.detach().clone()

    def closure() -> Tensor:
        nonlocal best
        value, at.grad = loss(at.detach())
        if not (math.isfinite(value) and torch.isfinite(at.grad).all()):
            raise ArithmeticError
        if value < best[0]:
            best = value, at.detach().clone()
        return torch.tensor(value, dtype=torch.float64)

    before = math.inf
    for _ in range(_TIMES):
        try:
            optimizer.step(closure)
        except ArithmeticError:
            return None
        if before - best[0] < _SETTLED:
            break
        before = best[0]
    return best[1]


def by_natural_gradient(theta: Tensor, loss: Loss, information: Callable[[Tensor, int], Tensor]) -> Optimum | None:
    """Steps of at most ``_RADIUS`` nats until they would gain little, then their running mean.

    ``information(theta, number)``: the Fisher information [P, P] of the guide.
    """
    theta, radius, left = theta.detach().double().clone(), _RADIUS, math.inf
    for number in range(_MOST_STEPS):
        step, gain = _natural(loss(theta, LEVELS[0], number)[1], information(theta, number))
        if not math.isfinite(gain):
            return None
        if gain <= _CLOSE:
            break
        if gain > left:  # the step before went too far
            radius /= 2
        theta, left = theta + min(1.0, math.sqrt(radius / gain)) * step, gain
    metric, found = information(theta, _MOST_STEPS), None
    for level, (draws, more) in enumerate(pairwise((*LEVELS, LEVELS[-1])), start=1):
        for number in range(_AVERAGED):
            step, gain = _natural(loss(theta, draws, 100 * level + number)[1], metric)
            rate = min(1.0, math.sqrt(radius / max(gain, 1e-300))) / max(1, number - _AVERAGED // 2)
            theta = theta + rate * step
        _, gain = _natural(loss(theta, more, 100 * level + 99)[1], metric)
        if not math.isfinite(gain):
            return found
        found = Optimum(theta, gain)
        if gain <= ENOUGH * len(theta):
            break
    return found


def _natural(gradient: Tensor, information: Tensor) -> tuple[Tensor, float]:
    """The natural-gradient step [P] and the nats that it would gain, g' F^-1 g / 2; nan where the guide's distribution
    does not tell how far a parameter may go (a point's, or one of the model's own).
    """
    if ((information.diagonal() == 0) & (gradient != 0)).any():
        return torch.zeros_like(gradient), math.nan
    scale = information.diagonal().clamp(min=1e-300).rsqrt()
    values, vectors = torch.linalg.eigh(scale[:, None] * information * scale)
    inside = values > _RIDGE * values[-1]
    along = (vectors.T @ (scale * gradient)) * inside
    step = -scale * (vectors @ (along / torch.where(inside, values, 1.0)))
    return step, float(-0.5 * step @ gradient)


def fisher(
    parameters: Parameters, log_q_of_a_draw: Callable[[Batch], Tensor], theta: Tensor, number: int, rows: Batch
) -> Tensor:
    """The Fisher information [P, P] of a guide at ``theta`` [P], float64, from the scores of draws of its own."""
    dtype = rows.dtype
    count = _SCORES[0] + _SCORES[1] * len(theta)
    scores = []
    with pyro.validation_enabled(False), torch.random.fork_rng():
        seed_generators(mixed_seed(number, 0xF15, 0))
        for _ in range(count):
            at = theta.detach().to(dtype).requires_grad_()
            with torch.enable_grad():
                log_q = parameters.call(parameters.unflatten(at), lambda _: log_q_of_a_draw(rows))
                (score,) = torch.autograd.grad(log_q, at, allow_unused=True, materialize_grads=True)
            scores.append(score.double())
    stacked = torch.stack(scores)
    return stacked.T @ stacked / count
