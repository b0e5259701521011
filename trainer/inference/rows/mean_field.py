"""The factorized Gaussian of each row, found anew at each draw of the globals by local steps.

The local step of stochastic variational inference (Hoffman, Blei, Wang and Paisley, JMLR 14, 2013) in unconstrained
space: the means m and the sds s of a row maximize

    F(m, log s) = E_q f(u) + entropy of q,   q(u) = Normal(m, diag s^2),

by Newton steps on all 2d numbers, the expectation by nodes of a standard normal. At its maximum F is a lower bound of
the log evidence of the row. The maximum moves with the globals, but by the envelope theorem a first derivative needs
only that of F; half the square of the Newton step that is left, which is zero there, adds what second derivatives lack.

Shapes: B rows, d numbers, S nodes.
"""

import math

import torch
from torch import Tensor

from trainer.inference.rows.integral import (
    GRID,
    Fineness,
    LogDensity,
    Nodes,
    Normal,
    at_nodes,
    even_normals,
    factor_of,
    nodes_of,
    solved_backward,
    solved_forward,
)

_STEPS = 6  # from the row's own Gaussian
_LONGEST = 3.0  # a Newton step, in each number


def nodes_of_mean(fineness: Fineness, like: Tensor) -> Nodes:
    """As `nodes_of`; those of more than two numbers have covariance 1, so that a quadratic has its expectation."""
    size = fineness.size
    if size <= GRID:
        return nodes_of(fineness, like)
    points = even_normals(max(fineness.points, size), size)
    factor = torch.linalg.cholesky(points.mT @ points / len(points))
    points = torch.linalg.solve_triangular(factor, points.mT, upper=False).mT
    points = torch.cat([points, -points]).to(like)
    return Nodes(points, like.new_full((len(points),), -math.log(len(points))))


def log_bound(still: LogDensity, f: LogDensity, around: Normal, nodes: Nodes) -> Tensor:
    """The largest F of each row [B]; ``still``: f without what it depends on; ``around``: its Gaussian at its mode."""
    at, factor = _optimum(still, around, nodes)
    if not torch.is_grad_enabled():
        return _value(at_nodes(f, _points(at, nodes)), at, nodes)
    with torch.enable_grad():
        at = at.requires_grad_()
        value = _value(at_nodes(f, _points(at, nodes)), at, nodes)
        (gradient,) = torch.autograd.grad(value.sum(), at, create_graph=True)
        return value + 0.5 * (solved_forward(factor, gradient) ** 2).sum(1)


def _optimum(f: LogDensity, around: Normal, nodes: Nodes) -> tuple[Tensor, Tensor]:
    """(m, log s) [B, 2d] of the largest F, and the factor of minus its Hessian there."""
    curvature = (around.factor**2).sum(2)  # the diagonal of C C'
    at = torch.cat([around.mode, -0.5 * curvature.log()], 1)
    for _ in range(_STEPS):
        gradient, hessian = _derivatives(f, at, nodes)
        factor = factor_of(hessian)
        at = at + solved_backward(factor, solved_forward(factor, gradient)).clamp(-_LONGEST, _LONGEST)
    return at, factor_of(_derivatives(f, at, nodes)[1])


def _derivatives(f: LogDensity, at: Tensor, nodes: Nodes) -> tuple[Tensor, Tensor]:
    """The gradient [B, 2d] of F at (m, log s), and minus its Hessian [B, 2d, 2d], by those of f at the nodes."""
    with torch.enable_grad():
        u = _points(at, nodes).detach().requires_grad_()
        (slope,) = torch.autograd.grad(at_nodes(f, u).sum(), u, create_graph=True)
        each = slope.unbind(-1)
        curved = slope.requires_grad
        rows = [torch.autograd.grad(one.sum(), u, retain_graph=True)[0] if curved else 0 * u for one in each]
    slope, hessian = slope.detach(), torch.stack(rows, -2).detach()
    moved = at.chunk(2, dim=1)[1].exp() * nodes.at[:, None]  # of u, by log s [S, B, d]
    both = torch.cat([torch.ones_like(moved), moved], -1)
    weights = nodes.log_weights.exp()[:, None, None]
    mean = (weights * both * torch.cat([slope, slope], -1)).sum(0)
    entropy = torch.cat([torch.zeros_like(at[:, : at.shape[1] // 2]), torch.ones_like(at[:, at.shape[1] // 2 :])], 1)
    tiled = torch.cat([torch.cat([hessian, hessian], -1)] * 2, -2)
    second = (weights[..., None] * both[..., :, None] * tiled * both[..., None, :]).sum(0)
    return mean + entropy, -(second + torch.diag_embed(entropy * mean))


def _points(at: Tensor, nodes: Nodes) -> Tensor:
    """u [S, B, d] at ``at`` = (m, log s) [B, 2d]."""
    mean, log_sd = at.chunk(2, dim=1)
    return mean + log_sd.exp() * nodes.at[:, None]


def _value(values: Tensor, at: Tensor, nodes: Nodes) -> Tensor:
    """F [B] by the ``values`` [S, B] of f."""
    log_sd = at.chunk(2, dim=1)[1]
    entropy = log_sd.sum(1) + 0.5 * log_sd.shape[1] * (1 + math.log(2 * math.pi))
    return (nodes.log_weights.exp()[:, None] * values).sum(0) + entropy
