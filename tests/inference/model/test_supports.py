"""Supports: what lies in them, a point of each for values that do not count."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from svi_problems import F64, build, grad, noise_of, one_group
from torch.distributions import constraints

from trainer.inference.model.supports import harmless, holds, in_words, is_interval, supported

THREE = torch.ones(3, dtype=F64)
SECOND = torch.tensor([True, False, True])


@pytest.mark.parametrize(
    ("fn", "value"),
    [
        (dist.Bernoulli(logits=THREE), [1.0, 9.0, 0.0]),
        (dist.Poisson(THREE), [1.0, 2.5, 0.0]),
        (dist.Binomial(torch.tensor([2.0, 5.0, 3.0], dtype=F64), THREE / 2), [2.0, 6.0, 3.0]),
        (dist.Gamma(THREE, THREE), [1.0, -3.0, 2.0]),
        (dist.Beta(THREE, THREE), [0.2, 1.2, 0.3]),
        (dist.Normal(THREE, 1.0), [0.0, math.nan, 1.0]),
        (dist.Uniform(THREE, 3 * THREE), [2.0, 9.0, 1.5]),
        (dist.LogNormal(THREE, 1.0), [1.0, -1.0, 2.0]),
        (dist.Categorical(torch.ones(3, 4)), [3, -1, 2]),
        (dist.Dirichlet(torch.ones(3, 2, dtype=F64)), [[0.4, 0.6], [0.4, 0.4], [1.0, 0.0]]),
        (dist.Normal(torch.ones(3, 2), 1.0).to_event(1), [[0.0, 1.0], [0.0, math.nan], [1.0, 1.0]]),
    ],
)
def test_what_does_not_count_is_brought_inside(fn, value):
    """Only where it lies outside: everything else stays as it is, and what counts does so too."""
    value = torch.tensor(value, dtype=F64) if isinstance(value[0], float | list) else torch.tensor(value)
    made = harmless(fn, value, SECOND)
    assert supported(fn, made).all()
    assert torch.equal(made[::2], value[::2])
    assert made.dtype == value.dtype
    torch.testing.assert_close(harmless(fn, value, torch.ones(3, dtype=torch.bool)), value, equal_nan=True)
    assert torch.equal(harmless(fn, made, SECOND), made)


def test_whole_numbers_of_a_multinomial_and_shares_in_float32():
    assert holds(constraints.multinomial(4), torch.tensor([[1.0, 3.0], [1.5, 2.5], [2.0, 3.0]])).tolist() == [1, 0, 0]
    nearly = torch.tensor([[0.4, 0.6 - 2e-6], [0.4, 0.5]])
    assert holds(constraints.simplex, nearly).tolist() == [True, False]


@pytest.mark.parametrize(
    ("constraint", "words", "interval"),
    [
        (constraints.boolean, "0 or 1", True),
        (constraints.nonnegative, "from 0", True),
        (constraints.positive, "above 0", True),
        (constraints.nonnegative_integer, "whole numbers from 0", True),
        (constraints.integer_interval(0, 4), "whole numbers from 0 to 4", True),
        (constraints.interval(0, torch.tensor([1.0, 2.0])), "from 0 to the row's own bound", False),
        (constraints.less_than(3.0), "up to 3", True),
        (constraints.real, "numbers", True),
        (constraints.simplex, "shares whose sum is 1", False),
        (constraints.one_hot, "a 1 among zeros", False),
        (constraints.multinomial(10), "whole numbers whose sum is 10", False),
        (constraints.independent(constraints.boolean, 1), "0 or 1", False),
    ],
)
def test_a_support_in_words(constraint, words, interval):
    assert in_words(constraint) == words
    assert is_interval(constraint) is interval


@pytest.mark.parametrize("how", ["weight", "mask"])
@pytest.mark.parametrize("wrong", [1.2, math.nan])
def test_the_gradient_is_that_without_the_rows_that_do_not_count(how, wrong):
    """Of the logarithm of 1 - 1.2 it would be no number, though it is masked."""

    def model(y, counts=None, weight=None):
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        with pyro.plate("data", len(y)), poutine.mask(mask=True if counts is None else counts):
            alpha = pyro.deterministic("alpha", a.exp().expand(len(y)))
            pyro.sample("y", dist.Beta(alpha, 2.0 + a**2), obs=y)

    def weighted(y):
        model(y)

    y, some = torch.tensor([0.3, wrong, 0.6, wrong], dtype=F64), torch.tensor([True, False, True, False])
    noise = noise_of(torch.tensor([[[0.4]]], dtype=F64))
    right, theta = build(weighted, num_obs=2, y=y[some])
    expected = grad(right, theta, noise, one_group(y=y[some]))
    fn, name, counts = (weighted, "weight", some.to(F64)) if how == "weight" else (model, "counts", some)
    inference, theta = build(fn, num_obs=4, **{"y": y, name: counts})
    torch.testing.assert_close(grad(inference, theta, noise, one_group(**{"y": y, name: counts})), expected)
