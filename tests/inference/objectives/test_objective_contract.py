"""What every objective keeps to: its terms, their means, and those of their gradients, run for each word of `KL`."""

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from svi_problems import F64, build, grad, noise_of, one_group, regression, regression_data, with_objective

from trainer.inference.guides.mean_field import KL, Noise
from trainer.inference.model.plates import Batch
from trainer.inference.objectives.elbo import elbo_terms
from trainer.inference.objectives.objective import log_weight_by_row

DATA = {"x": regression_data()["x"][:, :1], "y": regression_data()["y"]}
THETA = torch.tensor([0.7, -0.3], dtype=F64)
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(6)


def exact(theta: torch.Tensor) -> torch.Tensor:
    """(E log p(w) + entropy, E log p(y | w)) [2] of one latent, in closed form."""
    loc, scale = theta[0], theta[1].exp()
    q, prior = torch.distributions.Normal(loc, scale), torch.distributions.Normal(0.0, 2.0)
    x, y = DATA["x"][:, 0], DATA["y"]
    squares = (y - x * loc) ** 2 + (x * scale) ** 2
    likelihood = -0.5 * (squares / 0.5**2 + math.log(2 * math.pi * 0.5**2)).sum()
    return torch.stack([-torch.distributions.kl_divergence(q, prior), likelihood])


@pytest.fixture(params=get_args(KL))
def inference(request):
    return build(regression, kl=request.param, **DATA)[0]


def expected(inference, of):
    """What ``of`` (inference, noise) is on average over the draws: by quadrature, which is exact here."""
    pairs = inference.objective.pairs
    noises = [noise_of(torch.full((1, pairs, 1), node, dtype=F64)) for node in NODES]
    return sum(w * of(inference, noise) for w, noise in zip(WEIGHTS / WEIGHTS.sum(), noises, strict=True))


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("pairs", [1, 3])
def test_its_mean_is_the_elbo(inference, antithetic, pairs):
    """Term by term."""
    inference = with_objective(inference, antithetic=antithetic, pairs=pairs)
    found = expected(inference, lambda each, noise: each.terms(THETA, noise, one_group(**DATA), 1.0))
    assert inference.kinds == ("kl_global", "likelihood")
    torch.testing.assert_close(found, exact(THETA), rtol=0, atol=1e-9)


@pytest.mark.parametrize("antithetic", [False, True])
def test_the_mean_of_its_gradient_is_that_of_the_elbo(inference, antithetic):
    inference = with_objective(inference, antithetic=antithetic)
    found = expected(inference, lambda each, noise: grad(each, THETA, noise, one_group(**DATA)))
    theta = THETA.clone().requires_grad_()
    (want,) = torch.autograd.grad(exact(theta).sum(), theta)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-9)


def test_terms_outside_the_plate_count_by_their_share_and_rows_by_their_scale(inference):
    noise = noise_of(torch.full((1, 1, 1), 0.8, dtype=F64))
    batch = one_group(**DATA)
    once = inference.terms(THETA, noise, batch, 1.0)
    of_many = with_objective(inference, num_obs=10 * len(DATA["y"]))
    torch.testing.assert_close(of_many.terms(THETA, noise, batch, 0.25), once * torch.tensor([0.25, 10.0]))


def draws_of(inference, groups: int = 1):
    """Terms of each group's pairs at every sign, at the noise of a standard normal."""
    generator = torch.Generator().manual_seed(3)
    batch = Batch.whole(DATA, num_obs=2 * len(DATA["y"]))
    objective = inference.objective
    every = []
    for _ in range(groups):
        eps = torch.randn(objective.pairs, 1, dtype=F64, generator=generator)
        noises = [Noise(sign * each, None, 0) for each in eps for sign in objective.signs]
        values = inference.parameters.unflatten(THETA)
        every.append([elbo_terms(inference.model, inference.guide, values, n, batch, objective.kl) for n in noises])
    return every


@pytest.mark.parametrize("antithetic", [False, True])
def test_terms_are_means_over_draws_and_sums_over_groups(inference, antithetic):
    objective = with_objective(inference, antithetic=antithetic, pairs=3).objective
    draws = draws_of(replace(inference, objective=objective), groups=2)
    found = objective.combined(draws, 0.25)
    assert list(found) == list(inference.sites)
    for name, value in found.items():
        by_group = [sum(terms[name].value for terms in group) / len(group) for group in draws]
        share = 1.0 if draws[0][0][name].scaled else 0.25
        torch.testing.assert_close(value, share * sum(by_group), rtol=1e-12, atol=0)


def test_the_weights_of_the_rows_add_up_to_what_stands_in_the_plate(inference):
    ((terms,),) = draws_of(with_objective(inference, antithetic=False))
    rows = log_weight_by_row(terms)
    x, y = DATA["x"][:, 0], DATA["y"]
    assert rows.shape == y.shape
    torch.testing.assert_close(rows.sum(), terms["y"].value, rtol=1e-12, atol=0)
    residual = y - x * (
        THETA[0] + THETA[1].exp() * torch.randn(1, dtype=F64, generator=torch.Generator().manual_seed(3))
    )
    by_hand = 2.0 * (-0.5 * (residual / 0.5) ** 2 - math.log(0.5) - 0.5 * math.log(2 * math.pi))
    torch.testing.assert_close(rows, by_hand, rtol=1e-12, atol=1e-12)


def test_a_term_that_is_known_as_a_sum_has_no_weights(inference):
    ((terms,),) = draws_of(with_objective(inference, antithetic=False))
    with pytest.raises(ValueError, match="y is known as a sum alone"):
        log_weight_by_row({"y": replace(terms["y"], rows=None)})
