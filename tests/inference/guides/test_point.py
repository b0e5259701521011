"""Points and Laplace's approximation, from u = 0: the mode in each one's space, and the curvature there."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from svi_problems import F64, regression, regression_data, regression_posterior
from torch.distributions import constraints

from trainer import fit

DATA = regression_data(orthogonal=False)
COLUMNS = {name: column.numpy() for name, column in DATA.items()}
OPTIONS = {"max_steps": 40, "progress": False, "dtype": "float64", "options": {"program": "eager"}}


def shares(y):
    """Successes with a Beta prior: in its own space the mode is (a - 1 + k) / (a + b - 2 + n)."""
    p = pyro.sample("p", dist.Beta(torch.tensor(2.0, dtype=F64), 3.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(p), obs=y)


LABELS = {"y": np.array([1.0] * 13 + [0.0] * 7)}


def test_a_point_is_the_mode_in_the_latents_own_space():
    found = fit(shares, LABELS, "point", **OPTIONS)
    assert float(found.summary()[0].mean) == pytest.approx((2 - 1 + 13) / (2 + 3 - 2 + 20), abs=1e-6)
    assert float(found.summary()[0].sd) == 0.0
    assert found.metrics["elbo_se"] == 0.0
    p = torch.tensor(14 / 23, dtype=F64)
    joint = dist.Beta(torch.tensor(2.0, dtype=F64), 3.0).log_prob(p) + 13 * p.log() + 7 * (1 - p).log()
    assert found.metrics["elbo"] == pytest.approx(float(joint), abs=1e-9)


def test_laplace_is_the_mode_in_unconstrained_space_and_its_curvature():
    found = fit(shares, LABELS, "laplace", **OPTIONS)
    values = found.inference.parameters.unflatten(found.theta)
    share = (2 + 13) / (2 + 3 + 20)  # of u = logit p, with the Jacobian p (1 - p)
    assert float(values["guide.loc"]) == pytest.approx(np.log(share / (1 - share)), abs=1e-6)
    assert float(values["guide.factor"]) == pytest.approx((25 * share * (1 - share)) ** -0.5, rel=1e-5)


@pytest.mark.parametrize("guide", ["point", "laplace"])
def test_of_a_gaussian_posterior_both_have_the_mean(guide):
    found = fit(regression, COLUMNS, guide, **OPTIONS)
    mean, covariance, evidence = regression_posterior(**DATA)
    values = found.inference.parameters.unflatten(found.theta)
    torch.testing.assert_close(values["guide.loc"], mean, rtol=0, atol=1e-6)
    if guide == "laplace":
        factor = values["guide.factor"]
        torch.testing.assert_close(factor @ factor.T, covariance, rtol=1e-6, atol=1e-9)
        assert abs(found.metrics["elbo"] - float(evidence)) < 5 * found.metrics["elbo_se"]


@pytest.mark.parametrize("guide", ["point", "laplace"])
def test_an_improper_prior_is_no_hindrance(guide):
    def flat(y):
        w = pyro.sample("w", dist.ImproperUniform(constraints.real, (), ()))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    found = fit(flat, {"y": COLUMNS["y"]}, guide, **OPTIONS)
    assert float(found.inference.parameters.unflatten(found.theta)["guide.loc"]) == pytest.approx(COLUMNS["y"].mean())
