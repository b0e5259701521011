"""Newton steps on the ELBO over all rows: they bring a round's average to its optimum.

Averaged iterates are a few tenths of a scale off where a round is few epochs long: the rows' noise falls with the root
of its length, and along a ridge they hardly move at all. A Newton step leaves of any error only the part by which the
curvature is wrong. Where it is known as a matrix (a percent off, from a sample of rows) a step costs a pass; with more
latents it is known by its products with vectors, a pass each.

Shapes: P parameters, of which the first D are the locations and the next D the log scales.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.posterior.convergence import locations, small_sites, step_to_go, to_go
from trainer.svi.step import Inference

NEAR = 0.03  # scales left to go, under which there is nothing to gain
_AGREE = 0.08, 0.1  # what fresh draws may leave to go: locations, in scales, and twice a log scale
_DONE = 0.005  # by the draws of the steps
_STEPS = 10
_FEW, _PROBES = 32, 2
_FACTOR = 4.0  # by which a variance may change in a step
_RESIDUAL, _PRODUCTS = 1e-5, 100
Solve = Callable[[Tensor, Tensor], Tensor | None]
"""(theta [P], the gradient [P] of minus the ELBO there in nats) -> the Newton step [P], float64, if there is one."""


def polished(
    inference: Inference, theta: Tensor, solve: Solve, gradient: Callable[[Tensor, bool], Tensor]
) -> tuple[Tensor, Tensor, float] | None:
    """``theta`` [P] after Newton steps, the gradient [P] there and what it leaves to go (scales); None: they fail.

    ``gradient(theta, fresh)``: of minus the ELBO over all rows (nats), a pass each. The steps solve the problem of one
    set of draws, a few dozen, until nothing is left of it. The answer holds if a fresh set of draws agrees: along a
    steep ridge a few draws say little, and the average of thousands of steps is better.
    """
    at, secant = theta, Secant(inference)
    for _ in range(_STEPS):
        step = solve(at, gradient(at, False))
        if step is None or not step.isfinite().all():
            return None
        ahead = secant.accelerated(at, step)
        if max(step_to_go(inference, at, each) for each in (step, ahead)) <= _DONE:
            break
        at = at + ahead.to(at.dtype)
    else:
        return None
    found = gradient(at, True)
    step = solve(at, found)
    if step is None:
        return None
    far = to_go(inference, at, secant.accelerated(at, step, keep=False))
    agree = all(each <= limit for each, limit in zip(far, _AGREE, strict=True))
    return (at, found, max(far)) if agree else None


class Secant:
    """What earlier steps say of the next one: Newton steps for locations at given scales and for scales at given
    locations may go the way by small equal parts, as for the scale of a large hierarchy and those of its effects.

    Anderson (1965), in the form of Walker and Ni, "Anderson acceleration for fixed-point iterations" (SIAM J. Numer.
    Anal. 49, 2011): the step's linear model through all points so far, solved for a step of zero.
    """

    def __init__(self, inference: Inference):
        self.size = locations(inference)
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
        weight[: self.size] = (-theta[self.size : 2 * self.size].double()).exp()
        moved = torch.stack(self.points).diff(dim=0).T
        changed = torch.stack(self.steps).diff(dim=0).T
        share = torch.linalg.lstsq(weight[:, None] * changed, (weight * step)[:, None]).solution
        return step - ((moved + changed) @ share)[:, 0]


def step_by_products(
    inference: Inference, theta: Tensor, gradient: Tensor, product: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """The Newton step [P] where the Hessian by the locations is known by ``product``: v -> H v [D].

    Locations: conjugate gradients in scales, in which the Hessian of a hierarchy is a diagonal and a few directions, so
    that they end after a few more steps than those; None where it is not positive definite. Log scales: s =
    1 / sqrt(diag H). Of sites of more than 256 scalars random signs z give it, z * (H z) (Bekas, Kokiopoulou and Saad
    2007), of the others a product each; if these are more than 32, they stay as averaged.
    """
    size, few = locations(inference), small_sites(inference).to(theta.device)
    scale = theta[size : 2 * size].double().exp()

    def scaled(direction: Tensor) -> Tensor:
        return scale * product(scale * direction)

    generator, diagonal = torch.Generator().manual_seed(0), few.double()
    if exact_scales(inference):
        for number in few.nonzero()[:, 0]:
            unit = torch.zeros_like(scale).index_fill_(0, number, 1.0)
            diagonal[number] = scaled(unit)[number]
    for _ in range(_PROBES):
        signs = (2.0 * torch.randint(0, 2, (size,), generator=generator) - 1.0).double().to(theta.device)
        signs = signs.masked_fill(few, 0.0)
        diagonal += signs * scaled(signs) / _PROBES
    if not (diagonal > 0).all():
        return None
    diagonal = diagonal.clamp(1 / _FACTOR, _FACTOR)
    direction = conjugate_gradients(scaled, -scale * gradient[:size].double(), diagonal)
    if direction is None:
        return None
    step = torch.zeros_like(theta, dtype=torch.float64)
    step[:size] = scale * direction
    step[size : 2 * size] = -0.5 * diagonal.log()
    return step


def exact_scales(inference: Inference) -> bool:
    """Whether `step_by_products` takes the log scales of small sites to their optimum too."""
    return int(small_sites(inference).sum()) <= _FEW


def conjugate_gradients(product: Callable[[Tensor], Tensor], want: Tensor, diagonal: Tensor) -> Tensor | None:
    """x [D] with A x = ``want`` [D], for A as its ``product``, preconditioned by a ``diagonal`` [D] > 0.

    To a residual of 1e-5 (Hestenes and Stiefel 1952). None where A turns out not to be positive definite.
    """
    found, residual = torch.zeros_like(want), want.clone()
    direction = residual / diagonal
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
        preconditioned = residual / diagonal
        before, size = size, residual @ preconditioned
        direction = preconditioned + size / before * direction
    return found
