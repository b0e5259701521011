"""Control variate and anchor: no bias on any problem, no variance where the theory says so."""

from dataclasses import replace

import torch
from svi_problems import F64, build, one_group, regression, regression_data, regression_posterior

from trainer.distributed.comm import ALONE
from trainer.inference.guides.gaussian import Diagonal
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.optim.optimizers import SGD
from trainer.inference.optim.rounds import one_round
from trainer.inference.optim.schedules import Constant
from trainer.inference.optim.variance_reduction import Preconditioner, Snapshot
from trainer.inference.recipe.laplace import laplace_start
from trainer.inference.step import StepInput, StepNoise, step

DATA = regression_data(orthogonal=False)
DIAGONAL = Diagonal(slice(0, 3))


def problem():
    inference, theta = build(regression, **DATA)
    inference = replace(inference, objective=ELBO())
    start = laplace_start(inference, theta, one_group(**DATA))
    assert start is not None
    return inference, theta, start[1]


def one_step(inference, update, state, seed, preconditioner=None):
    generator = torch.Generator().manual_seed(seed)
    eps = torch.randn(1, 1, inference.guide.size, dtype=F64, generator=generator)
    noise = StepNoise(eps, None, ((0,),))
    (only,) = update.rounds
    rates = only.rates(state.step, inference.num_obs)
    return step(inference, only, ALONE, state, StepInput(noise, one_group(**DATA), rates))[0]


def test_on_a_gaussian_posterior_every_draw_gives_the_exact_gradient():
    """Plain gradient descent from any theta: with the control variate all draws make the same step, and it is that of
    the exact ELBO (precision L): by loc L (loc - mean), by log s  s^2 L_ii - 1."""
    inference, theta, preconditioner = problem()
    identity = Preconditioner(torch.eye(3, dtype=F64), preconditioner.curvature)
    theta = torch.cat([torch.tensor([0.3, -0.2, 0.5], dtype=F64), torch.tensor([-3.0, -2.5, -2.0], dtype=F64)])
    update = one_round(SGD(lr=1.0), Constant(), 10, 10, whitened=True)
    made = [one_step(inference, update, update.init(theta, identity), seed).theta for seed in range(4)]
    mean, covariance, _ = regression_posterior(**DATA)
    precision, scale = torch.linalg.inv(covariance), theta[3:].exp()
    by_loc = precision @ (theta[:3] - mean)
    want = theta - torch.cat([by_loc, scale**2 * precision.diagonal() - 1]) / inference.num_obs
    for each in made:
        torch.testing.assert_close(each, want, rtol=1e-9, atol=1e-11)
    plain = one_round(SGD(lr=1.0), Constant(), 10, 10)
    without = [one_step(inference, plain, plain.init(theta), seed).theta for seed in range(2)]
    assert not torch.allclose(*without, atol=1e-4)


def test_the_control_variate_has_mean_zero_for_any_curvature():
    """Over the normals' second moments exactly: the mean over eps = +-e_i sqrt(D) is that over a standard normal."""
    generator = torch.Generator().manual_seed(0)
    curvature = torch.randn(3, 3, dtype=F64, generator=generator)
    curvature = curvature @ curvature.T
    log_sd = torch.tensor([-1.0, 0.5, 2.0], dtype=F64)
    sigma_points = torch.cat([torch.eye(3, dtype=F64), -torch.eye(3, dtype=F64)]) * 3**0.5
    chance = DIAGONAL.by_chance(curvature, log_sd, sigma_points[None], share=1.0)
    torch.testing.assert_close(chance, torch.zeros(3, dtype=F64), rtol=0, atol=1e-12)
    assert float(sum(DIAGONAL.chance(curvature, log_sd, each) for each in sigma_points)) < 1e-12


def test_a_scale_beyond_the_curvatures_adds_no_more_noise_than_the_curvatures():
    curvature = torch.diag(torch.tensor([4.0, 100.0], dtype=F64))
    diagonal = Diagonal(slice(0, 2))
    eps = torch.tensor([[[1.5, -0.5]]], dtype=F64)
    wide, fit = torch.tensor([20.0, 7.4], dtype=F64).log(), torch.tensor([0.5, 0.1], dtype=F64).log()
    torch.testing.assert_close(
        diagonal.by_chance(curvature, wide, eps, 1.0), diagonal.by_chance(curvature, fit, eps, 1.0), rtol=1e-14, atol=0
    )


def test_at_the_anchor_a_step_takes_the_full_gradient_for_the_locations_and_its_own_for_the_scales():
    """Whatever the batch and the draw; the reduced sum gets the anchor's gradient once."""
    inference, theta, _ = problem()
    size = inference.guide.size
    full = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
    update = one_round(SGD(lr=1.0), Constant(), 10, 10, anchored=size)
    state = update.init(theta)._replace(snapshot=Snapshot(theta, full))
    plain = one_round(SGD(lr=1.0), Constant(), 10, 10)
    for seed in range(3):
        made = one_step(inference, update, state, seed)
        torch.testing.assert_close(made.theta[:size], theta[:size] - full, rtol=1e-12, atol=1e-12)
        own = one_step(inference, plain, plain.init(theta), seed)
        assert torch.equal(made.theta[size:], own.theta[size:])


def test_away_from_the_anchor_the_difference_of_the_gradients_is_added():
    """On a quadratic, by hand: g(theta) - g(anchor) = L (loc - anchor) / N on all rows."""
    inference, theta, _ = problem()
    _, covariance, _ = regression_posterior(**DATA)
    away = theta.clone()
    away[:3] += torch.tensor([0.1, 0.2, -0.3], dtype=F64)
    update = one_round(SGD(lr=1.0), Constant(), 10, 10, anchored=3)
    state = update.init(away)._replace(snapshot=Snapshot(theta, torch.zeros(3, dtype=F64)))
    made = one_step(inference, update, state, 1)
    want = away[:3] - torch.linalg.inv(covariance) @ (away - theta)[:3] / inference.num_obs
    torch.testing.assert_close(made.theta[:3], want, rtol=1e-9, atol=1e-12)
