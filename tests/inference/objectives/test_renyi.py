"""Bounds of several draws: values and gradients against quadrature, and no noise where the guide is the posterior."""

import math
from dataclasses import replace
from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch
from svi_problems import (
    F64,
    build,
    chunk_of,
    grad,
    noise_of,
    one_group,
    regression,
    regression_data,
    regression_posterior,
)

from trainer.inference.objectives.renyi import Renyi
from trainer.inference.optim.optimizers import Adam
from trainer.inference.optim.rounds import one_round
from trainer.inference.optim.schedules import Constant
from trainer.inference.programs.fused import Fused

DATA = {"x": torch.tensor([[0.4], [-0.3]], dtype=F64), "y": torch.tensor([0.9, 0.2], dtype=F64)}
THETA = torch.tensor([0.7, 0.1], dtype=F64)
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(24)
EVIDENCE = float(regression_posterior(**DATA)[2])
ALPHAS = (0.0, 0.3, 0.5, 1.0)


def problem(**options):
    inference, _ = build(regression, **DATA)
    return replace(inference, objective=Renyi(**options))


def log_weight(theta, eps):
    """log p(y, w) - log q(w) of `regression` with one latent, by hand."""
    w = theta[0] + theta[1].exp() * eps
    zero = torch.zeros((), dtype=F64)
    likelihood = torch.distributions.Normal(DATA["x"][:, 0] * w, zero + 0.5).log_prob(DATA["y"]).sum()
    log_q = torch.distributions.Normal(theta[0], theta[1].exp()).log_prob(w)
    return likelihood + torch.distributions.Normal(zero, zero + 2).log_prob(w) - log_q


def places(draws):
    """(probability, normals [draws]) of a product rule; the draws may change places."""
    shares = WEIGHTS / WEIGHTS.sum()
    for at in combinations_with_replacement(range(len(NODES)), draws):
        ways = math.factorial(draws) / math.prod(math.factorial(at.count(each)) for each in set(at))
        yield ways * math.prod(shares[list(at)]), torch.tensor(NODES[list(at)], dtype=F64)


def mean_bound(theta, alpha, draws):
    """E of the bound [], by quadrature."""
    total = torch.zeros((), dtype=F64)
    objective = Renyi(alpha=alpha, draws=draws)
    each = torch.stack([log_weight(theta, torch.tensor(node, dtype=F64)) for node in NODES])
    index = {float(node): number for number, node in enumerate(NODES)}
    for share, eps in places(draws):
        total = total + share * objective.bound(each[[index[float(one)] for one in eps]])
    return total


@pytest.mark.parametrize("doubly", [False, True])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_mean_of_its_gradient_is_that_of_the_mean_bound(alpha, doubly):
    """Of two draws, so that either gradient has the same mean."""
    inference = problem(alpha=alpha, draws=2, doubly=doubly)
    batch = one_group(**DATA)
    found = sum(share * grad(inference, THETA, noise_of(eps[None, :, None]), batch) for share, eps in places(2))
    theta = THETA.clone().requires_grad_()
    (want,) = torch.autograd.grad(mean_bound(theta, alpha, 2), theta)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-7)


def test_the_bounds_rise_with_the_draws_and_fall_with_alpha():
    by_draws = [float(mean_bound(THETA, 0.0, draws)) for draws in (1, 2, 3)]
    assert by_draws == sorted(by_draws)
    assert by_draws[0] + 1e-3 < by_draws[-1] < EVIDENCE
    by_alpha = [float(mean_bound(THETA, alpha, 2)) for alpha in ALPHAS]
    assert by_alpha == sorted(by_alpha, reverse=True)
    assert by_alpha[-1] == pytest.approx(by_draws[0], abs=1e-10)  # the ELBO
    near = float(mean_bound(THETA, 1 - 1e-6, 2))
    assert near == pytest.approx(by_alpha[-1], abs=1e-5)


@pytest.mark.parametrize("doubly", [False, True])
def test_its_terms_are_those_of_the_elbo(doubly):
    inference, eps = problem(draws=3, doubly=doubly), torch.tensor([0.3, -1.0, 2.0], dtype=F64)
    terms = inference.terms(THETA, noise_of(eps[None, :, None]), one_group(**DATA), 1.0)
    want = torch.stack([log_weight(THETA, each) for each in eps]).mean()
    torch.testing.assert_close(terms.sum(), want, rtol=1e-12, atol=0)
    assert inference.kinds == ("kl_global", "likelihood")


@pytest.mark.parametrize("alpha", ALPHAS)
def test_where_the_guide_is_the_posterior_it_has_no_noise(alpha):
    """The bound is the evidence, and the gradient is zero, at every draw; the plain gradient is not."""
    data = regression_data()
    inference, _ = build(regression, **data)
    inference = replace(inference, objective=Renyi(alpha=alpha, draws=4))
    mean, covariance, evidence = regression_posterior(**data)
    theta = torch.cat([mean, covariance.diagonal().sqrt().log()])
    plain = replace(inference, objective=Renyi(alpha=alpha, draws=4, doubly=False))
    for seed in range(3):
        eps = 2 * torch.randn(1, 4, 3, dtype=F64, generator=torch.Generator().manual_seed(seed))
        terms = inference.terms(theta, noise_of(eps), one_group(**data), 1.0)
        assert float(terms.sum()) == pytest.approx(float(evidence), abs=1e-9)
        assert float(grad(inference, theta, noise_of(eps), one_group(**data)).abs().max()) < 1e-9
        assert float(grad(plain, theta, noise_of(eps), one_group(**data)).abs().max()) > 0.1


@pytest.mark.parametrize("doubly", [False, True])
def test_padded_rows_do_not_count(doubly):
    inference, eps = problem(draws=2, doubly=doubly), torch.tensor([[[0.3], [-1.0]]], dtype=F64)
    padded = {name: torch.cat([column, 5 + column]) for name, column in DATA.items()}
    batch = one_group(**padded)._replace(valid=torch.tensor([2]), batch_rows=torch.tensor(2))
    want, got = (grad(inference, THETA, noise_of(eps), each) for each in (one_group(**DATA), batch))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.xdist_group("fused")
@pytest.mark.parametrize("doubly", [False, True])
def test_the_compiled_step_is_the_eager_one(doubly, compiled_folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(compiled_folder))
    chunk = chunk_of(6, 1, 8, F64, x=(3,), y=())
    inference, theta = build(regression, num_obs=8, **{name: each[0, 0] for name, each in chunk.columns.items()})
    inference = replace(inference, objective=Renyi(alpha=0.3, draws=4, doubly=doubly))
    update = one_round(Adam(lr=0.05), Constant(), 6, 6)
    fused = Fused(inference, update, 3, [0])
    want, got = (each.run(update.init(theta), chunk, 6) for each in (fused.reference, fused))
    torch.testing.assert_close(got.state.theta, want.state.theta, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.terms, want.terms, rtol=1e-10, atol=1e-10)
