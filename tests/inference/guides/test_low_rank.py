"""The low-rank guide: exact for a covariance of its rank, the nearest to any other, its density and its bounds."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from svi_problems import F64, build, grad, noise_of, one_group
from torch.distributions import constraints

from trainer import fit
from trainer.errors import UserError
from trainer.inference.guides.low_rank import Factors, LowRank, nearest
from trainer.inference.recipe.laplace import laplace_start

D, RANK = 6, 2


def covariance(seed=0):
    """A diagonal and two factors."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(D, RANK, dtype=F64, generator=generator)
    return (0.3 + torch.rand(D, dtype=F64, generator=generator)).square().diag() + factors @ factors.T


COVARIANCE, MEAN = covariance(), torch.linspace(-1, 1, D, dtype=F64)
ROOT = torch.linalg.cholesky(torch.linalg.inv(COVARIANCE)).T.contiguous()


def gaussian(x, y):
    """Its posterior has mean `MEAN` and covariance `COVARIANCE`: an improper prior, and rows that are its root's."""
    w = pyro.sample("w", dist.ImproperUniform(constraints.real_vector, (), (D,)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


ROWS = {"x": ROOT, "y": ROOT @ MEAN}


def of_rank(rank):
    return lambda plated, batch: LowRank(plated, batch, rank=rank)


def started(rank=RANK, kl="sticking_the_landing"):
    inference, theta = build(gaussian, of_rank(rank), kl=kl, **ROWS)
    start = laplace_start(inference, theta, one_group(**ROWS))
    assert start is not None
    return inference, start[0]


def matrix(inference, theta):
    root = inference.gaussian.root(theta)
    return root @ root.T


def test_a_covariance_of_its_rank_is_met_exactly():
    inference, theta = started()
    torch.testing.assert_close(matrix(inference, theta), COVARIANCE, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(inference.gaussian.location(theta), MEAN, rtol=0, atol=1e-6)
    torch.testing.assert_close(inference.gaussian.sd(theta), COVARIANCE.diagonal().sqrt(), rtol=1e-6, atol=0)
    evidence = 0.5 * (D * torch.tensor(2 * torch.pi, dtype=F64).log() + torch.logdet(COVARIANCE))
    evidence = evidence - 0.5 * D * torch.tensor(2 * torch.pi, dtype=F64).log()
    for seed in range(3):
        eps = torch.randn(1, 1, D + RANK, dtype=F64, generator=torch.Generator().manual_seed(seed))
        assert float(grad(inference, theta, noise_of(eps), one_group(**ROWS)).abs().max()) < 1e-4
        elbo = float(inference.terms(theta, noise_of(eps), one_group(**ROWS), 1.0).sum())
        assert elbo == pytest.approx(float(evidence), abs=1e-6)


@pytest.mark.parametrize("rank", [1, 3, D])
def test_the_nearest_to_a_precision_cannot_be_bettered(rank):
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(D, D, dtype=F64, generator=generator)
    precision = root @ root.T + 0.1 * torch.eye(D, dtype=F64)
    log_scale, factors = (each.requires_grad_() for each in nearest(precision, rank))
    made = log_scale.exp().square().diag() + factors @ factors.T
    loss = 0.5 * (precision @ made).trace() - 0.5 * torch.logdet(made)
    for slope in torch.autograd.grad(loss, (log_scale, factors)):
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-5)


def test_its_density_is_that_of_its_covariance():
    """-log q at a draw, through the terms of a model without data: by `MultivariateNormal`."""
    inference, theta = started(kl="monte_carlo")
    generator = torch.Generator().manual_seed(2)
    theta = theta + 0.2 * torch.randn(len(theta), dtype=F64, generator=generator)
    eps = torch.randn(D + RANK, dtype=F64, generator=generator)
    want = torch.distributions.MultivariateNormal(theta[:D], matrix(inference, theta))
    u = theta[:D] + inference.gaussian.root(theta) @ eps
    for kl in ("monte_carlo", "sticking_the_landing"):
        made, _ = build(gaussian, of_rank(RANK), kl=kl, **ROWS)
        terms = dict(zip(made.sites, made.terms(theta, noise_of(eps[None, None]), one_group(**ROWS), 1.0), strict=True))
        assert float(terms["w"]) == pytest.approx(-float(want.log_prob(u)), abs=1e-9)
    made, _ = build(gaussian, of_rank(RANK), kl="analytic", **ROWS)
    terms = dict(zip(made.sites, made.terms(theta, noise_of(eps[None, None]), one_group(**ROWS), 1.0), strict=True))
    assert float(terms["w"]) == pytest.approx(float(want.entropy()), abs=1e-9)


def test_chance_is_what_the_draws_gradient_has_beside_its_mean():
    view = Factors(slice(D, 2 * D), slice(2 * D, 2 * D + D * RANK))
    generator = torch.Generator().manual_seed(3)
    theta, eps = (
        torch.randn(*size, dtype=F64, generator=generator) for size in ((2 * D + D * RANK,), (1, 3, D + RANK))
    )
    curvature = torch.linalg.inv(covariance(1))

    def losses(theta):
        z, factors = view.spread(theta, eps[0]), theta[view.factors].view(D, RANK)
        mean = (curvature @ (theta[view.log_sd].exp().square().diag() + factors @ factors.T)).trace()
        return 0.5 * ((z @ curvature) * z).sum(-1), 0.5 * mean

    at = theta.clone().requires_grad_()
    each, mean = losses(at)
    (want,) = torch.autograd.grad(each.mean() - mean, at)
    torch.testing.assert_close(view.by_chance(curvature, theta, eps, 1.0), want[D:])
    torch.testing.assert_close(view.chance(curvature, theta, eps[0]), (each - mean).detach())


def test_a_step_to_where_it_is_turns_no_factor():
    """Eigenvectors have signs of their own."""
    inference, theta = started()
    turned = theta.clone()
    factors = turned[2 * D :].view(D, RANK)
    factors.copy_(factors @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=F64))
    step = inference.gaussian.covariance.step(turned, theta, torch.linalg.inv(ROOT))
    torch.testing.assert_close(step, torch.zeros_like(step), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [0, D + 1])
def test_a_rank_out_of_range_is_refused_before_training(rank):
    with pytest.raises(
        UserError, match=rf"guide.rank={rank} must lie between 1 and {D}, since the model has {D} latents"
    ):
        build(gaussian, of_rank(rank), **ROWS)


def test_a_run_ends_at_the_posterior():
    options = {"program": "eager", "guide": "low_rank", "guide.rank": RANK}
    found = fit(
        gaussian,
        {name: each.numpy() for name, each in ROWS.items()},
        max_steps=30,
        dtype="float64",
        progress=False,
        options=options,
    )
    assert found.metrics["stop_reason"] == "converged"
    torch.testing.assert_close(matrix(found.inference, found.theta), COVARIANCE, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.theta[:D], MEAN, rtol=0, atol=1e-3)
