"""Whole fits of models with terms outside the data plate, integer labels and truth values, against closed forms."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam

from trainer import fit

N = 400
RNG = np.random.default_rng(0)
X = np.linalg.qr(RNG.normal(size=(N, 2)))[0] * np.sqrt(N)
Y = X @ [1.0, -0.4] + 0.5 * RNG.normal(size=N)
OPTIONS = {"program": "eager", "slots": 16}


def quick(model, data):
    return fit(model, data, max_steps=16, options=OPTIONS, progress=False)


def free(x, y=None):
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("penalty", -50.0 * w.sum() ** 2)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, sigma), obs=y)


@pytest.fixture(scope="module")
def conditioned():
    return quick(poutine.condition(free, {"sigma": torch.tensor(0.5)}), {"x": X, "y": Y})


def test_a_condition_and_a_penalty_count_once(conditioned):
    """The penalty is worth a sixteenth of the data's precision: counted N times it would hold w[0] + w[1] at zero."""
    precision = X.T @ X / 0.25 + np.eye(2) + 100 * np.ones((2, 2))
    mean = np.linalg.solve(precision, X.T @ Y / 0.25)
    (w,) = conditioned.summary()
    sd = 1 / np.sqrt(np.diag(precision))
    np.testing.assert_allclose(w.loc, mean, atol=0.02 * sd.min())
    np.testing.assert_allclose(w.scale, sd, rtol=0.02)
    # The ELBO of this q in closed form: E log p(y, w, sigma) + entropy.
    loc, var, half = w.loc, w.scale**2, 0.5 * np.log(2 * np.pi)
    rows = -N * (half + np.log(0.5)) - 2 * (((Y - X @ loc) ** 2).sum() + (X**2 @ var).sum())
    prior = -2 * half - 0.5 * (loc @ loc + var.sum()) + 0.5 * np.log(2 / np.pi) - 0.125
    penalty = -50 * (loc.sum() ** 2 + var.sum())
    entropy = np.log(w.scale).sum() + 2 * half + 1
    elbo, error = conditioned.metrics["elbo"], conditioned.metrics["elbo_se"]
    assert abs(elbo - (rows + prior + penalty + entropy)) < max(5 * error, 0.01)


def test_a_conditioned_site_keeps_its_value_in_predictions(conditioned):
    found = conditioned.predict({"x": X[:5]}, 100)
    assert list(found) == ["y"]
    np.testing.assert_allclose(found["y"].sd, 0.5, rtol=0.05)  # drawn from its prior sigma would be 0.8 at the mean
    assert list(conditioned.sample(2)) == ["w"]


def test_a_reparameterized_site_can_be_drawn():
    def model(group, y=None):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("groups", 3):
            effect = pyro.sample("effect", dist.Normal(mean, 0.5))
        with pyro.plate("data", len(group)):
            pyro.sample("y", dist.Normal(effect[group], 0.5), obs=y)

    found = quick(poutine.reparam(model, config={"effect": LocScaleReparam(0.0)}), {"group": np.arange(N) % 3, "y": Y})
    drawn = found.sample(20)
    np.testing.assert_allclose(drawn["effect"], drawn["mean"][:, None] + 0.5 * drawn["effect_decentered"], atol=1e-12)


@pytest.mark.parametrize("kind", [bool, int, float])
def test_labels_of_every_type_give_the_same_answer(kind):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    table = pd.DataFrame({"a": X[:, 0], "b": X[:, 1], "y": (Y > 0).astype(kind)})
    found = fit(model, table, columns={"x": ["a", "b"], "y": "y"}, max_steps=16, options=OPTIONS, progress=False)
    (w,) = found.summary()
    # The gradient of the ELBO at its optimum, by quadrature over the predictor's Normal: zero to a hundredth of an sd.
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    eta = X @ w.loc + np.sqrt(X**2 @ w.scale**2) * nodes[:, None]
    expected = (weights / weights.sum()) @ (1 / (1 + np.exp(-eta)))
    slope = X.T @ ((Y > 0) - expected) - w.loc
    assert np.abs(slope * w.scale).max() < 0.03
    assert found.predict(table[["a", "b"]][:3])["y"].mean == pytest.approx(expected[:3], abs=0.05)
