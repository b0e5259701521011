"""The ELBO as a number. Where q is the posterior, log p(x, z) - log q(z) is the log evidence at every z: no tolerance
for Monte Carlo can hide a wrong scale."""

import math
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from svi_problems import (
    F64,
    batch_of,
    build,
    noise_of,
    one_group,
    regression,
    regression_data,
    regression_posterior,
    with_objective,
)
from torch.distributions import transform_to

from trainer.inference.guides.mean_field import MeanField
from trainer.inference.guides.pyro_guides import PyroGuide
from trainer.inference.model.plates import Batch
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.setup import set_up


def exact_mean_field(orthogonal=True, kl="monte_carlo"):
    data = regression_data(orthogonal=orthogonal)
    inference, theta = build(regression, kl=kl, **data)
    mean, covariance, evidence = regression_posterior(**data)
    if orthogonal:
        theta = torch.cat([mean, covariance.diag().sqrt().log()])
    return data, inference, theta, evidence


@pytest.mark.parametrize("kl", ["monte_carlo", "sticking_the_landing"])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("pairs", [1, 3])
def test_elbo_is_the_log_evidence_at_every_draw(kl, antithetic, pairs):
    data, inference, theta, evidence = exact_mean_field(kl=kl)
    inference = with_objective(inference, antithetic=antithetic, pairs=pairs)
    for seed in range(5):
        eps = 3 * torch.randn(1, pairs, 3, dtype=F64, generator=torch.Generator().manual_seed(seed))
        elbo = inference.terms(theta, noise_of(eps), one_group(**data), 1.0).sum()
        assert float(elbo) == pytest.approx(float(evidence), abs=1e-9)


def test_elbo_is_the_log_evidence_under_pyros_multivariate_guide():
    """A correlated posterior, which only a full covariance holds."""
    data = regression_data(orthogonal=False)
    inference, theta = build(regression, lambda model, _: PyroGuide(AutoMultivariateNormal(model)), **data)
    mean, covariance, evidence = regression_posterior(**data)
    root = torch.linalg.cholesky(covariance)
    scale = root.diag()
    autoguide = AutoMultivariateNormal  # of its class, not of the object: that holds its parameters in a call alone
    theta = inference.parameters.flatten(
        {
            "guide.loc": mean,
            "guide.scale_unconstrained": transform_to(autoguide.scale_constraint).inv(scale),
            "guide.scale_tril_unconstrained": transform_to(autoguide.scale_tril_constraint).inv(root / scale[:, None]),
        }
    )
    for seed in range(5):
        eps = torch.randn(1, 1, 3, dtype=F64, generator=torch.Generator().manual_seed(seed))
        elbo = inference.terms(theta, noise_of(eps), one_group(**data), 1.0).sum()
        assert float(elbo) == pytest.approx(float(evidence), abs=1e-9)


@pytest.mark.parametrize("kl", ["analytic", "monte_carlo"])
@pytest.mark.parametrize("cuts", [(0, 6, 12), (0, 1, 4, 12)])
def test_batches_weighted_by_their_share_of_n_add_up(kl, cuts):
    """At fixed z: sum over batches of (B / N) ELBO(batch) is the full ELBO, term by term."""
    data, inference, theta, _ = exact_mean_field(kl=kl)
    eps = noise_of(torch.full((1, 1, 3), 0.8, dtype=F64))
    whole = inference.terms(theta, eps, one_group(**data), 1.0)
    parts = torch.zeros_like(whole)
    for first, last in pairwise(cuts):
        part = one_group(**{name: column[first:last] for name, column in data.items()})
        parts += (last - first) / 12 * inference.terms(theta, eps, part, 1.0)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_an_empty_group_contributes_its_share_of_the_global_terms_only():
    data, inference, theta, _ = exact_mean_field()
    batch = one_group(**data)
    both = Batch(
        {name: column.expand(2, *column.shape[1:]) for name, column in batch.columns.items()},
        torch.tensor([12, 0]),
        torch.tensor(12),
        None,
    )
    eps = torch.full((1, 1, 3), 0.8, dtype=F64)
    one = inference.terms(theta, noise_of(eps), batch, 1.0)
    two = inference.terms(theta, noise_of(eps.expand(2, -1, -1)), both, 0.5)
    torch.testing.assert_close(two, one, rtol=1e-13, atol=0)


def test_terms_are_named_in_the_models_order_and_kind():
    def model(x, y=None, t=None):
        a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
        pyro.deterministic("twice", 2 * a)
        pyro.sample("total", dist.Normal(a, 1.0), obs=x.new_ones(()))
        with pyro.plate("data", len(x)):
            pyro.deterministic("mean", a * x)
            pyro.sample("y", dist.Normal(a * x, 1.0), obs=y)
            pyro.factor("extra", -0.5 * (a - x) ** 2)

    x = torch.arange(4.0, dtype=F64)
    inference, theta = set_up(model, MeanField, batch_of(x=x, y=x), 40, ELBO("monte_carlo", False))
    assert inference.sites == ("a", "total", "y", "extra")
    assert inference.kinds == ("kl_global", "kl_global", "likelihood", "likelihood")
    terms = inference.terms(theta, noise_of(torch.zeros(1, 1, 1, dtype=F64)), one_group(x=x, y=x), 1.0)
    half = 0.5 * math.log(2 * math.pi)
    # z = 0: log p(a) - log q(a) = log 0.1; total counts once; the plate's sites stand for ten times their rows.
    expected = [math.log(0.1), -0.5 - half, 10 * (-0.5 * 14 - 4 * half), 10 * -0.5 * 14]
    assert terms.tolist() == pytest.approx(expected, abs=1e-12)


def test_sums_are_double_where_the_model_is_single():
    """2**26 nats a row: a float32 sum over the rows would lose what the float64 sum keeps."""

    def model(x):
        a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.factor("big", x + 0 * a)

    x = torch.tensor([2.0**26, 1.0, 2.0, 3.0])
    inference, theta = build(model, **{"x": x})
    terms = inference.terms(theta, noise_of(torch.zeros(1, 1, 1)), one_group(x=x), 1.0)
    assert terms.dtype == F64
    assert float(terms[1]) == 2**26 + 6
