"""Integrals over the numbers of each row: exact where the density is Gaussian, near quadrature where it is not."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from svi_problems import F64

from trainer.inference.rows.integral import Fineness, around_the_mode, derivatives, log_integral, nodes_of

ROWS, STEPS = 7, 12
ONE = torch.ones((), dtype=F64)
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
    found = log_integral(f, around_the_mode(f, start(size), STEPS), nodes_of(Fineness(size, nodes), start(size)))
    want = 0.5 * size * math.log(2 * math.pi) - 0.5 * torch.logdet(precision)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_mode_and_the_factor_are_the_rows_own(size):
    precision, mean = gaussian(size)
    normal = around_the_mode(log_gaussian(precision, mean), start(size), STEPS)
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
    return log_integral(f, around_the_mode(still, start(1), STEPS), nodes_of(Fineness(1, size), start(1)))


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
    normal = around_the_mode(f, start(2), STEPS)
    assert bool((normal.factor.diagonal(dim1=1, dim2=2) > 0).all())


@pytest.mark.parametrize("size", [1, 2])
def test_nodes_are_those_of_a_standard_normal(size):
    at, log_weights = nodes_of(Fineness(size, 5), start(size))
    weights = log_weights.exp()
    assert len(at) == 5**size
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(weights @ at, torch.zeros(size, dtype=F64), rtol=0, atol=1e-12)
    torch.testing.assert_close((at.T * weights) @ at, torch.eye(size, dtype=F64), rtol=0, atol=1e-12)


def test_even_points_have_their_mirror_images():
    at, log_weights = nodes_of(Fineness(3, 8), start(3))
    assert at.shape == (16, 3)
    assert torch.equal(at[:8], -at[8:])
    assert float(log_weights.exp().sum()) == pytest.approx(1, abs=1e-12)


FAR = {
    "counts of a million": (
        lambda u: dist.Normal(0.0, 10.0).log_prob(u) + dist.Poisson(u.exp(), validate_args=False).log_prob(ONE * 1e6),
        math.log(1e6),
    ),
    "a prior far from 0": (
        lambda u: dist.Normal(500.0, 10.0).log_prob(u) + dist.Bernoulli(logits=u - 500.0).log_prob(ONE),
        503.4,
    ),
    "wide units": (
        lambda u: dist.Normal(0.0, 1e4).log_prob(u) + dist.Normal((u / 1e3).sinh(), 1.0).log_prob(ONE * 30.0),
        1e3 * math.asinh(30.0),
    ),
    "narrow units": (
        lambda u: dist.Normal(0.0, 1e-4).log_prob(u) + dist.Poisson((1e4 * u).exp()).log_prob(ONE * 9.0),
        None,
    ),
    "steps that go too far": (lambda u: -(1 + (u - 4.0) ** 2).sqrt(), 4.0),
}


@pytest.mark.parametrize("name", FAR)
def test_a_mode_is_found_in_any_unit(name):
    """Where a parabola through the start leads elsewhere, too."""
    of_number, at = FAR[name]
    f = lambda u: of_number(u[:, 0])  # noqa: E731
    mode = around_the_mode(f, start(1), 24).mode.requires_grad_()
    (slope,) = torch.autograd.grad(f(mode).sum(), mode, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), mode)
    left = (slope.abs() / curvature.abs().sqrt()).detach()
    assert float(left.max()) < 1e-4  # sds that are left: f of 1e7 is known to 1e-9
    if at is not None:
        assert float(mode.detach().mean()) == pytest.approx(at, rel=0.01)


def test_no_step_falls():
    f = lambda u: -(1 + (u[:, 0] - 4.0) ** 2).sqrt()  # noqa: E731
    values = [float(f(around_the_mode(f, start(1), steps).mode)[0]) for steps in range(8)]
    assert values == sorted(values)


def test_more_points_are_a_quarter_more_along_an_axis():
    fineness, seen = Fineness(1, 9), []
    while fineness.is_possible and len(seen) < 4:
        seen.append(fineness.points)
        fineness = fineness.with_more_points()
    assert seen == [9, 13, 17, 23]
    assert Fineness(2, 5).with_more_points().copies == 49
    assert Fineness(4, 8).with_more_points().copies == 32


def test_the_curvature_is_minus_the_hessian():
    matrix = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)
    found = derivatives(lambda u: -0.5 * (u @ matrix * u).sum(1), torch.ones(3, 2, dtype=F64)).curvature
    torch.testing.assert_close(found, matrix.expand(3, 2, 2))
    assert not derivatives(lambda u: u.sum(1), torch.ones(3, 2, dtype=F64)).curvature.any()
