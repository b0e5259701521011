"""`fit` with guides of other kinds: it ends at their optimum, and says what the answer is."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation, AutoMultivariateNormal

from trainer import fit

EAGER = {"progress": True, "options": {"program": "eager"}}
generator = np.random.default_rng(0)
HEADS = (generator.random(60) < 0.6).astype(float)
X = generator.normal(size=(60, 2))
Y = generator.normal(X @ [1.0, -0.5], 0.5)


def coin(heads=None):
    share = pyro.sample("share", dist.Beta(10.0, 10.0))
    with pyro.plate("data", len(heads)):
        pyro.sample("heads", dist.Bernoulli(share), obs=heads)


def coin_guide(heads=None):
    a = pyro.param("alpha", torch.tensor(80.0), constraint=constraints.positive)
    b = pyro.param("beta", torch.tensor(80.0), constraint=constraints.positive)
    pyro.sample("share", dist.Beta(a, b))


def test_a_beta_guide_ends_as_the_posterior(capsys):
    posterior = fit(coin, {"heads": HEADS}, coin_guide, max_steps=40, **EAGER)
    a, b = 10 + HEADS.sum(), 70 - HEADS.sum()
    parameters = posterior.inference.parameters
    found = parameters.constrain(parameters.unflatten(posterior.theta))
    assert float(found["alpha"]) == pytest.approx(a, rel=0.05)
    assert float(found["beta"]) == pytest.approx(b, rel=0.05)
    assert posterior.metrics["stop_reason"] == "converged"
    assert posterior.metrics["evidence"]["gain"] <= 0.005
    assert "nats a parameter to gain over all rows" in capsys.readouterr().out


def line(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


GUIDES = [
    "mean_field",
    "full_rank",
    "block",
    "low_rank",
    "by_site",
    "arrow",
    "point",
    "laplace",
    AutoMultivariateNormal,
]


@pytest.mark.parametrize("guide", GUIDES)
def test_sticking_the_landing_ends_where_the_default_does(guide):
    """Any guide trains by it, to the same locations."""
    options = {"program": "eager", "objective.kl": "sticking_the_landing"}
    posterior = fit(line, {"x": X, "y": Y}, guide, max_steps=300, progress=False, options=options)
    want = np.linalg.solve(X.T @ X / 0.25 + np.eye(2) / 4, X.T @ Y / 0.25)
    (site,) = posterior.summary()
    found = site.mean
    np.testing.assert_allclose(found, want, atol=0.02)


def test_laplace_ends_with_a_covariance(tmp_path):
    options = {"max_steps": 40, "dtype": "float64", "run_dir": tmp_path / "run", **EAGER}
    posterior = fit(line, {"x": X, "y": Y}, AutoLaplaceApproximation, **options)
    covariance = np.linalg.inv(X.T @ X / 0.25 + np.eye(2) / 4)
    values = posterior.inference.parameters.unflatten(posterior.theta)
    np.testing.assert_allclose(values["guide.loc"], covariance @ X.T @ Y / 0.25, atol=1e-3)
    np.testing.assert_allclose(values["guide.factor"] @ values["guide.factor"].T, covariance, rtol=1e-5)
    assert "normal by the curvature" in repr(posterior)


def likelihood(x, y=None):
    w = pyro.param("w", lambda: torch.zeros(2))
    sigma = pyro.param("sigma", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, sigma), obs=y)


def test_parameters_alone_end_at_the_highest_likelihood(capsys):
    posterior = fit(likelihood, {"x": X, "y": Y}, max_steps=40, **EAGER)
    best = np.linalg.lstsq(X, Y, rcond=None)[0]
    left = np.mean((Y - X @ best) ** 2)
    assert posterior.metrics["elbo"] == pytest.approx(-30 * (np.log(2 * np.pi * left) + 1), abs=1e-4)
    np.testing.assert_allclose(posterior.parameters()["w"], best, atol=1e-3)
    said = capsys.readouterr().out
    assert "no latent site: maximum likelihood of 3 parameters" in said
    assert "sigma" in repr(posterior)
    assert posterior.metrics["stop_reason"] == "converged"


def rows_of_their_own(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def amortized(x):
    slope = pyro.param("slope", torch.tensor(0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x[:, 0], 0.7))


def test_a_budget_that_says_nothing_of_the_optimum_is_said(capsys):
    fit(rows_of_their_own, {"x": X}, amortized, max_steps=4, **EAGER)
    assert "see whether the ELBO rises with max_steps=8" in " ".join(capsys.readouterr().out.split())


def test_a_guide_of_sparse_columns_is_brought_to_its_optimum():
    """The few rows that such a guide is asked at are whole ones."""
    sparse = scipy.sparse.csr_array(np.where(np.abs(X) > 0.5, X, 0.0))
    posterior = fit(line, {"x": sparse, "y": Y}, AutoDelta, max_steps=8, **EAGER)
    dense = sparse.toarray()
    mode = np.linalg.solve(dense.T @ dense / 0.25 + np.eye(2) / 4, dense.T @ Y / 0.25)
    np.testing.assert_allclose(posterior.sample(1)["w"][0], mode, atol=1e-3)
