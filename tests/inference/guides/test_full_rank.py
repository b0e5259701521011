"""The full-rank guide: exact on a Gaussian posterior, priors by their marginals where that is right, its bounds."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from svi_problems import F64, build, grad, noise_of, one_group, regression, regression_data, regression_posterior

from trainer import fit
from trainer.errors import UserError
from trainer.inference.guides.full_rank import FullRank
from trainer.inference.recipe.laplace import laplace_start, preconditioner_at

DATA = regression_data(orthogonal=False)
KINDS = ["analytic", "monte_carlo", "sticking_the_landing"]


def started(kl="monte_carlo"):
    inference, theta = build(regression, FullRank, kl=kl, **DATA)
    found = laplace_start(inference, theta, one_group(**DATA))
    assert found is not None
    return inference, *found


def test_its_start_is_the_posterior_of_a_gaussian_problem():
    inference, theta, preconditioner = started()
    mean, covariance, _ = regression_posterior(**DATA)
    view = inference.gaussian
    root = view.root(theta)
    torch.testing.assert_close(view.location(theta), mean, rtol=0, atol=1e-7)
    torch.testing.assert_close(root @ root.T, covariance, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(view.sd(theta), covariance.diagonal().sqrt(), rtol=1e-9, atol=0)
    again = preconditioner_at(inference, theta, one_group(**DATA))
    torch.testing.assert_close(again.factor, preconditioner.factor, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(again.units, preconditioner.units, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kl", KINDS[1:])
def test_where_it_is_the_posterior_every_draw_gives_the_evidence(kl):
    inference, theta, _ = started(kl)
    _, _, evidence = regression_posterior(**DATA)
    for seed in range(3):
        noise = noise_of(torch.randn(1, 1, 3, dtype=F64, generator=torch.Generator().manual_seed(seed)))
        elbo = inference.terms(theta, noise, one_group(**DATA), 1.0).sum()
        assert float(elbo) == pytest.approx(float(evidence), abs=1e-6)


def test_where_it_is_the_posterior_no_draw_moves_it():
    inference, theta, _ = started("sticking_the_landing")
    for seed in range(3):
        noise = noise_of(torch.randn(1, 1, 3, dtype=F64, generator=torch.Generator().manual_seed(seed)))
        assert float(grad(inference, theta, noise, one_group(**DATA)).abs().max()) < 1e-6
    away = theta.clone()
    away[1] += 0.1
    assert float(grad(inference, away, noise, one_group(**DATA)).abs().max()) > 0.1


def hierarchy(y):
    """`b` has a prior that depends on `m`, `a` and `m` have none that does."""
    a = pyro.sample("a", dist.Normal(torch.zeros(2, dtype=F64), 2.0).to_event(1))
    m = pyro.sample("m", dist.Normal(torch.tensor(0.5, dtype=F64), 1.0))
    b = pyro.sample("b", dist.Normal(m, 0.7))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a.sum() + b, 1.0), obs=y)


def test_the_elbo_of_analytic_priors_has_the_mean_of_draws():
    """By sigma points, which are exact for the quadratics here. An expected log density by marginal sds alone would
    miss the covariance of `b` with `m`.
    """
    y = torch.tensor([0.3, 1.2, -0.4], dtype=F64)
    inference, theta = build(hierarchy, FullRank, y=y)
    assert inference.guide.alone == {"a", "m"}
    theta = theta + 0.3 * torch.randn(len(theta), dtype=F64, generator=torch.Generator().manual_seed(0))
    points = torch.cat([torch.eye(4, dtype=F64), -torch.eye(4, dtype=F64)]) * 2.0

    def mean(kl):
        made, _ = build(hierarchy, FullRank, kl=kl, y=y)
        return torch.stack(
            [made.terms(theta, noise_of(p[None, None]), one_group(y=y), 1.0).sum() for p in points]
        ).mean()

    want = mean("monte_carlo")
    for kl in KINDS:
        assert float(mean(kl)) == pytest.approx(float(want), abs=1e-10)


def of(size):
    def model(y):
        pyro.sample("w", dist.Normal(y.new_zeros(size), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(y.new_zeros(()), 1.0), obs=y)

    return model


def test_more_latents_than_it_holds_are_refused_before_training():
    with pytest.raises(UserError, match=r"guide=full_rank holds up to 1,000 latents .* the model has 1,001: take"):
        build(of(1001), FullRank, y=DATA["y"])
    assert build(of(1000), FullRank, y=DATA["y"])[0].guide.size == 1000


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_run_ends_at_the_posterior_of_correlated_columns(dtype):
    """Posterior sds 10 times those of a mean-field guide; means to 1e-3 sd, covariance to 1e-3, ELBO to 1e-6 N."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 3, dtype=F64, generator=generator)
    x[:, 1] = x[:, 0] + 0.1 * x[:, 1]
    y = x @ torch.tensor([1.0, -1.0, 0.5], dtype=F64) + 0.5 * torch.randn(300, dtype=F64, generator=generator)
    x, y = x.float().double(), y.float().double()
    options = {"program": "eager"}
    posterior = fit(
        regression, {"x": x.numpy(), "y": y.numpy()}, "full_rank", batch_size=100, max_steps=30, dtype=dtype,
        progress=False, options=options,
    )  # fmt: skip
    mean, covariance, evidence = regression_posterior(x, y)
    view, theta = posterior.inference.gaussian, posterior.theta.double()
    root, sd = view.root(theta), covariance.diagonal().sqrt()
    assert posterior.metrics["stop_reason"] == "converged"
    assert ((view.location(theta) - mean).abs() < 1e-3 * sd).all()
    torch.testing.assert_close(root @ root.T, covariance, rtol=1e-3, atol=1e-3 * float(sd.min()) ** 2)
    assert posterior.metrics["elbo"] == pytest.approx(float(evidence), abs=1e-6 * 300 if dtype == "float64" else 3e-3)
    drawn = torch.as_tensor(posterior.sample(4000)["w"]).double()
    torch.testing.assert_close(torch.corrcoef(drawn.T)[0, 1], root[0] @ root[1] / sd[0] / sd[1], rtol=0, atol=0.01)


def banana(y):
    """Its posterior is a curved ridge, along which the curvature at a draw is mostly negative."""
    a = pyro.sample("a", dist.Normal(y.new_zeros(()), 1.0))
    b = pyro.sample("b", dist.Normal(y.new_zeros(()), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a**2 + b, 0.05), obs=y)


def test_a_curvature_that_is_none_of_a_covariance_widens_it_by_a_factor():
    """The precision along the direction of negative curvature falls to a tenth, and the others are as ever."""
    y = torch.full((50,), 1.0, dtype=F64)
    inference, theta = build(banana, FullRank, y=y)
    theta = inference.gaussian.theta(torch.tensor([0.0, 0.0], dtype=F64), torch.tensor([0.01, 0.01], dtype=F64).log())
    found = preconditioner_at(inference, theta, one_group(y=y))
    precision = torch.linalg.inv(found.factor @ found.factor.T)
    torch.testing.assert_close(precision.diagonal()[0], torch.tensor(0.1 / 0.01**2, dtype=F64), rtol=1e-6, atol=0)
    torch.testing.assert_close(precision.diagonal()[1], torch.tensor(50 / 0.05**2 + 1, dtype=F64), rtol=0.05, atol=0)
