"""Data that a model meets exactly have no posterior, which is said; columns far apart in scale have one."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from trainer import UserError, fit

N = 300
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, 2))
NOISE = RNG.normal(size=N)
LINE = X @ [1.0, 2.0] + 3.0
QUICK = {"progress": False, "max_steps": 40, "options": {"program": "eager"}}


def line(likelihood):
    def model(x, y=None):
        a = pyro.sample("a", dist.Normal(0.0, 10.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(5.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", likelihood(a + x @ b, sigma), obs=y)

    return model


def level(prior):
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 10.0))
        sigma = pyro.sample("sigma", prior)
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(a, sigma), obs=y)

    return model


def gamma(y):
    shape, sigma = pyro.sample("shape", dist.LogNormal(0.0, 2.0)), pyro.sample("sigma", dist.LogNormal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Gamma(shape, sigma), obs=y)


def student(mean, scale):
    return dist.StudentT(4.0, mean, scale)


GRID = np.round(3 * X)
F32 = X.astype(np.float32)
WITHOUT = {
    "constant": (level(dist.HalfNormal(5.0)), {"y": np.full(N, 3.3)}, "is constant"),
    "zero": (level(dist.HalfCauchy(5.0)), {"y": np.zeros(N)}, "is constant"),
    "a proper prior of log sigma": (level(dist.LogNormal(0.0, 1.0)), {"y": np.full(N, -7.0)}, "is constant"),
    "float64": (line(dist.Normal), {"x": X, "y": LINE}, "exact function"),
    "float32": (line(dist.Normal), {"x": F32, "y": F32 @ np.float32([1, 2]) + np.float32(3)}, "exact function"),
    "integers": (line(dist.Normal), {"x": GRID, "y": GRID @ [1, 2] + 3}, "exact function"),
    "few rows repeated": (line(dist.Normal), {"x": np.repeat(X[:2], 150, 0), "y": np.repeat(NOISE[:2], 150)}, "exact"),
    "Laplace": (line(dist.Laplace), {"x": X, "y": LINE}, "exact function"),
    "StudentT": (line(student), {"x": X, "y": LINE}, "exact function"),
    "LogNormal": (line(dist.LogNormal), {"x": X, "y": np.exp(LINE)}, "exact function"),
    "Gamma": (gamma, {"y": np.full(N, 2.5)}, "is constant"),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_what_is_met_exactly_is_refused_with_latent_and_column(name):
    model, data, what = WITHOUT[name]
    with pytest.raises(UserError, match=f'column "y" .*{what}.* as "s(igma|hape)" goes to its limit'):
        fit(model, data, **QUICK)


@pytest.mark.parametrize("noise", [1.0, 1e-4])
def test_a_small_scale_is_none(noise):
    """1e-4 of the column's sd is far above what rounding leaves."""
    posterior = fit(line(dist.Normal), {"x": X, "y": LINE + noise * NOISE}, **QUICK)
    residual = NOISE - np.c_[np.ones(N), X] @ np.linalg.lstsq(np.c_[np.ones(N), X], NOISE, rcond=None)[0]
    sigma = next(site for site in posterior.summary() if site.name == "sigma")
    assert sigma.mean == pytest.approx(noise * np.sqrt((residual**2).sum() / (N - 3)), rel=0.02)


def test_a_known_scale_has_an_optimum():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a, 0.5), obs=y)

    posterior = fit(model, {"y": np.full(N, 3.3)}, **QUICK)
    precision = N / 0.25 + 0.01
    assert posterior.summary()[0].mean == pytest.approx(3.3 * N / 0.25 / precision, rel=1e-5)


def test_an_effect_of_each_row_has_a_posterior():
    """The joint density grows without end as the effects meet the rows; with them integrated out it does not."""

    def model(row, y=None):
        tau, sigma = (pyro.sample(name, dist.LogNormal(0.0, 0.5)) for name in ("tau", "sigma"))
        with pyro.plate("rows", 20):
            effect = pyro.sample("effect", dist.Normal(0.0, tau))
        with pyro.plate("data", len(row)):
            pyro.sample("y", dist.Normal(effect[row], sigma), obs=y)

    posterior = fit(model, {"row": np.arange(20), "y": NOISE[:20]}, **QUICK)
    assert posterior.metrics["stop_reason"] != "no_maximum"


def test_a_run_without_a_search_for_a_start_ends_without_an_optimum(capsys):
    """The spread of a guide's own optimum is looked at, whatever the guide."""

    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 10.0))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a, 1e-9 * sigma), obs=y)

    posterior = fit(model, {"y": np.full(N, 3.3)}, guide=AutoNormal, **{**QUICK, "progress": True, "max_steps": 5})
    assert posterior.metrics["stop_reason"] == "no_maximum"
    assert 'column "y" is constant' in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("small", "large"), [(1e-9, 1e9), (1e-4, 1e4)])
def test_columns_far_apart_in_scale_are_fitted(small, large):
    """The exact posterior of a linear model with known noise, in the units of the columns."""
    units = np.array([small, large])

    def model(a, b, y=None):
        prior = dist.Normal(torch.zeros(2).to(a), 10.0 / torch.tensor(units).to(a))
        slope = pyro.sample("slope", prior.to_event(1))
        with pyro.plate("data", len(a)):
            pyro.sample("y", dist.Normal(a * slope[0] + b * slope[1], 1.0), obs=y)

    y = X @ [1.0, 2.0] + NOISE
    posterior = fit(model, {"a": X[:, 0] * small, "b": X[:, 1] * large, "y": y}, **QUICK)
    precision = X.T @ X + np.eye(2) / 100
    (slope,) = posterior.summary()
    np.testing.assert_allclose(slope.mean * units, np.linalg.solve(precision, X.T @ y), rtol=0, atol=0.005)
    np.testing.assert_allclose(slope.sd * units, np.diag(precision) ** -0.5, rtol=0.02)


def test_columns_far_apart_are_named_where_they_cannot_be_fitted(capsys):
    data = {"x": X * [1e-6, 1e6], "y": LINE + NOISE}
    fit(line(dist.Normal), data, guide=AutoNormal, **{**QUICK, "progress": True, "max_steps": 2})
    said = " ".join(capsys.readouterr().out.split())
    assert 'the scales of columns "x[0]" (sd 1e-06) and "x[1]" (sd 1e+06) are too far apart' in said
