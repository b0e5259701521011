"""Linear regression: its density, and the exact posterior by brute force, by the marginal of y, and from outside."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from model_tools import check_dtype_and_device, check_rows_are_reproducible, draw, log_joint
from scipy import stats

from trainer.errors import UserError
from trainer.models.linear import Exact, LinearRegression, Statistics, exact_posterior

FLIGHTS = Path(__file__).parents[2] / "examples" / "flights200k"
KNOWN = LinearRegression(features=3, weight_sd=1.7, intercept_sd=0.6, noise_sd=0.8)
LEARNT = LinearRegression(features=3, weight_sd=1.7, intercept_sd=0.6, noise_prior_sd=2.5)


def table(rows: int = 40, features: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Correlated, off-centre columns x [rows, features] and y [rows], float64."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(rows, features)) @ rng.normal(size=(features, features)) + 1.5
    return x, x @ rng.normal(size=features) - 0.4 + rng.normal(size=rows)


def posterior(x: np.ndarray, y: np.ndarray, model: LinearRegression, parts: int = 1) -> Exact:
    statistics = Statistics.empty(x.shape[1])
    for some_x, some_y in zip(np.array_split(x, parts), np.array_split(y, parts)):
        statistics.add(torch.as_tensor(some_x), torch.as_tensor(some_y))
    return exact_posterior(statistics, model)


@pytest.mark.parametrize("model", [KNOWN, LEARNT])
@pytest.mark.parametrize("seed", range(3))
def test_log_joint_is_the_density(model, seed):
    rng = np.random.default_rng(seed)
    x, y = table()
    sites = {"weight": rng.normal(size=3), "intercept": rng.normal()}
    expected = stats.norm(0, 1.7).logpdf(sites["weight"]).sum() + stats.norm(0, 0.6).logpdf(sites["intercept"])
    sigma = 0.8
    if model is LEARNT:
        sigma = sites["sigma"] = rng.uniform(0.2, 3)
        expected += stats.halfnorm(scale=2.5).logpdf(sigma)
    expected += stats.norm(sites["intercept"] + x @ sites["weight"], sigma).logpdf(y).sum()
    torch.testing.assert_close(log_joint(model, sites, {"x": x, "y": y}).item(), expected, rtol=1e-10, atol=1e-10)


def test_posterior_equals_brute_force():
    x, y = table()
    exact = posterior(x, y, KNOWN)
    design = np.column_stack([np.ones(len(x)), x])
    precision = design.T @ design / 0.8**2 + np.diag([0.6**-2] + 3 * [1.7**-2])
    np.testing.assert_allclose(exact.precision, precision, rtol=1e-12)
    np.testing.assert_allclose(exact.mean, np.linalg.inv(precision) @ design.T @ y / 0.8**2, rtol=1e-10)


def test_log_evidence_is_the_marginal_of_y():
    x, y = table()
    design = np.column_stack([np.ones(len(x)), x])
    covariance = design @ np.diag([0.6**2] + 3 * [1.7**2]) @ design.T + 0.8**2 * np.eye(len(x))
    marginal = stats.multivariate_normal(np.zeros(len(x)), covariance).logpdf(y)
    assert math.isclose(posterior(x, y, KNOWN).log_evidence, marginal, rel_tol=1e-10)


def test_mean_field_optimum_is_stationary_in_the_models_own_elbo():
    x, y = table()
    exact = posterior(x, y, KNOWN)

    def joint(beta):
        return log_joint(KNOWN, {"intercept": beta[0], "weight": beta[1:]}, {"x": x, "y": y})

    # the log joint is quadratic, so its expectation under a factorized Gaussian is f(m) + sum of sd^2 f'' / 2
    curvature = torch.autograd.functional.hessian(joint, exact.mean).diagonal()
    loc = exact.mean.clone().requires_grad_()
    log_sd = exact.mean_field_sd.log().requires_grad_()
    entropy = log_sd.sum() + 0.5 * len(loc) * math.log(2 * math.pi * math.e)
    elbo = joint(loc) + 0.5 * ((2 * log_sd).exp() * curvature).sum() + entropy
    assert math.isclose(elbo.item(), exact.mean_field_elbo, rel_tol=1e-10)
    for gradient in torch.autograd.grad(elbo, (loc, log_sd)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-8)
    assert exact.mean_field_elbo < exact.log_evidence


def test_statistics_do_not_depend_on_the_batches():
    x, y = table(rows=1_000)
    whole, parts = posterior(x, y, KNOWN), posterior(x, y, KNOWN, parts=7)
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-11, atol=0)
    torch.testing.assert_close(parts.precision, whole.precision, rtol=1e-11, atol=0)
    assert math.isclose(parts.log_evidence, whole.log_evidence, rel_tol=1e-11)


@pytest.mark.parametrize("origin", [0.0, 100.0])
def test_a_million_rows(origin):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1_000_000, 2)) + origin
    y = 10 * origin + x @ [2.0, -3.0] + rng.standard_normal(len(x))
    wide = LinearRegression(noise_sd=1.0, weight_sd=1e4, intercept_sd=1e6)
    exact = posterior(x, y, wide, parts=10)
    design = np.column_stack([np.ones(len(x)), x])
    ols, residual = np.linalg.lstsq(design, y, rcond=None)[:2]
    assert (abs(exact.mean - torch.as_tensor(ols)) < 1e-3 * exact.mean_field_sd).all()
    # with flat priors: the maximum of the likelihood, the prior at it, and the Gaussian volume around it
    prior = stats.norm(0, 1e6).logpdf(ols[0]) + stats.norm(0, 1e4).logpdf(ols[1:]).sum()
    volume = 1.5 * math.log(2 * math.pi) - 0.5 * np.linalg.slogdet(design.T @ design).logabsdet
    evidence = -0.5 * len(x) * math.log(2 * math.pi) - 0.5 * residual[0] + prior + volume
    assert abs(exact.log_evidence - evidence) < 1e-14 * (y @ y)  # as its docstring promises


def test_statistics_take_any_dtype():
    x, y = table()
    narrow = posterior(x.astype(np.float32), y.astype(np.float32), KNOWN)
    same = posterior(x.astype(np.float32).astype(np.float64), y.astype(np.float32).astype(np.float64), KNOWN)
    assert narrow.mean.dtype == torch.float64
    assert narrow.log_evidence == same.log_evidence


def test_the_flights_reference():
    """The factor of the weights, at the noise that the factor of sigma implies: sd = 1 / sqrt(E sigma^-2)."""
    reference = json.loads((FLIGHTS / "reference.json").read_text())
    flights = pq.read_table(FLIGHTS / "data.parquet").to_pydict()
    delay, distance, time = (np.asarray(flights[name], float) for name in ("delay", "distance", "time"))
    angles = 2 * np.pi * np.arange(1, 4) * time[:, None] / 24
    waves = np.stack([np.sin(angles), np.cos(angles)], axis=2).reshape(len(time), 6)
    x = np.column_stack([distance / 1000 - 0.7, waves])
    sigma = math.exp(reference["mf_log_sigma_loc"] - reference["mf_log_sigma_scale"] ** 2)
    exact = posterior(x, delay / 10, LinearRegression(noise_sd=sigma))
    np.testing.assert_allclose(exact.mean_field_sd, reference["mf_scale"], rtol=1e-4)
    assert (abs(exact.mean - torch.tensor(reference["mf_loc"])) < 0.01 * exact.mean_field_sd).all()
    sd = exact.precision.inverse().diagonal().sqrt()
    np.testing.assert_allclose(sd, reference["exact_sd_given_sigma"], rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", [KNOWN, LEARNT, replace(KNOWN, noise_sd=1)])
def test_dtype_and_device(model, dtype):
    check_dtype_and_device(model, draw(model, 6)[1], dtype)


@pytest.mark.parametrize("model", [KNOWN, LEARNT, LinearRegression()])
def test_rows_are_reproducible(model):
    check_rows_are_reproducible(model)


def test_least_squares_recovers_the_truth():
    truth, columns = draw(LEARNT, 20_000)
    design = np.column_stack([np.ones(20_000), columns["x"]]).astype(float)
    ols, residual = np.linalg.lstsq(design, columns["y"], rcond=None)[:2]
    np.testing.assert_allclose(ols, [truth["intercept"], *truth["weight"]], atol=5 * truth["sigma"] / math.sqrt(20_000))
    np.testing.assert_allclose(residual / 20_000, truth["sigma"] ** 2, rtol=0.05)


def test_a_learnt_noise_has_no_exact_posterior():
    with pytest.raises(UserError, match=r"model\.noise_sd="):
        exact_posterior(Statistics.empty(3), LEARNT)
