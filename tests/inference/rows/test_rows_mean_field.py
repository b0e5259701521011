"""The bound of a factorized Gaussian in each row, against closed forms; derivatives against differences of them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from svi_problems import F64, batch_of, noise_of, one_group

from trainer.inference.guides.mean_field import MeanField
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.rows.integral import Fineness, around_the_mode
from trainer.inference.rows.mean_field import log_bound, nodes_of_mean
from trainer.inference.rows.options import RowOptions
from trainer.inference.setup import set_up

LOG_2PI = math.log(2 * math.pi)
COUNTS = torch.tensor([0.0, 1.0, 3.0, 7.0, 20.0], dtype=F64)
GENERATOR = torch.Generator().manual_seed(0)
AT = torch.tensor([0.3, -0.2], dtype=F64)


def poisson(at):
    """log p(count, u) of an intercept and the log sd of u."""
    level, log_sd = at

    def f(u):
        rate = level + u[:, 0]
        return COUNTS * rate - rate.exp() - 0.5 * (u[:, 0] / log_sd.exp()) ** 2 - log_sd - 0.5 * LOG_2PI

    return f


def of_rows(still, f, start, fineness):
    return log_bound(still, f, around_the_mode(still, start, 12), nodes_of_mean(fineness, start))


def bound(at, nodes=20):
    start = torch.zeros(len(COUNTS), 1, dtype=F64)
    return of_rows(poisson(at.detach()), poisson(at), start, Fineness(1, nodes))


def by_hand(at):
    """With E exp(u) = exp(m + s^2 / 2), by Newton's method on (m, log s)."""
    level, log_sd = at

    def f(v):
        m, log_s = v.view(2, -1)
        square = (2 * log_s).exp()
        of_y = COUNTS * (level + m) - (level + m + 0.5 * square).exp()
        of_u = -0.5 * (m**2 + square) / (2 * log_sd).exp() - log_sd - 0.5 * LOG_2PI
        return of_y + of_u + log_s + 0.5 * (1 + LOG_2PI)

    v = torch.cat([torch.zeros(len(COUNTS)), torch.full((len(COUNTS),), -1.0)]).double()
    for _ in range(60):
        gradient = torch.autograd.functional.jacobian(lambda v: f(v).sum(), v)
        hessian = torch.autograd.functional.hessian(lambda v: f(v).sum(), v)
        v = v - torch.linalg.solve(hessian, gradient).clamp(-1, 1)
    return f(v)


@pytest.mark.parametrize(("nodes", "atol"), [(20, 1e-12), (9, 1e-10)])
def test_one_number_is_the_bound_by_hand(nodes, atol):
    torch.testing.assert_close(bound(AT, nodes), by_hand(AT), rtol=0, atol=atol)


def test_its_derivatives_are_those_of_the_largest_bound():
    """The second too: what q moves by when the globals do is in them."""
    step = 1e-4 * torch.eye(2, dtype=F64)
    first = torch.autograd.functional.jacobian(lambda at: bound(at).sum(), AT)
    second = torch.autograd.functional.hessian(lambda at: bound(at).sum(), AT)
    by_differences = torch.stack([(by_hand(AT + e) - by_hand(AT - e)).sum() / 2e-4 for e in step])
    torch.testing.assert_close(first, by_differences, rtol=0, atol=1e-6)
    of_slopes = torch.stack([(slope(AT + e) - slope(AT - e)) / 2e-4 for e in step])
    torch.testing.assert_close(second, of_slopes, rtol=0, atol=1e-6)


def slope(at):
    return torch.autograd.functional.jacobian(lambda at: bound(at).sum(), at)


@pytest.mark.parametrize(("size", "draws"), [(1, 8), (2, 8), (3, 8), (3, 1), (5, 2)])
def test_gaussian_rows_have_the_bound_in_closed_form(size, draws):
    """log p(y) - KL: half the log determinant of the precision, less the logs of its diagonal."""
    root = torch.randn(4, size, size, dtype=F64, generator=GENERATOR)
    precision = root @ root.mT + torch.eye(size, dtype=F64)
    linear = torch.randn(4, size, dtype=F64, generator=GENERATOR)

    def f(u):
        return (linear * u).sum(1) - 0.5 * torch.einsum("bi,bij,bj->b", u, precision, u)

    found = of_rows(f, f, torch.zeros(4, size, dtype=F64), Fineness(size, 3 if size <= 2 else draws))
    largest = 0.5 * torch.einsum("bi,bij,bj->b", linear, torch.linalg.inv(precision), linear)
    want = largest + 0.5 * size * LOG_2PI - 0.5 * precision.diagonal(dim1=1, dim2=2).log().sum(1)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-10)
    with torch.no_grad():
        again = of_rows(f, f, torch.zeros(4, size, dtype=F64), Fineness(size, 3 if size <= 2 else draws))
    torch.testing.assert_close(again, want, rtol=0, atol=1e-10)


def slopes(x, y):
    """Two numbers of a row that what is observed makes dependent."""
    b = pyro.sample("b", dist.Normal(torch.zeros((), dtype=F64), 1.0))
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(b + u[:, 0] + u[:, 1] * x, 0.5), obs=y)


def test_a_model_is_trained_by_it():
    """The likelihood at a draw of b, in closed form, and its gradient."""
    x = torch.randn(6, dtype=F64, generator=GENERATOR)
    y = torch.randn(6, dtype=F64, generator=GENERATOR)
    batch, asked = batch_of(x=x, y=y), RowOptions("mean_field")
    inference, theta = set_up(slopes, MeanField, batch, 6, ELBO("monte_carlo", antithetic=False), rows=asked)
    assert inference.model.sites.sentence() == "u in a factorized Gaussian of each row (2 numbers)"
    noise = noise_of(torch.full((1, 1, 1), 0.3, dtype=F64))

    def likelihood(theta):
        return inference.terms(theta, noise, one_group(x=x, y=y), 1.0)[inference.sites.index("y")]

    def in_closed_form(theta):
        b = theta[0] + 0.3 * theta[1].exp()
        diagonal = torch.stack([1 + 0 * x + 4, 1 + 4 * x**2], -1)
        variance = 0.25 + 1 + x**2
        evidence = dist.Normal(b, variance.sqrt()).log_prob(y)
        determinant = (1 + 4) * (1 + 4 * x**2) - (4 * x) ** 2
        return (evidence + 0.5 * determinant.log() - 0.5 * diagonal.log().sum(1)).sum()

    torch.testing.assert_close(likelihood(theta), in_closed_form(theta), rtol=0, atol=1e-10)
    found, want = (torch.autograd.functional.jacobian(each, theta) for each in (likelihood, in_closed_form))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-10)
