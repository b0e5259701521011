"""Exact optima of the mean-field ELBO over all rows, in float64: what the race to the posterior is judged by.

Shapes: N rows, D latents in the order of the sites, G groups, S effects of a group.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.models.hierarchical import VaryingSlopes

_POINTS = 7
_PIECE = 1 << 16


class Optimum(NamedTuple):
    mean: np.ndarray
    """[D], of the unconstrained latents."""
    sd: np.ndarray
    top: np.ndarray
    """bool [D]: latents that no group has for itself."""


def of_logistic(columns: dict[str, np.ndarray], prior_sd: np.ndarray) -> Optimum:
    """Weights first and the intercept last, by Newton steps on the stationary equations.

        x' (y - E sigmoid(u)) - m / tau^2 = 0,     1 / s_d^2 = 1 / tau_d^2 + sum of x_d^2 E sigmoid'(u),

    u ~ Normal(x m, x^2 s^2) under the guide, E by Gauss-Hermite quadrature (Opper and Archambeau, "The variational
    Gaussian approximation revisited", Neural Computation 21 (2009)); x [N, D] has a last column of ones.
    """
    x, y, precision = torch.from_numpy(columns["x"]), torch.from_numpy(columns["y"]), torch.from_numpy(prior_sd**-2.0)
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(_POINTS))
    weights = weights / weights.sum()
    mean, variance = torch.zeros_like(precision), torch.full_like(precision, 1.0 / len(x))
    for _ in range(50):
        gradient, hessian = -precision * mean, torch.diag(precision)
        for part, target in zip(x.split(_PIECE), y.split(_PIECE)):
            rows = torch.cat([part, torch.ones(len(part), 1)], dim=1).double()
            u = (rows @ mean)[:, None] + (rows**2 @ variance).sqrt()[:, None] * nodes
            p = u.sigmoid()
            gradient = gradient + rows.T @ (target.double() - p @ weights)
            hessian = hessian + rows.T @ (rows * ((p * (1 - p)) @ weights)[:, None])
        move = torch.linalg.solve(hessian, gradient)
        before, mean, variance = variance, mean + move, 1 / hessian.diag()
        if max((move**2 / variance).max() ** 0.5, (variance / before - 1).abs().max()) < 1e-8:
            return Optimum(mean.numpy(), variance.sqrt().numpy(), np.ones(len(mean), dtype=bool))
    raise RuntimeError("Newton's method found no optimum")


def of_hierarchical(columns: dict[str, np.ndarray], zoo: VaryingSlopes) -> Optimum:
    """mean, log scale, log sigma and the deviations of the groups.

    Given the guide of the first three, that of a group's deviations is a linear system of S equations; what is left is
    a smooth function of 2 (2 S + 1) numbers, maximized by L-BFGS and Newton steps.
    """
    statistics = _Statistics(columns, zoo)
    size = 2 * statistics.effects + 1
    at = torch.cat([torch.zeros(size), torch.full((size,), -5.0)]).double().requires_grad_()

    def loss() -> Tensor:
        return -statistics.elbo(at) / statistics.rows

    search = torch.optim.LBFGS([at], max_iter=300, line_search_fn="strong_wolfe", tolerance_change=0.0)

    def closure() -> Tensor:
        search.zero_grad()
        value = loss()
        value.backward()
        return value

    search.step(closure)
    for _ in range(20):
        (gradient,) = torch.autograd.grad(loss(), at, create_graph=True)
        hessian = torch.stack([torch.autograd.grad(each, at, retain_graph=True)[0] for each in gradient])
        move = torch.linalg.solve(hessian, gradient.detach())
        with torch.no_grad():
            at -= move
        if float((move[:size] / at[size:].detach().exp()).abs().max()) < 1e-8:
            deviation, variance = (each.detach().flatten() for each in statistics.deviations(at))
            loc, log_sd = at.detach().split([size, size])
            top = np.arange(size + len(deviation)) < size
            return Optimum(torch.cat([loc, deviation]).numpy(), torch.cat([log_sd.exp(), variance.sqrt()]).numpy(), top)
    raise RuntimeError("Newton's method found no optimum")


class _Statistics:
    """What the rows say: by group the sums z z' [G, S, S] and z y [G, S] for z = (1, x), and the sum of y^2."""

    def __init__(self, columns: dict[str, np.ndarray], zoo: VaryingSlopes):
        x, y = torch.from_numpy(columns["x"]).double(), torch.from_numpy(columns["y"]).double()
        z, group, groups = (
            torch.cat([torch.ones(len(x), 1), x], dim=1).double(),
            torch.from_numpy(columns["group"]),
            zoo.groups or 0,
        )
        self.zoo, self.rows, self.effects = zoo, len(x), z.shape[1]
        self.square = (y**2).sum()
        self.zy = torch.zeros(groups, self.effects).double().index_add_(0, group, z * y[:, None])
        self.zz = (
            torch.zeros(groups, self.effects, self.effects).double().index_add_(0, group, z[:, :, None] * z[:, None])
        )
        self.diagonal = self.zz.diagonal(dim1=1, dim2=2)

    def deviations(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances [G, S] of the deviations, the best for the guide ``at`` of the others."""
        (mean, _), (first, second), (_, _, precision) = self._moments(at)
        system = first[:, None] * self.zz * first + torch.diag_embed((second - first**2) * self.diagonal)
        system = torch.eye(self.effects).double() + precision * system
        right = precision * first * (self.zy - (self.zz @ mean[:, None])[..., 0])
        return torch.linalg.solve(system, right), 1 / (1 + precision * second * self.diagonal)

    def elbo(self, at: Tensor) -> Tensor:
        """Nats, but for a constant, with the best deviations."""
        (mean, mean_sd), (first, second), (log_sigma, sigma_square, precision) = self._moments(at)
        deviation, variance = self.deviations(at)
        effect = mean + first * deviation
        spread = mean_sd**2 + second * (deviation**2 + variance) - (first * deviation) ** 2
        errors = (
            self.square - 2 * (self.zy * effect).sum() + torch.einsum("gs,gst,gt->", effect, self.zz, effect)
            + (self.diagonal * spread).sum()
        )  # fmt: skip
        size, zoo = self.effects, self.zoo
        likelihood = -self.rows * log_sigma - 0.5 * precision * errors
        prior = (
            -0.5 * ((mean**2 + mean_sd**2) / zoo.mean_sd**2 + second / zoo.scale_sd**2).sum()
            - 0.5 * sigma_square / zoo.noise_prior_sd**2 - 0.5 * (deviation**2 + variance).sum()
        )  # fmt: skip
        jacobian = at[size : 2 * size].sum() + log_sigma
        entropy = at[2 * size + 1 :].sum() + 0.5 * variance.log().sum()
        return likelihood + prior + jacobian + entropy

    def _moments(self, at: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Of the mean E and sd; of the scale E and E of its square; of sigma E log, E of its square and of 1 / it."""
        size = self.effects
        loc, variance = at[: 2 * size + 1], at[2 * size + 1 :].exp() ** 2
        log_scale, of_scale = loc[size : 2 * size], variance[size : 2 * size]
        log_sigma, of_sigma = loc[-1], variance[-1]
        scale = (log_scale + of_scale / 2).exp(), (2 * log_scale + 2 * of_scale).exp()
        sigma = log_sigma, (2 * log_sigma + 2 * of_sigma).exp(), (2 * of_sigma - 2 * log_sigma).exp()
        return (loc[:size], variance[:size].sqrt()), scale, sigma
