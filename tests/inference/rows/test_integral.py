"""Integrals over the numbers of each row: exact where the density is Gaussian, near quadrature where it is not."""

import math

import numpy as np
import pytest
import torch
from svi_problems import F64

from trainer.inference.rows.integral import around_the_mode, log_integral, nodes_of

ROWS = 7
GENERATOR = torch.Generator().manual_seed(0)
HERMITE = [torch.tensor(each) for each in np.polynomial.hermite_e.hermegauss(90)]


def start(size: int) -> torch.Tensor:
    return torch.zeros(ROWS, size, dtype=F64)


def gaussian(size: int):
    """Each row's precision [B, d, d] and mean [B, d]."""
    root = torch.randn(ROWS, size, size, dtype=F64, generator=GENERATOR)
    return root @ root.mT + torch.eye(size), 3 * torch.randn(ROWS, size, dtype=F64, generator=GENERATOR)


def log_gaussian(precision, mean):
    return lambda u: -0.5 * torch.einsum("bi,bij,bj->b", u - mean, precision, u - mean)


@pytest.mark.parametrize(("size", "nodes"), [(1, 1), (1, 9), (2, 2), (2, 9), (3, 1), (5, 1), (5, 8)])
def test_a_gaussian_is_integrated_exactly_by_any_nodes(size, nodes):
    precision, mean = gaussian(size)
    f = log_gaussian(precision, mean)
    found = log_integral(f, around_the_mode(f, start(size)), nodes_of(size, nodes, nodes, start(size)))
    want = 0.5 * size * math.log(2 * math.pi) - 0.5 * torch.logdet(precision)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_mode_and_the_factor_are_the_rows_own(size):
    precision, mean = gaussian(size)
    normal = around_the_mode(log_gaussian(precision, mean), start(size))
    torch.testing.assert_close(normal.mode, mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(normal.factor @ normal.factor.mT, precision, rtol=0, atol=1e-9)
    point = torch.randn(size, dtype=F64, generator=GENERATOR)
    back = torch.einsum("bji,bj->bi", normal.factor, normal.at(point) - normal.mode)
    torch.testing.assert_close(back, point.expand(ROWS, size), rtol=0, atol=1e-9)


COUNTS = torch.tensor([0.0, 1.0, 2.0, 5.0, 20.0, 100.0, 3000.0], dtype=F64)


def poisson_lognormal(rate, spread, size=9):
    """log p(count) with u ~ Normal(0, spread), count ~ Poisson(rate exp u); by ``size`` nodes of ours."""
    count = torch.distributions.Poisson

    def f(u):
        prior = torch.distributions.Normal(0.0, spread).log_prob(u[:, 0])
        return prior + count((rate.log() + u[:, 0]).exp()).log_prob(COUNTS)

    still = lambda u: (  # noqa: E731
        torch.distributions.Normal(0.0, spread.detach()).log_prob(u[:, 0])
        + count((rate.detach().log() + u[:, 0]).exp()).log_prob(COUNTS)
    )
    return log_integral(f, around_the_mode(still, start(1)), nodes_of(1, size, 0, start(1)))


def by_hand(rate, spread):
    """The same by 4,000 equal steps over 12 sds on each side of its mode."""
    u = torch.linspace(-14.0, 14.0, 40_001, dtype=F64)[:, None]
    prior = torch.distributions.Normal(0.0, spread).log_prob(u)
    values = prior + torch.distributions.Poisson((rate.log() + u).exp()).log_prob(COUNTS)
    return torch.logsumexp(values, 0) + math.log(28.0 / 40_000)


def test_nine_nodes_are_enough_for_counts():
    rate, spread = torch.tensor(1.5, dtype=F64), torch.tensor(0.7, dtype=F64)
    torch.testing.assert_close(poisson_lognormal(rate, spread), by_hand(rate, spread), rtol=0, atol=1e-4)
    torch.testing.assert_close(poisson_lognormal(rate, spread, 25), by_hand(rate, spread), rtol=0, atol=1e-8)


def test_derivatives_go_through_the_density_at_fixed_nodes():
    """First and second ones by what the density holds."""
    at = torch.tensor([1.5, 0.7], dtype=F64)
    ours = torch.autograd.functional.hessian(lambda z: poisson_lognormal(z[0], z[1], 25).sum(), at)
    want = torch.autograd.functional.hessian(lambda z: by_hand(z[0], z[1]).sum(), at)
    torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-6)


def test_a_saddle_gets_a_small_curvature():
    f = lambda u: 0.5 * u[:, 0] ** 2 - 0.5 * u[:, 1] ** 2  # noqa: E731
    normal = around_the_mode(f, start(2))
    assert bool((normal.factor.diagonal(dim1=1, dim2=2) > 0).all())


@pytest.mark.parametrize("size", [1, 2])
def test_nodes_are_those_of_a_standard_normal(size):
    at, log_weights = nodes_of(size, 5, 0, start(size))
    weights = log_weights.exp()
    assert len(at) == 5**size
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(weights @ at, torch.zeros(size, dtype=F64), rtol=0, atol=1e-12)
    torch.testing.assert_close((at.T * weights) @ at, torch.eye(size, dtype=F64), rtol=0, atol=1e-12)


def test_even_points_have_their_mirror_images():
    at, log_weights = nodes_of(3, 0, 8, start(3))
    assert at.shape == (16, 3)
    assert torch.equal(at[:8], -at[8:])
    assert float(log_weights.exp().sum()) == pytest.approx(1, abs=1e-12)
