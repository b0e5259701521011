"""Models and guides as their authors write them, from `fit` to `predict`; the right answers are known."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoDelta, AutoNormal

from trainer import UserError, fit

X = np.random.default_rng(0).normal(size=120)
DATA = {"x": X, "y": 0.5 + X + np.random.default_rng(1).normal(size=120)}
NEW = {"x": np.array([0.0, 2.0])}
FEW = {"max_steps": 2, "progress": False, "options": {"program": "eager", "recipe": "plain"}}


def line(x, y=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(a + x, 1.0), obs=y)


def point(x, y=None):
    pyro.sample("a", dist.Delta(pyro.param("at", torch.tensor(0.25))))


def reads_y(x, y=None):
    pyro.sample("a", dist.Normal(pyro.param("at", torch.tensor(0.0)) + 0 * y.shape[0], 1.0))


@pytest.mark.parametrize("guide", [point, AutoDelta, AutoNormal(line)])
def test_predicts_without_the_response_under_any_guide(guide):
    posterior = fit(line, DATA, guide, **FEW)
    a = posterior.sample(1)["a"][0]
    mean = posterior.predict(NEW, num_draws=1)["y"].mean
    np.testing.assert_allclose(mean, a + NEW["x"], rtol=1e-6)


def test_a_guide_that_reads_the_response_is_asked_for_it():
    posterior = fit(line, DATA, reads_y, **FEW)
    with pytest.raises(UserError, match="cannot do without column y"):
        posterior.predict(NEW, num_draws=1)


def test_a_guide_takes_the_columns_of_the_model():
    def guide(x, y=None, z=None):
        point(x)

    with pytest.raises(UserError, match="takes column z and the model does not"):
        fit(line, {**DATA, "z": X}, guide, **FEW)
    assert fit(line, {**DATA, "z": X}, lambda *args, **columns: point(None), **FEW).sample(1)["a"].shape == (1,)


def test_predicts_where_the_model_draws_a_start():
    def model(x, y=None):
        slope = pyro.param("slope", torch.randn(1))
        spread = pyro.param("spread", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x, spread), obs=y)

    posterior = fit(model, DATA, **FEW)
    mean = posterior.predict(NEW, num_draws=1)["y"].mean
    np.testing.assert_allclose(mean, posterior.parameters()["slope"] * NEW["x"], rtol=1e-6)


def test_a_model_of_factors_alone_predicts_nothing():
    def model(x, y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.factor("fit", -0.5 * (y - a - x) ** 2)

    posterior = fit(model, DATA, **FEW)
    with pytest.raises(UserError, match="nothing to predict"):
        posterior.predict(DATA, num_draws=1)


def test_two_sites_of_a_name_are_refused():
    def model(x, y=None):
        pyro.sample("a", dist.Normal(0.0, 1.0))
        line(x, y)

    with pytest.raises(UserError, match="Multiple sample sites named"):
        fit(model, DATA, **FEW)
