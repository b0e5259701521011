"""Newton steps on the ELBO over all rows: they bring a round's average to its optimum.

Averaged iterates are a few tenths of a scale off where a round is few epochs long: the rows' noise falls with the root
of its length, and along a ridge they hardly move at all. A Newton step leaves of any error only the part by which the
curvature is wrong. Where it is known as a matrix (a percent off, from a sample of rows) a step costs a pass; with more
latents it is known by its products with vectors, a pass each.

Shapes: P parameters, D latents.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trainer.inference.estimates.full_gradient import MANY, Draws
from trainer.inference.guides.gaussian import GaussianView
from trainer.inference.recipe.arrowhead import arrow
from trainer.inference.recipe.convergence import step_to_go, to_go

NEAR = 0.03  # scales left to go, under which there is nothing to gain
_AGREE = 0.08, 0.1  # what fresh draws may leave to go: locations, in scales, and twice a log scale
_DONE, _NEARLY = 0.01, 0.05  # by the draws of the steps: at once, and after the last one
_STEPS = 16
_MEMORY = 6  # points
_PATIENCE = 4  # steps, after which it has to have come nearer
_KNOWN = 1e-6  # of the largest change, below which one is rounding
_FACTOR = 4.0  # by which a variance may change in a step
_RESIDUAL, _PRODUCTS = 1e-3, 100
Solve = Callable[[Tensor, Tensor], Tensor | None]
"""(theta [P], the gradient [P] of minus the ELBO there in nats) -> the Newton step [P], float64, if there is one."""


class Gradient(Protocol):
    """Of minus the ELBO over all rows (nats) at theta [P], a pass each: by so many draws, others if ``fresh``."""

    def __call__(self, theta: Tensor, draws: Draws, fresh: bool) -> Tensor: ...


class Polished(NamedTuple):
    """Where Newton steps have come to."""

    theta: Tensor
    gradient: Tensor
    """[P], there, by fresh draws."""
    left: float
    """What fresh draws leave to go, in scales."""
    agreed: bool
    """Whether that is as good as nothing."""


def polished(
    view: GaussianView, theta: Tensor, solve: Solve, gradient: Gradient, levels: Sequence[Draws] = (MANY,)
) -> Polished | None:
    """``theta`` [P] after Newton steps; None where they fail, or fresh draws leave more than a quarter of the way.

    The steps solve the problem of one set of draws until nothing is left of it, and the answer holds if a fresh set
    agrees. If not, the next of the ``levels`` has more draws: along a steep ridge a few say little.
    """
    way, made = 0.0, None
    for draws in levels:
        settled = _settled(view, theta, solve, partial(gradient, draws=draws, fresh=False))
        if settled is None:
            return None
        theta, secant, first = settled
        found = gradient(theta, draws=draws, fresh=True)
        step = solve(theta, found)
        if step is None:
            return None
        far = to_go(view, theta, secant.accelerated(theta, step, keep=False))
        agreed = all(each <= limit for each, limit in zip(far, _AGREE, strict=True))
        way, made = max(way, first), Polished(theta, found, max(far), agreed)
        if agreed:
            break
    return made if made and (made.agreed or made.left <= way / 4) else None


def _settled(
    view: GaussianView, theta: Tensor, solve: Solve, gradient: Callable[[Tensor], Tensor]
) -> tuple[Tensor, "Secant", float] | None:
    """Where Newton steps end, what they have learnt, and the first one's size in scales; None: they do not end."""
    secant, first, left = Secant(view), 0.0, 0.0
    for number in range(_STEPS):
        step = solve(theta, gradient(theta))
        if step is None or not step.isfinite().all():
            return None
        ahead = secant.accelerated(theta, step)
        left = max(step_to_go(view, theta, each) for each in (step, ahead))
        first = first or left
        if left <= _DONE:
            return theta, secant, first
        if number >= _PATIENCE and left > first:
            return None
        theta = theta + ahead.to(theta.dtype)
    return (theta, secant, first) if left <= _NEARLY else None


class Secant:
    """What earlier steps say of the next one: Newton steps for locations at given scales and for scales at given
    locations may go the way by small equal parts, as for the scale of a large hierarchy and those of its effects.

    Anderson (1965), in the form of Walker and Ni, "Anderson acceleration for fixed-point iterations" (SIAM J. Numer.
    Anal. 49, 2011): the step's linear model through all points so far, solved for a step of zero.
    """

    def __init__(self, view: GaussianView):
        self.view = view
        self.points: list[Tensor] = []
        self.steps: list[Tensor] = []

    def accelerated(self, theta: Tensor, step: Tensor, keep: bool = True) -> Tensor:
        """The Newton ``step`` [P] at ``theta`` [P] with what it does not reach; ``keep``: later ones learn from it."""
        if keep:
            self.points.append(theta.double())
            self.steps.append(step)
        if len(self.points) < 2:
            return step
        weight = torch.ones_like(step)
        weight[self.view.loc] = self.view.covariance.inverse_sd(theta.double())
        moved = torch.stack(self.points[-_MEMORY:]).diff(dim=0).T
        changed = torch.stack(self.steps[-_MEMORY:]).diff(dim=0).T
        share = torch.linalg.pinv(weight[:, None] * changed, rtol=_KNOWN) @ (weight * step)
        accelerated: Tensor = step - (moved + changed) @ share
        return accelerated


def step_by_products(
    view: GaussianView, theta: Tensor, gradient: Tensor, product: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """The Newton step [P] where the Hessian by the locations is known by ``product``: v -> H v [D].

    Locations: by conjugate gradients in scales, preconditioned by the Hessian's `Arrow`; None where the Hessian turns
    out not to be positive definite. Log scales: s = 1 / sqrt(diag H); those of which the arrow knows nothing stay.
    """
    scale = view.sd(theta.double())

    def scaled(direction: Tensor) -> Tensor:
        return scale * product(scale * direction)

    known = arrow(view, scaled, theta.device)
    if known is None:
        return None
    direction = conjugate_gradients(scaled, -scale * gradient[view.loc].double(), known.solve)
    if direction is None:
        return None
    step = torch.zeros_like(theta, dtype=torch.float64)
    step[view.loc] = scale * direction
    step[view.covariance.log_sd] = -0.5 * known.diagonal.clamp(1 / _FACTOR, _FACTOR).log()
    return step


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], want: Tensor, precondition: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """x [D] with A x = ``want`` [D], for A as its ``product``; ``precondition`` solves a matrix like A.

    To a residual of 1e-3 (Hestenes and Stiefel 1952). None where A turns out not to be positive definite.
    """
    found, residual = torch.zeros_like(want), want.clone()
    direction = precondition(residual)
    size = first = residual @ direction
    for _ in range(_PRODUCTS):
        if not size > _RESIDUAL**2 * first:
            break
        image = product(direction)
        curvature = direction @ image
        if not curvature > 0:
            return None
        found = found + size / curvature * direction
        residual = residual - size / curvature * image
        preconditioned = precondition(residual)
        before, size = size, residual @ preconditioned
        direction = preconditioned + size / before * direction
    return found
