"""What is called an exact function is one: at any scale of the column, under any prior, whatever the number of rows."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from svi_problems import F64, build, one_group

from trainer.errors import UserError
from trainer.inference.recipe.laplace import laplace_start

GENERATOR = torch.Generator().manual_seed(0)
X, NOISE = torch.randn(2, 300, generator=GENERATOR, dtype=F64)
HALVES = (2 * X).round() / 2  # float32 holds them


def line(sigma, unit=1.0):
    def model(x, y):
        wide = x.new_tensor(10.0 * unit)
        a, b = (pyro.sample(name, dist.Normal(0.0 * wide, wide)) for name in "ab")
        s = pyro.sample("sigma", sigma(x.new_tensor(1.0)))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(a + b * x, s), obs=y)

    return model


def half_normal(one):
    return dist.HalfNormal(one)


def log_normal(one):
    return dist.LogNormal(0.0 * one, one)


def start(model, x, y):
    inference, theta = build(model, x=x, y=y)
    return laplace_start(inference, theta, one_group(x=x, y=y), lambda sentence: None)


FITTED = {
    "1e15 under a narrow prior": (line(half_normal, 1e15), X, 1e15 * (X + NOISE)),
    "1e15 under narrow priors": (line(half_normal), X, 1e15 * (X + NOISE)),
    "1e15, little noise": (line(half_normal, 1e15), X, 1e15 * (X + 1e-3 * NOISE)),
    "1e-15": (line(half_normal), X, 1e-15 * (X + NOISE)),
    "noise of 1e-8 beside a column of halves": (line(half_normal), HALVES, HALVES + 1e-8 * NOISE),
    "one row": (line(half_normal), X[:1], NOISE[:1]),
    "two rows": (line(half_normal), X[:2], NOISE[:2]),
    "two rows of 1e15": (line(half_normal, 1e15), X[:2], 1e15 * NOISE[:2]),
    "two rows, another prior": (line(log_normal), X[:2], NOISE[:2]),
    "three rows": (line(half_normal), X[:3], NOISE[:3]),
}


@pytest.mark.parametrize("name", FITTED)
def test_what_is_not_met_exactly_is_fitted(name):
    start(*FITTED[name])


X32 = X.float()
EXACT = {
    "float64": (line(half_normal), X, 1.0 + 2.0 * X),
    "of 1e15": (line(half_normal, 1e15), X, 1e15 * (1.0 + 2.0 * X)),
    "float32": (line(half_normal), X32, 1.0 + 2.0 * X32),
    "float32, held as float64": (line(half_normal), X32.double(), (1.0 + 2.0 * X32).double()),
    "halves": (line(half_normal), HALVES, 1.0 + 2.0 * HALVES),
    "three rows": (line(half_normal), X[:3], 1.0 + 2.0 * X[:3]),
    "two rows repeated": (line(half_normal), X[:2].repeat(150), NOISE[:2].repeat(150)),
    "constant": (line(half_normal), X, torch.full_like(X, 3.3)),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_is_met_exactly_is_refused(name):
    with pytest.raises(UserError, match=r'"y" is (constant|an exact function).*"sigma" goes to its limit'):
        start(*EXACT[name])
