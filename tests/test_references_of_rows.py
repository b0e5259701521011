"""Latents of rows beside outside answers: quadrature with Newton's method in float64, and scikit-learn."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from svi_problems import F64

from scripts.references.marginals import Global, Marginal, RowProblem, degree_five, optimum
from scripts.references.row_models import PROBLEMS
from scripts.references.rows import compare
from trainer import fit

BY_NAME = {problem.name: problem for problem in PROBLEMS}


def generator():
    return np.random.default_rng(1)


def test_the_rule_is_exact_up_to_degree_five():
    at, weights = degree_five(3)
    x, y, z = at.T
    moments = [x**0, x**2, x**4, x**2 * y**2, x * y, x**3 * y, x**2 * y * z, x**5, x**3 * y**2]
    assert [float(weights @ each) for each in moments] == pytest.approx([1, 1, 3, 1, 0, 0, 0, 0, 0], abs=1e-12)


def of_gaussian_rows(values, e, columns):
    noise = columns["y"] - values["b"][0] - values["b"][1] * columns["x"] - 0.8 * e[..., 0]
    return -0.5 * (noise / 0.6) ** 2 - math.log(0.6) - 0.5 * math.log(2 * math.pi)


def test_the_optimum_of_gaussian_rows_is_exact():
    rng = generator()
    x, y = np.round(rng.normal(size=60), 1), rng.normal(size=60)
    rows = {"x": np.tile(x, 2), "y": np.tile(y, 2)}
    latents = {"b": Global(dist.Normal(0.0, 2.0), [0.0, 0.0])}
    found = optimum(Marginal(RowProblem("", None, None, of_gaussian_rows, latents), rows))
    design = np.stack([np.ones(120), rows["x"]], 1)
    precision = design.T @ design + np.eye(2) / 4  # 0.8^2 + 0.6^2 = 1
    np.testing.assert_allclose(found.loc, np.linalg.solve(precision, design.T @ rows["y"]), atol=1e-7)
    np.testing.assert_allclose(found.scale, np.diag(precision) ** -0.5, rtol=1e-7)
    covariance = 4 * design @ design.T + np.eye(120)
    evidence = -0.5 * (120 * np.log(2 * np.pi) + np.linalg.slogdet(covariance)[1])
    evidence -= 0.5 * rows["y"] @ np.linalg.solve(covariance, rows["y"])
    gap = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])  # KL(q || posterior)
    assert found.elbo == pytest.approx(evidence - gap, abs=1e-6)


@pytest.mark.parametrize("problem", PROBLEMS, ids=list(BY_NAME))
def test_the_nodes_integrate_every_row(problem):
    """Beside equal steps over 12 sds on each side."""
    marginal = Marginal(problem, problem.rows(generator(), 20), nodes=60 if problem.size == 1 else 40)
    points = torch.linspace(-12, 12, 4001 if problem.size == 1 else 241, dtype=F64)
    grid = torch.cartesian_prod(*[points] * problem.size).view(-1, problem.size)
    values, _ = marginal.values(marginal.start)
    e = grid[:, None].expand(-1, len(marginal.counts), -1)
    columns = {name: each[None] for name, each in marginal.columns.items()}
    density = problem.log_row(values, e, columns) - 0.5 * (e**2).sum(-1)
    step = float(points[1] - points[0]) / math.sqrt(2 * math.pi)
    want = (torch.logsumexp(density, 0) + problem.size * math.log(step)) @ marginal.counts
    found = marginal.derivatives(marginal.start)[0] - float(marginal.log_prior(marginal.start))
    assert found == pytest.approx(float(want), abs=1e-9)


@pytest.mark.slow
def test_a_fit_is_the_optimum():
    """From the start by Newton steps, which few steps come before."""
    options = {"program": "eager", "max_steps": 8}
    assert compare(BY_NAME["Poisson-lognormal"], 1_000, options=options)["met"]


LOWER = """
 1.393351385
-0.988424218  2.499549791
 0.609630366 -0.165456608  1.461764281
 0.346131665 -0.979028356 -0.220453785  1.374662534
 0.43261775  -0.318434592  0.43805815   0.020419638  0.952141726
 0.457476144 -0.660537345  0.207969123  0.306484802  0.190373589  0.844173167
"""
"""By FactorAnalysis(2, tol=1e-14, svd_method="lapack") of scikit-learn 1.9.1: the covariance of highest likelihood."""
LOG_LIKELIHOOD = -3454.013931021646
"""Its score there, of all rows."""


def factors(x):
    loadings = pyro.sample("loadings", dist.Normal(torch.zeros(6, 2), 1000.0).to_event(2))
    log_sd = pyro.sample("log_sd", dist.Normal(torch.zeros(6), 30.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ loadings.T, log_sd.exp()).to_event(1), obs=x)


def test_factor_analysis_with_wide_priors_is_that_of_maximum_likelihood():
    """By a point guide, from loadings of 0, which are a saddle; up to a rotation of the factors."""
    rng = generator()
    truth = rng.normal(size=(6, 2))
    x = rng.normal(rng.normal(size=(400, 2)) @ truth.T, 0.8)
    x -= x.mean(0)
    posterior = fit(factors, {"x": x}, "point", max_steps=20, progress=False, options={"program": "eager"})
    loadings, log_sd = (site.mean for site in posterior.summary())
    covariance = loadings @ loadings.T + np.diag(np.exp(2 * log_sd))
    want = np.zeros((6, 6))
    want[np.tril_indices(6)] = [float(each) for each in LOWER.split()]
    np.testing.assert_allclose(covariance, want + np.tril(want, -1).T, atol=1e-4)
    quadratic = np.trace(np.linalg.solve(covariance, x.T @ x))
    found = -0.5 * (400 * (6 * math.log(2 * math.pi) + np.linalg.slogdet(covariance)[1]) + quadratic)
    assert found == pytest.approx(LOG_LIKELIHOOD, abs=1e-6)
