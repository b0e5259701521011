"""The posterior of a row that has one number: its distribution function, by a grid around the mode.

The nodes u = m + s c sinh(t / c), t in equal steps, lie close at the mode and reach 20 sds beyond it. In t the density
is smooth and falls to nothing at both ends, so sums over the nodes are integrals to rounding (Trefethen and Weideman,
"The exponentially convergent trapezoidal rule", SIAM Review 56, 2014), and so are the distribution function and the
slope of the density at the nodes by cardinal (sinc) functions (Stenger, "Numerical methods based on sinc and analytic
functions", 1993). Between nodes a polynomial of degree five joins them.

Shapes: B rows, R draws of the globals, S nodes, Q levels.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_END = 6.0  # of t
_CURVE = 2.0  # c
_ITERATIONS = 40
_CLOSE = 1e-10  # of a level


class LineNodes(NamedTuple):
    """On the line of t, for every row."""

    at: Tensor
    """[S]: (u - m) / s."""
    log_weights: Tensor
    """[S]: log of du / s that a node stands for."""


def line_nodes(count: int, like: Tensor) -> LineNodes:
    """``count`` of them, of the type of ``like``."""
    t = torch.linspace(-_END, _END, count, dtype=torch.float64)
    weights = (t[1] - t[0]) * (t / _CURVE).cosh()
    return LineNodes((_CURVE * (t / _CURVE).sinh()).to(like), weights.log().to(like))


class Line(NamedTuple):
    """The posteriors of rows, one for each draw of the globals."""

    mode: Tensor
    """[R, B]."""
    scale: Tensor
    """s [R, B]."""
    tables: Tensor
    """float64 [3, S, R, B]: the distribution function at the nodes, and its first two derivatives by their number."""

    @classmethod
    def of(cls, mode: Tensor, scale: Tensor, weights: Tensor) -> "Line":
        """``weights`` [S, R, B] of the nodes of `line_nodes`, with a sum of 1."""
        below, slope = (torch.tensor(each, device=mode.device) for each in _cardinal(len(weights)))
        weights = weights.double()
        tables = torch.stack([torch.tensordot(below, weights, 1), weights, torch.tensordot(slope, weights, 1)])
        return cls(mode.double(), scale.double(), tables)

    def below(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The probability [R, B] of what lies below ``u`` [R, B] or [B], and its derivative by u."""
        last, step = self.tables.shape[1] - 1, 2 * _END / (self.tables.shape[1] - 1)
        e = ((u - self.mode) / self.scale).expand_as(self.mode)
        t = (_CURVE * (e / _CURVE).asinh()).clamp(-_END, _END)
        place = (t + _END) / step
        cell = place.floor().clamp(0, last - 1).long()
        left, right = (self.tables.gather(1, each.expand(3, 1, *each.shape)).squeeze(1) for each in (cell, cell + 1))
        value, slope = _between(left, right, place - cell)
        return value, slope / (step * self.scale * (t / _CURVE).cosh())

    def quantiles(self, level: float) -> Tensor:
        """[B]: that of the mixture over the draws."""

        def at(u: Tensor) -> tuple[Tensor, Tensor]:
            value, density = self.below(u)
            return value.mean(0), density.mean(0)

        (low, _), (_, high) = (each.aminmax(dim=0) for each in self.ends)
        e = _CURVE * (torch.linspace(-_END, _END, self.tables.shape[1], dtype=torch.float64) / _CURVE).sinh()
        first, second = (torch.tensordot(each.to(low), self.tables[1], 1) for each in (e, e**2))
        mean = (self.mode + self.scale * first).mean(0)
        variance = (self.scale**2 * (second - first**2)).mean(0) + (self.mode + self.scale * first).var(
            0, unbiased=False
        )
        start = mean + variance.sqrt() * float(torch.special.ndtri(torch.tensor(level, dtype=torch.float64)))
        return _solved(at, torch.full_like(low, level), (low, high), start)

    def drawn(self, level: Tensor) -> Tensor:
        """u [R, B] below which the probability is ``level`` [R, B], by draw."""
        cell = ((self.tables[0] <= level).sum(0) - 1).clamp(0, self.tables.shape[1] - 2)
        left, right = (self.tables.gather(1, each.expand(3, 1, *each.shape)).squeeze(1) for each in (cell, cell + 1))
        start = ((level - left[0]) / (right[0] - left[0])).nan_to_num(0.5).clamp(0, 1)
        ends = torch.zeros_like(start), torch.ones_like(start)
        place = cell + _solved(lambda s: _between(left, right, s), level.double(), ends, start)
        t = place * (2 * _END / (self.tables.shape[1] - 1)) - _END
        return self.mode + self.scale * _CURVE * (t / _CURVE).sinh()

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The first and the last node, [R, B]."""
        reach = _CURVE * math.sinh(_END / _CURVE) * self.scale
        return self.mode - reach, self.mode + reach


def _solved(
    at: Callable[[Tensor], tuple[Tensor, Tensor]], level: Tensor, ends: tuple[Tensor, Tensor], start: Tensor
) -> Tensor:
    """Where a rising function, given with its derivative, is ``level``: Newton steps, halving where one leads out."""
    (low, high), u = ends, start
    for _ in range(_ITERATIONS):
        value, density = at(u)
        over = value - level
        low, high = torch.where(over > 0, low, u), torch.where(over > 0, u, high)
        step = u - over / density
        step = torch.where((step > low) & (step < high), step, (low + high) / 2)
        there = (over.abs() < _CLOSE) | (low >= high)  # a place that is found stays, whatever the others do
        if bool(there.all()):
            break
        u = torch.where(there, u, step)
    return u


def _between(left: Tensor, right: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative at ``s`` in [0, 1] of the polynomial of degree five with the given value and first two
    derivatives [3, ...] at both ends.
    """
    rest = right[0] - left[0] - left[1] - left[2] / 2
    first, second = right[1] - left[1] - left[2], right[2] - left[2]
    cubic, quartic, quintic = (
        10 * rest - 4 * first + second / 2,
        -15 * rest + 7 * first - second,
        6 * rest - 3 * first + second / 2,
    )
    value = left[0] + s * (left[1] + s * (left[2] / 2 + s * (cubic + s * (quartic + s * quintic))))
    slope = left[1] + s * (left[2] + s * (3 * cubic + s * (4 * quartic + s * 5 * quintic)))
    return value, slope


def _cardinal(count: int) -> tuple[np.ndarray, np.ndarray]:
    """[S, S] each: the integral up to a node, and the slope there, of sinc functions at all nodes, a step apart."""
    x, w = np.polynomial.legendre.leggauss(20)
    halves = np.array([(w / 2 * np.sinc(number + (x + 1) / 2)).sum() for number in range(count - 1)])
    si = np.concatenate([[0.0], halves.cumsum()])
    apart = np.subtract.outer(np.arange(count), np.arange(count))
    below = 0.5 + np.sign(apart) * si[abs(apart)]
    with np.errstate(divide="ignore"):
        slope = np.where(apart == 0, 0.0, (-1.0) ** apart / apart)
    return below, slope
