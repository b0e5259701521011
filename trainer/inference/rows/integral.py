"""Integrals over the numbers of each row: around the row's own mode, by nodes that are held fixed.

log of the integral of exp f(u) du over u [d], for every row at once. Newton steps find the mode m and minus the Hessian
H = C C' there; with u = m + C'^-1 e the integral is that of exp(f(u) + e'e / 2) under a standard normal e, which few
nodes take well: Gauss-Hermite's for d <= 2 (Liu and Pierce 1994; Pinheiro and Bates 1995), even (Sobol) normals beyond.
Where the nodes lie does not change the integral, so derivatives go through f at fixed nodes alone.

Shapes: B rows, d numbers, S nodes.
"""

import math
from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.quasirandom import SobolEngine

from trainer.inference.model.vmapped import CANNOT_BE_BATCHED, silent_vmap

LogDensity = Callable[[Tensor], Tensor]
"""Of u [B, d], that of each row [B], up to its integral; of [S B, d], which are these rows S times over, [S B]."""
_LOG_2PI = math.log(2 * math.pi)
_FIRST_NODES, _FIRST_DRAWS = (1, 9, 5), 8  # of 0, 1 and 2 numbers; of more
_MOST_NODES, _MOST_COPIES, _MOST_STEPS = 64, 2**11, 64
_LONGEST = 3.0  # the first Newton step, in each number
_SOME, _MUCH = 2.0, 16.0  # by which a bound of steps grows
_ENOUGH = 0.1  # of the rise that the slope promises
_LEAST = 1e-3  # of a curvature, what a pivot is at least; and what stands for none at all
GRID = 2  # numbers for which nodes are a grid


class Nodes(NamedTuple):
    """Of a standard normal."""

    at: Tensor
    """[S, d]."""
    log_weights: Tensor
    """[S]."""


class Fineness(NamedTuple):
    """How finely ``size`` numbers of a row are integrated."""

    size: int
    """d."""
    points: int
    """Nodes along each of up to two numbers; for more numbers even points, each with its mirror image."""
    steps: int = 4
    """Newton steps to the mode."""

    @classmethod
    def at_first(cls, size: int, nodes: int | None = None, draws: int | None = None) -> "Fineness":
        """As it is chosen before anything is measured, unless ``nodes`` or ``draws`` say it."""
        return cls(size, (nodes or _FIRST_NODES[size]) if size <= GRID else draws or _FIRST_DRAWS)

    @property
    def copies(self) -> int:
        """S: how many times each row is evaluated for its integral."""
        return self.points**self.size if self.size <= GRID else 2 * self.points

    @property
    def is_possible(self) -> bool:
        """Whether it is in bounds that any machine can bear."""
        along = self.points <= _MOST_NODES or self.size > GRID
        return along and self.copies <= _MOST_COPIES and self.steps <= _MOST_STEPS

    def with_more_points(self) -> "Fineness":
        """Twice as many; along an axis of a grid a quarter more, and an odd number if it was odd."""
        more = 2 * -(-self.points // 8) if self.size <= GRID else self.points
        return self._replace(points=self.points + more)

    def with_twice_the_points(self) -> "Fineness":
        """By which the error of this one is measured."""
        return self._replace(points=2 * self.points)

    def with_more_steps(self) -> "Fineness":
        """Twice as many."""
        return self._replace(steps=2 * self.steps)


def nodes_of(fineness: Fineness, like: Tensor) -> Nodes:
    """On a grid of up to two numbers; for more, even points and their mirror images."""
    size, points = fineness.size, fineness.points
    if size == 0:
        return Nodes(like.new_zeros(1, 0), like.new_zeros(1))
    if size <= GRID:
        x, w = np.polynomial.hermite_e.hermegauss(points)
        grid = np.stack(np.meshgrid(*[x] * size, indexing="ij"), -1).reshape(-1, size)
        weights = np.log(reduce(np.multiply.outer, [w / w.sum()] * size)).reshape(-1)
        return Nodes(like.new_tensor(grid), like.new_tensor(weights))
    normal = even_normals(points, size)
    both = torch.cat([normal, -normal]).to(like)
    return Nodes(both, like.new_full((len(both),), -math.log(len(both))))


def even_normals(count: int, size: int) -> Tensor:
    """float64 [count, size]: the first points of a scrambled Sobol sequence, each axis a standard normal."""
    uniform = SobolEngine(size, scramble=True, seed=0).draw(count, dtype=torch.float64)
    normals: Tensor = torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))
    return normals


class Normal(NamedTuple):
    """Each row's Gaussian: its mode, and the factor of its curvature."""

    mode: Tensor
    """[B, d]."""
    factor: Tensor
    """C [B, d, d], lower: C C' is minus the Hessian."""

    def at(self, point: Tensor) -> Tensor:
        """u [B, d] at e [d] or [B, d]: m + C'^-1 e."""
        return self.mode + solved_backward(self.factor, point.expand_as(self.mode))

    @property
    def log_volume(self) -> Tensor:
        """[B]: log of what a standard normal's volume becomes."""
        logs = self.factor.diagonal(dim1=1, dim2=2).log()
        return 0.5 * self.mode.shape[1] * _LOG_2PI - logs.sum(1)


def around_the_mode(f: LogDensity, start: Tensor, steps: int) -> Normal:
    """Newton steps from ``start`` [B, d], which f never falls by; no derivative follows the result.

    The first is at most 3 long in each number. A bound doubles where a step reached it, or grows sixteenfold where the
    curvature has stayed, since then f is nearly a parabola whatever its unit; a step that f falls by is not taken, and
    the bound becomes a quarter of it.
    """
    u, longest = start.detach(), start.new_full((len(start), 1), _LONGEST)
    here, rounding = derivatives(f, u), 16 * torch.finfo(u.dtype).eps
    for _ in range(steps):
        step = _newton(here)
        length = step.abs().amax(1, keepdim=True)
        step = step * (longest / length.clamp(min=1e-30)).clamp(max=1)
        there = derivatives(f, u + step)
        expected = _ENOUGH * (here.gradient * step).sum(1) - rounding * (1 + here.value.abs())
        rose = (there.value >= here.value + expected)[:, None]
        alike = (there.curvatures - here.curvatures).abs() <= 0.5 * here.curvatures.abs()
        grown = torch.where(alike.all(1, keepdim=True), _MUCH, _SOME) * longest
        longest = torch.where(
            rose, torch.where(length > longest, grown, longest), 0.25 * torch.minimum(length, longest)
        )
        u = torch.where(rose, there.at, u)
        here = Derivatives(u, *(_where(rose, new, old) for new, old in zip(there[1:], here[1:])))
    return Normal(u, factor_of(here.curvature))


def log_integral(f: LogDensity, normal: Normal, nodes: Nodes) -> Tensor:
    """log of the integral of exp f over u, [B]."""
    values = at_nodes(f, torch.stack([normal.at(e) for e in nodes.at]))
    weights = nodes.log_weights + 0.5 * (nodes.at**2).sum(1)
    return torch.logsumexp(values + weights[:, None], 0) + normal.log_volume


def at_nodes(f: LogDensity, u: Tensor) -> Tensor:
    """f [S, B] at ``u`` [S, B, d]: batched over the nodes, or with the rows S times over where that is not possible."""
    try:
        with silent_vmap():
            values: Tensor = torch.vmap(f)(u)
            return values
    except CANNOT_BE_BATCHED:
        return f(u.flatten(0, 1)).view(u.shape[:2])


def log_gaussian_integral(still: LogDensity, f: LogDensity, start: Tensor) -> Tensor:
    """`log_integral` where exp f is a Gaussian's density in u up to a factor: exact, and so are all its derivatives.

    From the value, gradient and Hessian at a point, which is held fixed: the mode of ``still``, which is f without what
    it depends on, so that nothing cancels.
    """
    u = start + _newton(derivatives(still, start), exact=True)
    differentiated = torch.is_grad_enabled()
    with torch.enable_grad():
        at = u.detach().requires_grad_()
        value = f(at)
        (gradient,) = torch.autograd.grad(value.sum(), at, create_graph=True)
        hessian = -_by_number(gradient, at, differentiated).movedim(0, 1)
        normal = Normal(at, factor_of(hessian, exact=True))
        found = value + 0.5 * (solved_forward(normal.factor, gradient) ** 2).sum(1) + normal.log_volume
    return found if differentiated else found.detach()


class Derivatives(NamedTuple):
    """Of f, at a point of each row."""

    at: Tensor
    """[B, d]."""
    value: Tensor
    """[B]."""
    gradient: Tensor
    """[B, d]."""
    curvature: Tensor
    """Minus the Hessian [B, d, d]."""

    @property
    def curvatures(self) -> Tensor:
        """[B, d]: of each number alone."""
        return self.curvature.diagonal(dim1=1, dim2=2)


def derivatives(f: LogDensity, u: Tensor) -> Derivatives:
    """Rows do not meet: the derivatives of a sum over them are each one's."""
    size = u.shape[1]
    with torch.enable_grad():
        at = u.detach().requires_grad_()
        value = f(at)
        (gradient,) = torch.autograd.grad(value.sum(), at, create_graph=True)
        hessian = _by_number(gradient, at) if gradient.requires_grad else u.new_zeros(size, *u.shape)
    return Derivatives(at.detach(), value.detach(), gradient.detach(), -hessian.detach().movedim(0, 1))


def _newton(here: Derivatives, exact: bool = False) -> Tensor:
    """The Newton step [B, d]."""
    factor = factor_of(here.curvature, exact)
    return solved_backward(factor, solved_forward(factor, here.gradient))


def _where(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` in the ``rows`` [B, 1] bool, else ``old``."""
    return torch.where(rows.view(-1, *(1,) * (new.dim() - 1)), new, old)


def _by_number(gradient: Tensor, at: Tensor, create_graph: bool = False) -> Tensor:
    """[d, B, d]: the derivative of each number's ``gradient`` [B, d], all together where that is possible."""
    size = at.shape[1]
    options = {"retain_graph": True, "create_graph": create_graph}
    unit = torch.eye(size, dtype=at.dtype, device=at.device)[:, None].expand(-1, *at.shape)
    if size > 1:
        try:
            with silent_vmap():
                return torch.autograd.grad(gradient, at, unit, is_grads_batched=True, **options)[0]
        except RuntimeError:  # an operation that cannot be batched
            pass
    return torch.stack([torch.autograd.grad(gradient, at, each, **options)[0] for each in unit])


def factor_of(matrix: Tensor, exact: bool = False) -> Tensor:
    """The lower Cholesky factor [B, d, d]; a pivot that is not positive changes its sign, unless ``exact``."""
    size, rounding = matrix.shape[1], 16 * torch.finfo(matrix.dtype).eps
    columns: list[Tensor] = []
    for j in range(size):
        column = 0.5 * (matrix[:, j:, j] + matrix[:, j, j:])
        if columns:
            known = torch.stack(columns, 2)
            column = column - (known[:, j:] * known[:, j, None]).sum(2)
        pivot = column[:, :1]
        if not exact:
            whole = matrix[:, j, j, None].abs()
            other = torch.maximum(pivot.abs(), _LEAST * whole)
            pivot = torch.where(pivot > rounding * whole, pivot, torch.where(other > 0, other, _LEAST))
        pivot = pivot.sqrt()
        columns.append(pad(torch.cat([pivot, column[:, 1:] / pivot], 1), (j, 0)))
    return torch.stack(columns, 2)


def solved_forward(factor: Tensor, right: Tensor) -> Tensor:
    """C^-1 times ``right`` [B, d]."""
    found: list[Tensor] = []
    for i in range(right.shape[1]):
        known = (factor[:, i, :i] * torch.stack(found, 1)).sum(1) if found else 0.0
        found.append((right[:, i] - known) / factor[:, i, i])
    return torch.stack(found, 1)


def solved_backward(factor: Tensor, right: Tensor) -> Tensor:
    """C'^-1 times ``right`` [B, d]."""
    found: list[Tensor] = []
    for i in reversed(range(right.shape[1])):
        known = (factor[:, i + 1 :, i] * torch.stack(found, 1)).sum(1) if found else 0.0
        found.insert(0, (right[:, i] - known) / factor[:, i, i])
    return torch.stack(found, 1)
