"""Whether a model calculates with an integer column, for models of each kind."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from svi_problems import F64, batch_of, build

from trainer.inference.checks.uses import calculates_with

N = 6
K = torch.arange(N) % 3
Y = torch.linspace(-1, 1, N, dtype=F64)


def latent(*shape):
    return pyro.sample("w", dist.Normal(torch.zeros(shape, dtype=F64), 1.0).to_event(len(shape)))


def slope(k, y):
    w = latent()
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(w * k, 1.0), obs=y)


def look_up(k, y):
    w = latent(3)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(w[k], 1.0), obs=y)


def both(k, y):
    w = latent(3)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(w[k] * k, 1.0), obs=y)


def count(k, y):
    w = latent()
    with pyro.plate("data", len(y)):
        pyro.sample("k", dist.Poisson((w * y).exp()), obs=k)


def label(k, y):
    w = latent(3)
    with pyro.plate("data", len(y)):
        pyro.sample("k", dist.Categorical(logits=w * y[:, None]), obs=k)


def masked_label(k, y):
    w = latent(3)
    with pyro.plate("data", len(y)):
        pyro.sample("k", dist.Categorical(logits=w * y[:, None]).mask(y > 0), obs=k)


def unused(k, y):
    w = latent()
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (slope, True),
        (look_up, False),
        (both, False),
        (count, True),
        (label, False),
        (masked_label, False),
        (unused, True),
    ],
)
def test_a_slope_takes_floats_and_a_look_up_and_a_label_do_not(model, expected):
    inference, theta = build(model, k=K, y=Y)
    batch = batch_of(k=K, y=Y)
    assert calculates_with(inference, theta, batch, "k") == expected
    assert batch.columns["k"].dtype == torch.int64
