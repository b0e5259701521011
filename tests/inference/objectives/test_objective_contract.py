"""What every estimate of the ELBO keeps to, whatever it does about the KL: run for each word of `KL`."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from svi_problems import F64, build, grad, noise_of, one_group, regression, regression_data, with_objective

from trainer.inference.guides.mean_field import KL

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
