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
from torch.quasirandom import SobolEngine

from trainer.inference.model.vmapped import silent_vmap

LogDensity = Callable[[Tensor], Tensor]
"""Of u [B, d], that of each row [B], up to its integral."""
_LOG_2PI = math.log(2 * math.pi)
_STEPS = 8
_LONGEST = 3.0  # a Newton step, in each number
_LEAST = 1e-3  # curvature
_GRID = 2  # numbers for which nodes are a grid


class Nodes(NamedTuple):
    """Of a standard normal."""

    at: Tensor
    """[S, d]."""
    log_weights: Tensor
    """[S]."""


def nodes_of(size: int, nodes: int, draws: int, like: Tensor) -> Nodes:
    """``nodes`` along each of ``size`` <= 2 numbers, or ``draws`` even points and their mirror images for more."""
    if size <= _GRID:
        x, w = np.polynomial.hermite_e.hermegauss(nodes)
        grid = np.stack(np.meshgrid(*[x] * size, indexing="ij"), -1).reshape(-1, size)
        weights = np.log(reduce(np.multiply.outer, [w / w.sum()] * size)).reshape(-1)
        return Nodes(like.new_tensor(grid), like.new_tensor(weights))
    uniform = SobolEngine(size, scramble=True, seed=0).draw(draws, dtype=torch.float64)
    normal = torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))
    points = torch.cat([normal, -normal]).to(like)
    return Nodes(points, like.new_full((len(points),), -math.log(len(points))))


class Normal(NamedTuple):
    """Each row's Gaussian: its mode, and the factor of its curvature."""

    mode: Tensor
    """[B, d]."""
    factor: list[list[Tensor]]
    """C [d][d] of [B], lower: C C' is minus the Hessian."""

    def at(self, point: Tensor) -> Tensor:
        """u [B, d] at e [d] or [B, d]: m + C'^-1 e."""
        size, e = self.mode.shape[1], point.expand_as(self.mode)
        found: list[Tensor] = [e[:, 0]] * size
        for i in reversed(range(size)):
            rest = e[:, i]
            for j in range(i + 1, size):
                rest = rest - self.factor[j][i] * found[j]
            found[i] = rest / self.factor[i][i]
        return self.mode + torch.stack(found, 1)

    @property
    def log_volume(self) -> Tensor:
        """[B]: log of what a standard normal's volume becomes."""
        size = self.mode.shape[1]
        logs = torch.stack([self.factor[i][i].log() for i in range(size)]).sum(0)
        return 0.5 * size * _LOG_2PI - logs


def around_the_mode(f: LogDensity, start: Tensor) -> Normal:
    """Newton steps from ``start`` [B, d], none longer than 3 in a number; no derivative follows the result."""
    u = start.detach()
    for _ in range(_STEPS):
        gradient, hessian = _derivatives(f, u)
        u = u + _solved(_factor(hessian), gradient).clamp(-_LONGEST, _LONGEST)
    return Normal(u, _factor(_derivatives(f, u)[1]))


def log_integral(f: LogDensity, normal: Normal, nodes: Nodes) -> Tensor:
    """log of the integral of exp f over u, [B]."""

    def at(e: Tensor) -> Tensor:
        return f(normal.at(e))

    try:
        with silent_vmap():
            values: Tensor = torch.vmap(at)(nodes.at)
    except (RuntimeError, ValueError, NotImplementedError, IndexError):  # an operation that cannot be batched
        values = torch.stack([at(e) for e in nodes.at])
    weights = nodes.log_weights + 0.5 * (nodes.at**2).sum(1)
    return torch.logsumexp(values + weights[:, None], 0) + normal.log_volume


def _derivatives(f: LogDensity, u: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
    """The gradient [B, d] and minus the Hessian [d][d] of [B]. Rows do not meet: a sum over them gives each one's."""
    size = u.shape[1]
    with torch.enable_grad():
        at = u.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(f(at).sum(), at, create_graph=True)
        second = [torch.zeros_like(u)] * size
        for j in range(size):
            if gradient.requires_grad:
                second[j] = torch.autograd.grad(gradient[:, j].sum(), at, retain_graph=True)[0]
    return gradient.detach(), [[-second[j][:, i].detach() for i in range(size)] for j in range(size)]


def _factor(matrix: list[list[Tensor]]) -> list[list[Tensor]]:
    """The lower Cholesky factor; a pivot that is not positive becomes a small one."""
    size = len(matrix)
    factor = [[torch.zeros_like(matrix[0][0])] * size for _ in range(size)]
    for j in range(size):
        pivot = matrix[j][j]
        for k in range(j):
            pivot = pivot - factor[j][k] ** 2
        factor[j][j] = pivot.clamp(min=_LEAST).sqrt()
        for i in range(j + 1, size):
            rest = 0.5 * (matrix[i][j] + matrix[j][i])
            for k in range(j):
                rest = rest - factor[i][k] * factor[j][k]
            factor[i][j] = rest / factor[j][j]
    return factor


def _solved(factor: list[list[Tensor]], right: Tensor) -> Tensor:
    """(C C')^-1 times ``right`` [B, d]."""
    size = right.shape[1]
    forward: list[Tensor] = []
    for i in range(size):
        rest = right[:, i]
        for k in range(i):
            rest = rest - factor[i][k] * forward[k]
        forward.append(rest / factor[i][i])
    found = list(forward)
    for i in reversed(range(size)):
        rest = forward[i]
        for k in range(i + 1, size):
            rest = rest - factor[k][i] * found[k]
        found[i] = rest / factor[i][i]
    return torch.stack(found, 1)
