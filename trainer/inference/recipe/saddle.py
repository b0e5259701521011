"""Saddles of a loss, and how they are left: by a push along directions in which it falls although its slope is zero.

Products of latents (ability times discrimination, factors times loadings) and equal components of a mixture are
symmetric: where the factors are 0, or the components alike, the gradient vanishes along whatever breaks the symmetry,
so no descent leaves the place. Its curvature tells: the Hessian is then indefinite (Dauphin et al., "Identifying and
attacking the saddle point problem", NeurIPS 2014). Along a direction with a slope negative curvature is no saddle, only
a place that is not yet the lowest, as along the scale of a centered hierarchy. Products of three and more latents have
no curvature either: there the likelihood neither slopes nor curves by a latent, and does both elsewhere.

Shapes: D arguments of a loss, m directions, K pushes.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.errors import counted
from trainer.inference.estimates.derivatives import hessian
from trainer.inference.model.noise import element_noise, mixed_seed

PUSHES = 4
_FALLS = 1e-5  # of the scaled Hessian: how negative an eigenvalue is
_SLOPE = 0.01  # nats that the slope along a direction may promise where it counts as zero
_ZERO = 1e-10  # of the largest, below which a derivative is rounding
_AGAIN = 3  # descents one after the other, where one leads to another saddle
_PARTS, _ENOUGH = 8, 2  # sites that are kept while others go back; pushes that have to end alike
_ALIKE = 0.1  # nats, within which two optima count as one
_STEPS = 32  # products of Lanczos' method
_DOUBLINGS = 20
_PUSHED = 0x5ADD1E
AT_START = "the start is a saddle (products of latents, or equal components), which is left: {}."
Loss = Callable[[Tensor], Tensor]
"""[] nats of [D], float64, twice differentiable."""


class Best(NamedTuple):
    """Where the best of several pushes ends."""

    at: Tensor
    """[D]."""
    values: tuple[float, ...]
    """What the pushes come to, the best first: an ELBO, in nats."""

    def sentence(self) -> str:
        """What a log says of it."""
        optima = [self.values[0]]
        for value in self.values:
            if optima[-1] - value > _ALIKE:
                optima.append(value)
        if len(optima) == 1:
            return f"{counted(len(self.values), 'push', 'pushes')} away from it end in the same ELBO"
        return (
            f"{len(self.values)} pushes away from it end in {len(optima)} optima, up to {optima[0] - optima[-1]:.3g} "
            "nats apart, and the best goes on"
        )


def slope(loss: Loss, at: Tensor) -> Tensor:
    """The gradient [D] at ``at`` [D]; zeros by what the loss does not depend on."""
    at = at.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(at), at, allow_unused=True, materialize_grads=True)
    return found.detach()


def product_at(loss: Loss, at: Tensor) -> Callable[[Tensor], Tensor]:
    """v -> H v, both [D], with the Hessian at ``at`` [D]."""
    at = at.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(at), at, create_graph=True, allow_unused=True, materialize_grads=True)

    def product(along: Tensor) -> Tensor:
        if not gradient.requires_grad:
            return torch.zeros_like(along)
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        return torch.autograd.grad(gradient, at, along.to(gradient), **options)[0].detach()

    return product


def falling(gradient: Tensor, curvature: Tensor) -> Tensor:
    """Directions [m, D] of negative ``curvature`` [D, D] along which the ``gradient`` [D] is zero."""
    scale = units(curvature.diagonal())
    if not (curvature.isfinite().all() and gradient.isfinite().all()):
        return curvature[:0]
    values, vectors = torch.linalg.eigh(scale[:, None] * curvature * scale)
    along = vectors.T @ (scale * gradient)
    falls = (values < -_FALLS) & (along**2 <= 2 * _SLOPE * values.abs())
    found: Tensor = (scale[:, None] * vectors[:, falls]).T
    return found


def lowest(product: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """Ritz values [m], ascending, and vectors [m, D] of a symmetric matrix known by its ``product`` with vectors [D].

    Lanczos (1950) from ``start`` [D], with full reorthogonalization: exact within what 32 products reach.
    """
    basis, images = [start / start.norm()], []
    for _ in range(min(_STEPS, len(start))):
        images.append(product(basis[-1]))
        known, rest = torch.stack(basis), images[-1]
        for _ in range(2):
            rest = rest - known.T @ (known @ rest)
        if not rest.norm() > 1e-8 * images[-1].norm():
            break
        basis.append(rest / rest.norm())
    known = torch.stack(basis[: len(images)])
    small = known @ torch.stack(images).T
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    return values, vectors.T @ known


def unmoved(loss: Loss, at: Tensor) -> Tensor:
    """bool [D]: arguments by which the loss does not slope at ``at`` [D]."""
    return _is_zero(slope(loss, at))


def hidden(likelihood: Loss, at: Tensor, seed: int, among: Tensor | None = None) -> Tensor:
    """bool [D]: arguments by which ``likelihood`` neither slopes nor curves at ``at`` [D], but does elsewhere.

    ``among``: those alone, the others being left where they are. One that the likelihood does not depend on is none.
    """
    noise = normals(seed, -1, 0, at)
    still = unmoved(likelihood, at) & _is_zero(product_at(likelihood, at)(noise))
    return (still if among is None else still & among) & matters(likelihood, at, seed, among)


def matters(likelihood: Loss, at: Tensor, seed: int, among: Tensor | None = None) -> Tensor:
    """bool [D]: arguments by which ``likelihood`` slopes at a place apart from ``at`` [D]."""
    noise = normals(seed, -1, 1, at)
    return ~_is_zero(slope(likelihood, at + (noise if among is None else noise * among)))


def normals(seed: int, push: int, again: int, like: Tensor) -> Tensor:
    """[D]: the noise of a push, a function of these numbers alone."""
    key, number = mixed_seed(seed, _PUSHED, 64 * (push + 1) + again), torch.zeros((), dtype=torch.int64)
    made = element_noise(key, number, torch.zeros(1, dtype=torch.int64), len(like), torch.float64)[0]
    return made.to(like)


def pushed(loss: Loss, at: Tensor, directions: Tensor, noise: Tensor) -> Tensor:
    """``at`` [D] moved along a mix of falling ``directions`` [m, D], as far as the loss falls by doubled steps."""
    step = noise[: len(directions)] @ directions
    with torch.no_grad():
        before, length = float(loss(at)), 1.0
        least = float(loss(at + step))
        for _ in range(_DOUBLINGS):
            if least < before:
                break
            length /= 2
            least = float(loss(at + length * step))
        for _ in range(_DOUBLINGS):
            further = float(loss(at + 2 * length * step))
            if not further < least:
                break
            length, least = 2 * length, further
    return at + length * step


class Search(NamedTuple):
    """How pushes from a saddle go on."""

    descend: Callable[[Tensor], Tensor | None]
    """From [D] to where a descent ends, if it does."""
    judge: Callable[[Tensor], float]
    """An ELBO (nats) of what is there."""
    parts: Tensor
    """bool [sites, D]: which arguments are a site's."""


def best_of(
    search: Search, at: Tensor, directions: Tensor, unseen: Tensor, start: Callable[[int], Tensor], worst: float
) -> Best | None:
    """The best to which pushes from ``at`` [D] lead; None where none is better than ``worst``, the ELBO there.

    ``directions`` [m, D], ``unseen`` bool [D]: what they move; ``start(number)``: where a push leads. Where some of the
    latents that it moved end in the wrong place (the sign of a discrimination), another place is known: all sites but
    one back at the saddle, which then is none. Two pushes that end alike are enough.
    """
    moved = unseen | (directions.abs() > 0).any(0)
    sites = [part for part in search.parts if (part & moved).any()]
    keep = [torch.where(moved, part, True) for part in sites if len(sites) > 1][:_PARTS]
    ends: list[tuple[float, Tensor]] = []
    for number in range(PUSHES):
        found = search.descend(start(number))
        if found is None:  # as for a network, which hardly settles
            if number + 1 == _ENOUGH and not ends:
                return None
            continue
        value = search.judge(found)
        for part in keep:
            other = search.descend(torch.where(part, found, at))
            if other is not None and (better := search.judge(other)) > value + _ALIKE:
                found, value = other, better
        if value > -math.inf:
            ends.append((value, found))
        best = max((each[0] for each in ends), default=math.inf)
        if sum(each[0] > best - _ALIKE for each in ends) == _ENOUGH:
            break
    if not ends or not best > worst + _ALIKE:
        return None
    first = next(found for value, found in ends if value > best - 1e-3)  # of equals the first, whatever rounding says
    return Best(first, tuple(sorted((value for value, _ in ends), reverse=True)))


def best_mode(loss: Loss, likelihood: Loss, at: Tensor, curvature: Tensor, search: Search, seed: int) -> Best | None:
    """The best mode to which pushes from ``at`` [D] lead; None where that is no saddle, or none leads to a mode.

    ``curvature``: the Hessian [D, D] at ``at``. A mode at ``at`` itself stays where no push finds a better one.
    """
    directions, unseen = falling(slope(loss, at), curvature), hidden(likelihood, at, seed)
    if not len(directions) and not unseen.any():
        return None
    scale = units(curvature.diagonal())

    def start(number: int) -> Tensor:
        noise = normals(seed, number, 0, at)
        along = pushed(loss, at, directions, noise) if len(directions) else at
        return along + unseen * scale * noise.flip(0)

    def descend(end: Tensor) -> Tensor | None:
        found: Tensor | None = end
        for again in range(_AGAIN):
            found = None if found is None else search.descend(found)
            along = at[None, :0] if found is None else falling(slope(loss, found), hessian(loss, found))
            if found is None or not len(along):
                break
            found = pushed(loss, found, along, normals(seed, PUSHES, again, at))
        return found

    return best_of(search._replace(descend=descend), at, directions, unseen, start, laplace_elbo(loss, at, curvature))


def laplace_elbo(loss: Loss, at: Tensor, curvature: Tensor | None = None) -> float:
    """The ELBO (nats) of a mean-field Gaussian at a mode, where minus the log joint is quadratic; -inf at no mode."""
    curvature = hessian(loss, at) if curvature is None else curvature
    scale = units(curvature.diagonal())
    if not curvature.isfinite().all() or torch.linalg.cholesky_ex(scale[:, None] * curvature * scale)[1]:
        return -math.inf
    with torch.no_grad():
        return float(scale.log().sum() + 0.5 * len(at) * math.log(2 * math.pi) - loss(at))


def descended(loss: Loss, start: Tensor, iterations: int = 100) -> Tensor:
    """The lowest place [D] that L-BFGS has seen from ``start`` [D]."""
    at = start.detach().clone().requires_grad_()
    least, where = math.inf, start.detach().clone()
    optimizer = torch.optim.LBFGS([at], max_iter=iterations, line_search_fn="strong_wolfe", tolerance_change=0.0)

    def closure() -> Tensor:
        nonlocal least, where
        optimizer.zero_grad()
        value = loss(at)
        value.backward()
        if float(value.detach()) < least:
            least, where = float(value.detach()), at.detach().clone()
        return value

    with suppress(IndexError):  # its line search has no step left to take
        optimizer.step(closure)
    return where


def units(diagonal: Tensor) -> Tensor:
    """Of each argument [D], by its curvature."""
    return torch.where(diagonal.abs() > 0, diagonal.abs(), 1.0).rsqrt()


def _is_zero(derivative: Tensor) -> Tensor:
    return derivative.abs() <= _ZERO * derivative.abs().max().clamp(min=1.0)
