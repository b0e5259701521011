"""Which densities are known to be Gaussian in a row's numbers, and that nothing else is taken for one."""

import math

import pyro.distributions as dist
import pytest
import torch
from svi_problems import F64

from trainer.inference.rows.integral import log_gaussian_integral
from trainer.inference.rows.quadratic import is_quadratic

GENERATOR = torch.Generator().manual_seed(2)
Y = torch.randn(6, 3, dtype=F64, generator=GENERATOR)
W = torch.randn(3, 2, dtype=F64, generator=GENERATOR)
KNOWN = torch.tensor([True, False, True, True, False, True])
START = torch.zeros(6, 2, dtype=F64)


def normal(u):
    return dist.Normal(u @ W.T, 0.7).log_prob(Y).sum(1) - 0.5 * (u**2).sum(1)


QUADRATIC = {
    "a normal response": normal,
    "a masked one": lambda u: torch.where(KNOWN, dist.Normal(u[:, 0], 1.0).log_prob(Y[:, 0]), 0.0) - u.square().sum(1),
    "correlated numbers": lambda u: dist.MultivariateNormal(W[0], torch.eye(2, dtype=F64)).log_prob(u),
    "a slope by a looked up level": lambda u: dist.Normal(W[:, 0][KNOWN.long()] * u[:, 1], 2.0).log_prob(Y[:, 0]),
    "parts written into a tensor of their own": lambda u: -(torch.cat([u[:, :1] / 2, u[:, 1:] * 2], 1) ** 2).sum(1),
}
OTHER = {
    "a Bernoulli": lambda u: dist.Bernoulli(logits=u[:, 0]).log_prob(KNOWN.double()) - u.square().sum(1),
    "a Poisson": lambda u: dist.Poisson(u[:, 0].exp()).log_prob(KNOWN.double()) - u.square().sum(1),
    "a Student's t": lambda u: dist.StudentT(4.0, u[:, 0]).log_prob(Y[:, 0]) - u.square().sum(1),
    "a scale": lambda u: dist.Normal(0.0, u[:, 0].exp()).log_prob(Y[:, 0]) - u.square().sum(1),
    "a product squared": lambda u: -((u[:, 0] * u[:, 1]) ** 2) - u.square().sum(1),
    "a kink": lambda u: -(torch.relu(u[:, 0]) ** 2) - u.square().sum(1),
    "a choice by u": lambda u: torch.where(u[:, 0] > 5, -u[:, 0], 0.0) - u.square().sum(1),
    "a wide cubic, which no row shows": lambda u: 1e-12 * u[:, 0] ** 3 - u.square().sum(1),
    "what is written in place": lambda u: -(_written(u).square().sum(1) ** 2),
    "what Python decides": lambda u: -u.square().sum(1) if u.sum() > -1 else -(u**4).sum(1),
}


def _written(u):
    made = torch.zeros_like(u)
    made[:, 0] = u[:, 0]
    return made


@pytest.mark.parametrize("name", QUADRATIC)
def test_it_is_known_and_integrated_exactly(name):
    f = QUADRATIC[name]
    assert is_quadratic(f, START)
    if name == "a slope by a looked up level":
        return  # whose first number has no density
    found = log_gaussian_integral(f, f, START)
    grid = torch.linspace(-9, 9, 91, dtype=F64)  # the trapezoid rule, whose error is that of rounding here
    each = torch.vmap(lambda u: f(u.expand(6, 2)))(torch.cartesian_prod(grid, grid))
    want = torch.logsumexp(each, 0) + 2 * math.log(float(grid[1] - grid[0]))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", OTHER)
def test_what_is_not_known_to_be_is_not_taken_for_it(name):
    assert not is_quadratic(OTHER[name], START)


def test_derivatives_of_both_orders_are_those_of_the_closed_form():
    """Factor analysis: a row is a multivariate normal."""
    at = torch.cat([W.flatten(), torch.tensor([0.7], dtype=F64)])

    def density(at, u):
        w, sd = at[:6].view(3, 2), at[6]
        return dist.Normal(u @ w.T, sd).log_prob(Y).sum(1) + dist.Normal(0.0, 1.0).log_prob(u).sum(1)

    def ours(at):
        return log_gaussian_integral(lambda u: density(at.detach(), u), lambda u: density(at, u), START).sum()

    def exact(at):
        w, sd = at[:6].view(3, 2), at[6]
        covariance = w @ w.T + sd**2 * torch.eye(3, dtype=F64)
        return dist.MultivariateNormal(torch.zeros(3, dtype=F64), covariance).log_prob(Y).sum()

    torch.testing.assert_close(ours(at), exact(at), rtol=0, atol=1e-10)
    for order in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):
        torch.testing.assert_close(order(ours, at), order(exact, at), rtol=1e-9, atol=1e-9)


def test_nothing_cancels_far_from_the_start():
    """Rows at 10^4 with a noise of 0.1, in float32: the density at the start is -5 * 10^9 nats."""
    y = torch.tensor([1e4, -3e3, 20.0])

    def density(u):
        return dist.Normal(u[:, 0], 0.1).log_prob(y) + dist.Normal(0.0, 1e4).log_prob(u[:, 0])

    found = log_gaussian_integral(density, density, torch.zeros(3, 1))
    want = dist.Normal(0.0, math.sqrt(1e8 + 0.01)).log_prob(y.double())
    torch.testing.assert_close(found.double(), want, rtol=0, atol=1e-4)


def test_no_density_of_a_number_is_not_a_number():
    """An improper one, as the checks of the start say."""
    found = log_gaussian_integral(QUADRATIC["a slope by a looked up level"], QUADRATIC["a masked one"], START)
    assert not found.isfinite().any()
