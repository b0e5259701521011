"""Newton steps on the ELBO over all rows: they bring a round's average to its optimum.

Averaged iterates are a few tenths of a scale off where a round is few epochs long: the rows' noise falls with the root
of its length, and along a ridge they hardly move at all. A Newton step leaves of any error only the part by which the
curvature is wrong. Where it is known as a matrix (a percent off, from a sample of rows) a step costs a pass; with more
latents it is known by its products with vectors, a pass each.

Shapes: P parameters, of which the first D are the locations and the next D the log scales.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trainer.posterior.convergence import locations, small_sites, step_to_go, to_go
from trainer.svi.step import Inference

NEAR = 0.03  # scales left to go, under which there is nothing to gain
_AGREE = 0.04, 0.1  # what fresh draws may leave to go: locations, in scales, and twice a log scale
_STEPS, _SLOWEST = 8, 0.8
_PROBES = 2
_FACTOR = 4.0  # by which a variance may change in a step
_RESIDUAL, _PRODUCTS = 1e-5, 100
Solve = Callable[[Tensor, Tensor], Tensor]
"""(theta [P], the gradient [P] of minus the ELBO there in nats) -> the Newton step [P], float64."""


def polished(
    inference: Inference, theta: Tensor, solve: Solve, gradient: Callable[[Tensor, bool], Tensor]
) -> tuple[Tensor, Tensor, float] | None:
    """``theta`` [P] after Newton steps, the gradient [P] there and what it leaves to go (scales); None: they fail.

    ``gradient(theta, fresh)``: of minus the ELBO over all rows (nats), a pass each. The steps solve the problem of one
    set of draws, a few dozen, as long as each leaves at most 0.8 of what the one before left (locations and scales that
    hang together take several). The answer holds if a fresh set of draws agrees: along a steep ridge a few draws say
    little, and the average of thousands of steps is better.
    """
    at, made, left = theta, theta, math.inf
    for _ in range(_STEPS):
        step = solve(at, gradient(at, False))
        then = step_to_go(inference, at, step)
        if not then <= _SLOWEST * left:
            break
        made, left = at, then
        if left <= NEAR:
            break
        at = at + step.to(at.dtype)
    if left > max(_AGREE):
        return None
    found = gradient(made, True)
    far = to_go(inference, made, solve(made, found))
    agree = all(each <= limit for each, limit in zip(far, _AGREE, strict=True))
    return (made, found, max(far)) if agree else None


def step_by_products(
    inference: Inference, theta: Tensor, gradient: Tensor, product: Callable[[Tensor], Tensor]
) -> Tensor:
    """The Newton step [P] where the Hessian by the locations is known by ``product``: v -> H v [D].

    Locations: conjugate gradients (Hestenes and Stiefel 1952) in scales, where the Hessian of a hierarchy is a
    diagonal and a few directions, so that they end after a few more steps than those. Log scales of sites of more than
    256 scalars: s = 1 / sqrt(diag H), of which random signs z give z * (H z) (Bekas, Kokiopoulou and Saad 2007); the
    few others, which hang together with all of these, stay as averaged.
    """
    size, few = locations(inference), small_sites(inference).to(theta.device)
    scale = theta[size : 2 * size].double().exp()

    def scaled(direction: Tensor) -> Tensor:
        return scale * product(scale * direction)

    generator = torch.Generator().manual_seed(0)
    diagonal = few.double()
    for _ in range(_PROBES):
        signs = (2.0 * torch.randint(0, 2, (size,), generator=generator) - 1.0).double().to(theta.device)
        signs = signs.masked_fill(few, 0.0)
        diagonal += signs * scaled(signs) / _PROBES
    diagonal = diagonal.nan_to_num(1.0).clamp(1 / _FACTOR, _FACTOR)
    step = torch.zeros_like(theta, dtype=torch.float64)
    step[:size] = scale * conjugate_gradients(scaled, -scale * gradient[:size].double(), diagonal)
    step[size : 2 * size] = -0.5 * diagonal.log()
    return step


def conjugate_gradients(product: Callable[[Tensor], Tensor], want: Tensor, diagonal: Tensor) -> Tensor:
    """x [D] with A x = ``want`` [D], for A as its ``product``, preconditioned by a ``diagonal`` [D] > 0.

    Ends at a residual of 1e-5, and where A turns out not to be positive definite.
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
            break
        found = found + size / curvature * direction
        residual = residual - size / curvature * image
        preconditioned = residual / diagonal
        before, size = size, residual @ preconditioned
        direction = preconditioned + size / before * direction
    return found
