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
_STEPS = 8
_LONGEST = 3.0  # a Newton step, in each number
_LEAST, _NONE = 1e-3, 1e-6  # curvature that is taken for none, and what is taken for it
_GRID = 2  # numbers for which nodes are a grid


class Nodes(NamedTuple):
    """Of a standard normal."""

    at: Tensor
    """[S, d]."""
    log_weights: Tensor
    """[S]."""


def nodes_of(size: int, nodes: int, draws: int, like: Tensor) -> Nodes:
    """``nodes`` along each of ``size`` <= 2 numbers, or ``draws`` even points and their mirror images for more."""
    if size == 0:
        return Nodes(like.new_zeros(1, 0), like.new_zeros(1))
    if size <= _GRID:
        x, w = np.polynomial.hermite_e.hermegauss(nodes)
        grid = np.stack(np.meshgrid(*[x] * size, indexing="ij"), -1).reshape(-1, size)
        weights = np.log(reduce(np.multiply.outer, [w / w.sum()] * size)).reshape(-1)
        return Nodes(like.new_tensor(grid), like.new_tensor(weights))
    normal = even_normals(draws, size)
    points = torch.cat([normal, -normal]).to(like)
    return Nodes(points, like.new_full((len(points),), -math.log(len(points))))


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
        return self.mode + _backward(self.factor, point.expand_as(self.mode))

    @property
    def log_volume(self) -> Tensor:
        """[B]: log of what a standard normal's volume becomes."""
        logs = self.factor.diagonal(dim1=1, dim2=2).log()
        return 0.5 * self.mode.shape[1] * _LOG_2PI - logs.sum(1)


def around_the_mode(f: LogDensity, start: Tensor) -> Normal:
    """Newton steps from ``start`` [B, d], none longer than 3 in a number; no derivative follows the result."""
    u = start.detach()
    for _ in range(_STEPS):
        gradient, hessian = _derivatives(f, u)
        factor = _factor(hessian)
        u = u + _backward(factor, _forward(factor, gradient)).clamp(-_LONGEST, _LONGEST)
    return Normal(u, _factor(_derivatives(f, u)[1]))


def log_integral(f: LogDensity, normal: Normal, nodes: Nodes) -> Tensor:
    """log of the integral of exp f over u, [B]."""

    def at(e: Tensor) -> Tensor:
        return f(normal.at(e))

    try:
        with silent_vmap():
            values: Tensor = torch.vmap(at)(nodes.at)
    except CANNOT_BE_BATCHED:
        values = f(torch.cat([normal.at(e) for e in nodes.at])).view(len(nodes.at), -1)
    weights = nodes.log_weights + 0.5 * (nodes.at**2).sum(1)
    return torch.logsumexp(values + weights[:, None], 0) + normal.log_volume


def log_gaussian_integral(still: LogDensity, f: LogDensity, start: Tensor) -> Tensor:
    """`log_integral` where exp f is a Gaussian's density in u up to a factor: exact, and so are all its derivatives.

    From the value, gradient and Hessian at a point, which is held fixed: the mode of ``still``, which is f without what
    it depends on, so that nothing cancels.
    """
    gradient, hessian = _derivatives(still, start)
    factor = _factor(hessian, least=None)
    u = start + _backward(factor, _forward(factor, gradient))
    differentiated = torch.is_grad_enabled()
    with torch.enable_grad():
        at = u.detach().requires_grad_()
        value = f(at)
        (gradient,) = torch.autograd.grad(value.sum(), at, create_graph=True)
        hessian = -_by_number(gradient, at, differentiated).movedim(0, 1)
        normal = Normal(at, _factor(hessian, least=None))
        found = value + 0.5 * (_forward(normal.factor, gradient) ** 2).sum(1) + normal.log_volume
    return found if differentiated else found.detach()


def _derivatives(f: LogDensity, u: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient [B, d] and minus the Hessian [B, d, d]. Rows do not meet: a sum over them gives each one's."""
    size = u.shape[1]
    with torch.enable_grad():
        at = u.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(f(at).sum(), at, create_graph=True)
        hessian = _by_number(gradient, at) if gradient.requires_grad else u.new_zeros(size, *u.shape)
    return gradient.detach(), -hessian.detach().movedim(0, 1)


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


def _factor(matrix: Tensor, least: float | None = _LEAST) -> Tensor:
    """The lower Cholesky factor [B, d, d]; a pivot that is not positive becomes ``least`` (None: not a number)."""
    size = matrix.shape[1]
    columns: list[Tensor] = []
    for j in range(size):
        column = 0.5 * (matrix[:, j:, j] + matrix[:, j, j:])
        if columns:
            known = torch.stack(columns, 2)
            column = column - (known[:, j:] * known[:, j, None]).sum(2)
        pivot = column[:, :1]
        pivot = (pivot if least is None else torch.where(pivot > _NONE, pivot, least)).sqrt()
        columns.append(pad(torch.cat([pivot, column[:, 1:] / pivot], 1), (j, 0)))
    return torch.stack(columns, 2)


def _forward(factor: Tensor, right: Tensor) -> Tensor:
    """C^-1 times ``right`` [B, d]."""
    found: list[Tensor] = []
    for i in range(right.shape[1]):
        known = (factor[:, i, :i] * torch.stack(found, 1)).sum(1) if found else 0.0
        found.append((right[:, i] - known) / factor[:, i, i])
    return torch.stack(found, 1)


def _backward(factor: Tensor, right: Tensor) -> Tensor:
    """C'^-1 times ``right`` [B, d]."""
    found: list[Tensor] = []
    for i in reversed(range(right.shape[1])):
        known = (factor[:, i + 1 :, i] * torch.stack(found, 1)).sum(1) if found else 0.0
        found.insert(0, (right[:, i] - known) / factor[:, i, i])
    return torch.stack(found, 1)
