"""The mean-field optimum of a model whose rows have latents of their own, by quadrature and Newton's method in float64.

The marginal log density of the globals is a sum over rows of the log of an integral over the row's numbers e, which are
standard normal: the model is written anew, non-centered, and by hand. Rows that are equal are taken once, with their
count, so that a million rows cost no more than some thousands. Each row's integral has 60 Gauss-Hermite nodes in each
number, placed by the mean and covariance of its density on a grid. Expectations under the guide are by the rule of
McNamee and Stenger (1967), which is exact for polynomials of degree five.

Shapes: U rows that differ, d numbers of a row, S nodes, D globals in unconstrained space, P points of the rule.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, biject_to

from scripts.references.case import Answer, Rows

NODES = 60
_GRID = {1: (8.0, 401), 2: (6.0, 61)}  # by d: how far it reaches, and points along a number
_MOST = 2**21  # numbers that are held at once
_CLOSE = 1e-7  # of a step, in scales
Values = Mapping[str, Tensor]


class Global(NamedTuple):
    """A latent that all rows share."""

    prior: Distribution
    truth: Any
    """The value that the rows are drawn with."""


@dataclass(frozen=True)
class RowProblem:
    """``log_row(values, e [S, U, d], columns)``: [S, U], the log-likelihood of rows at their numbers, ``columns`` with
    an axis of nodes in front; ``given``: the columns as the model takes them.
    """

    name: str
    model: Callable[..., None]
    rows: Callable[[np.random.Generator, int], Rows]
    log_row: Callable[[Values, Tensor, Values], Tensor]
    latents: Mapping[str, Global]
    """In the order of the model's."""
    size: int = 1
    """d."""
    given: Callable[[Rows], Mapping[str, Any]] = dict


class Marginal:
    """log p(rows, globals) as a function of the globals in unconstrained space."""

    def __init__(self, problem: RowProblem, rows: Rows, nodes: int = NODES):
        self.problem = problem
        truth = {name: torch.as_tensor(each.truth, dtype=torch.float64) for name, each in problem.latents.items()}
        self.maps = {name: biject_to(each.prior.support) for name, each in problem.latents.items()}
        places = {name: each.inv(truth[name]) for name, each in self.maps.items()}
        self.shapes = {name: place.shape for name, place in places.items()}
        self.start = torch.cat([place.reshape(-1) for place in places.values()])
        self.columns, self.counts = distinct(rows)
        self.normal = self._centered(truth)
        x, w = np.polynomial.hermite_e.hermegauss(nodes)
        self.at = _product(torch.from_numpy(x), problem.size)
        weights = _product(torch.from_numpy(np.log(w / w.sum())), problem.size).sum(1)
        self.log_weights = weights + 0.5 * (self.at**2).sum(1)  # of the integral of exp f: over a normal's density

    def derivatives(self, u: Tensor, second: bool = False) -> tuple[float, Tensor, Tensor]:
        """Value, gradient [D] and Hessian [D, D] (zeros unless ``second``) at ``u`` [D]."""
        parts = [self.log_prior, *map(self._part, self._chunks())]
        total, gradient, hessian = 0.0, torch.zeros_like(u), u.new_zeros(len(u), len(u))
        for part in parts:
            at = u.detach().requires_grad_()
            value = part(at)
            (slope,) = torch.autograd.grad(value, at, create_graph=second)
            total, gradient = total + value.item(), gradient + slope.detach()
            if second:
                rows = [torch.autograd.grad(each, at, retain_graph=True)[0] for each in slope]
                hessian += torch.stack(rows)
        return total, gradient, hessian

    def values(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The globals in their own space, and the log of the Jacobian."""
        parts = u.split([math.prod(shape) for shape in self.shapes.values()])
        found, jacobian = {}, u.new_zeros(())
        for (name, shape), part in zip(self.shapes.items(), parts, strict=True):
            place = part.reshape(shape)
            found[name] = self.maps[name](place)
            jacobian = jacobian + self.maps[name].log_abs_det_jacobian(place, found[name]).sum()
        return found, jacobian

    def log_prior(self, u: Tensor) -> Tensor:
        """With that of the Jacobian, [] at ``u`` [D]."""
        values, jacobian = self.values(u)
        logs = [self.problem.latents[name].prior.log_prob(value).sum() for name, value in values.items()]
        return jacobian + torch.stack(logs).sum()

    def _part(self, rows: slice) -> Callable[[Tensor], Tensor]:
        """Of the rows' densities, their sum."""
        (mean, factor), columns = self.normal, {name: each[rows] for name, each in self.columns.items()}

        def of(u: Tensor) -> Tensor:
            e = mean[rows] + torch.einsum("uij,sj->sui", factor[rows], self.at)
            density = self._density(self.values(u)[0], e, columns) + self.log_weights[:, None]
            volume = factor[rows].diagonal(dim1=1, dim2=2).log().sum(1)
            return (self.counts[rows] * (torch.logsumexp(density, 0) + volume)).sum()

        return of

    def _density(self, values: Values, e: Tensor, columns: Values) -> Tensor:
        """[S, U]: log p(row, e), over that of a normal at 0 (whose weights those of the nodes are)."""
        return self.problem.log_row(values, e, {k: each[None] for k, each in columns.items()}) - 0.5 * (e**2).sum(-1)

    def _chunks(self) -> list[slice]:
        each = max(1, _MOST // len(self.at))
        return [slice(first, first + each) for first in range(0, len(self.counts), each)]

    def _centered(self, truth: Values) -> tuple[Tensor, Tensor]:
        """Mean [U, d] and factor of the covariance [U, d, d] of e given the row, on a grid that is placed twice."""
        size = self.problem.size
        reach, points = _GRID[size]
        grid = _product(torch.linspace(-reach, reach, points, dtype=torch.float64), size)
        found = []
        each = max(1, _MOST // len(grid))
        for first in range(0, len(self.counts), each):
            columns = {name: column[first : first + each] for name, column in self.columns.items()}
            rows = len(next(iter(columns.values())))
            mean, factor = grid.new_zeros(rows, size), torch.eye(size, dtype=torch.float64).expand(rows, -1, -1)
            for _ in range(2):
                e = mean + torch.einsum("uij,sj->sui", factor, grid)
                weights = torch.softmax(self._density(truth, e, columns), 0)
                mean = torch.einsum("su,sui->ui", weights, e)
                moment = torch.einsum("su,sui,suj->uij", weights, e - mean, e - mean)
                factor = torch.linalg.cholesky(moment)
            found.append((mean, factor))
        means, factors = zip(*found, strict=True)
        return torch.cat(means), torch.cat(factors)


def distinct(rows: Rows) -> tuple[dict[str, Tensor], Tensor]:
    """The rows that differ, float64 by column, and how often each one comes [U]."""
    columns = {name: np.asarray(column, dtype=np.float64) for name, column in rows.items()}
    flat = {name: column.reshape(len(column), -1) for name, column in columns.items()}
    ends = np.cumsum([each.shape[1] for each in flat.values()])[:-1]
    unique, counts = np.unique(np.concatenate(list(flat.values()), axis=1), axis=0, return_counts=True)
    parts = zip(columns, np.split(unique, ends, axis=1), strict=True)
    found = {name: torch.from_numpy(part.reshape(len(unique), *columns[name].shape[1:])) for name, part in parts}
    return found, torch.from_numpy(counts.astype(np.float64))


class Rule(NamedTuple):
    """Of a standard normal in D numbers, exact up to degree five."""

    at: Tensor
    """[P, D]."""
    weights: Tensor
    """[P], with a sum of 1, some of them negative."""


def degree_five(size: int) -> Rule:
    """2 D^2 + 1 points: the origin, pairs on the axes, and four in each plane of two axes."""
    unit = math.sqrt(3.0) * torch.eye(size, dtype=torch.float64)
    planes = [a * unit[i] + b * unit[j] for i in range(size) for j in range(i) for a in (1, -1) for b in (1, -1)]
    at = torch.stack([torch.zeros(size, dtype=torch.float64), *unit, *-unit, *planes])
    weights = [(size**2 - 7 * size + 18) / 18, *[(4 - size) / 18] * 2 * size, *[1 / 36] * len(planes)]
    return Rule(at, torch.tensor(weights, dtype=torch.float64))


def mode(marginal: Marginal) -> tuple[Tensor, Tensor]:
    """Where the density is highest [D], and minus its Hessian there, by Newton steps halved until it grows."""
    u = marginal.start
    for _ in range(50):
        value, gradient, hessian = marginal.derivatives(u, second=True)
        step = torch.linalg.solve(-hessian, gradient)
        if float((step.abs() * (-hessian.diagonal()).sqrt()).max()) < _CLOSE:
            return u, -hessian
        while marginal.derivatives(u + step)[0] < value - 1e-9 * abs(value):
            step = step / 2
        u = u + step
    raise RuntimeError("Newton's method found no mode")


def optimum(marginal: Marginal) -> Answer:
    """The mean-field optimum: loc m and scale s with E g = 0 and E g_i e_i = -1 / s_i, g the gradient at m + s e."""
    loc, precision = mode(marginal)
    scale, rule = precision.diagonal().rsqrt(), degree_five(len(loc))
    for _ in range(50):
        found = [marginal.derivatives(loc + scale * e)[:2] for e in rule.at]
        values = torch.tensor([value for value, _ in found], dtype=torch.float64)
        slopes = torch.stack([gradient for _, gradient in found])
        step = torch.linalg.solve(precision, rule.weights @ slopes)
        ahead = (-(rule.weights @ (slopes * rule.at)) / scale).rsqrt()
        still = max(float((step / scale).abs().max()), float((ahead / scale - 1).abs().max()))
        if still < _CLOSE:
            entropy = scale.log().sum() + 0.5 * len(loc) * math.log(2 * math.pi * math.e)
            top = np.ones(len(loc), dtype=bool)
            return Answer(loc.numpy(), scale.numpy(), float(rule.weights @ values + entropy), top)
        loc, scale = loc + step, ahead
    raise RuntimeError("the mean-field equations were not solved")


def _product(axis: Tensor, size: int) -> Tensor:
    """[S, size]: all combinations of the numbers of ``axis``."""
    return torch.stack(torch.meshgrid(*[axis] * size, indexing="ij"), -1).reshape(-1, size)
