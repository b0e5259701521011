"""Newton steps: to the exact optimum of a Gaussian problem, and nowhere where draws do not agree."""

import math
from dataclasses import replace

import pytest
import torch
from svi_problems import F64, build, one_group, regression, regression_data, regression_posterior

from trainer.posterior.convergence import newton_step, step_to_go
from trainer.posterior.newton import polished
from trainer.svi.objective import Objective
from trainer.svi.start import laplace_start

DATA = regression_data(orthogonal=False)


@pytest.fixture(scope="module")
def problem():
    inference, theta = build(regression, **DATA)
    inference = replace(inference, objective=Objective())
    start = laplace_start(inference, theta, one_group(**DATA))
    assert start is not None
    mean, covariance, _ = regression_posterior(**DATA)
    return inference, *start, mean, torch.linalg.inv(covariance)


class Gradient:
    """The exact gradient of the Gaussian problem; fresh draws see the optimum ``off``. Keeps its calls."""

    def __init__(self, mean, precision, off=0.0):
        self.mean, self.precision, self.off, self.calls = mean, precision, off, []

    def __call__(self, theta, fresh):
        self.calls.append(fresh)
        loc, scale = theta[:3] - self.mean - self.off * fresh, theta[3:].exp()
        return torch.cat([self.precision @ loc, scale**2 * self.precision.diagonal() - 1])


def away(optimum):
    """Three, two and one scales off, the scales by factors."""
    far = optimum.clone()
    far[:3] += torch.tensor([3.0, -2.0, 1.0], dtype=F64) * optimum[3:].exp()
    far[3:] += torch.tensor([0.4, -0.3, 0.1], dtype=F64)
    return far


def test_one_step_solves_a_gaussian_problem(problem):
    inference, optimum, whitening, mean, precision = problem
    gradient = Gradient(mean, precision)
    far = away(optimum)
    torch.testing.assert_close(far + newton_step(far, gradient(far, False), whitening), optimum, rtol=1e-7, atol=1e-9)
    gradient.calls.clear()
    made, found = polished(inference, far, gradient(far, True), whitening, gradient)
    torch.testing.assert_close(made, optimum, rtol=1e-7, atol=1e-9)
    assert torch.equal(found, gradient(made, True))
    assert gradient.calls[:-1] == [True, False, False, True]


def test_a_curvature_that_is_off_takes_more_steps(problem):
    inference, optimum, whitening, mean, precision = problem
    gradient, far = Gradient(mean, precision), away(optimum)
    wrong = whitening._replace(factor=1.1 * whitening.factor)
    made, found = polished(inference, far, gradient(far, True), wrong, gradient)
    assert step_to_go(inference, made, found, whitening) <= 0.03
    left, of_each = 3 * 1.1**2, 1.1**2 - 1  # as the wrong curvature sees it
    assert gradient.calls.count(False) == 1 + math.ceil(math.log(0.03 / left) / math.log(of_each))


@pytest.mark.parametrize("off", [0.2, -1.0])
def test_where_fresh_draws_do_not_agree_the_average_stays(problem, off):
    inference, optimum, whitening, mean, precision = problem
    far = away(optimum)
    gradient = Gradient(mean, precision, off * optimum[3:].exp())
    made, _ = polished(inference, far, gradient(far, True), whitening, gradient)
    assert made is far


def test_steps_that_lead_away_are_not_gone(problem):
    inference, optimum, whitening, mean, precision = problem
    far, gradient = away(optimum), Gradient(mean, precision)
    wrong = whitening._replace(factor=1.6 * whitening.factor)  # overshoots to 1.56 times as far
    made, _ = polished(inference, far, gradient(far, True), wrong, gradient)
    assert made is far
    assert gradient.calls == [True, False, False]


def test_at_the_optimum_there_is_nothing_to_do(problem):
    inference, optimum, whitening, mean, precision = problem
    gradient = Gradient(mean, precision)
    made, _ = polished(inference, optimum, gradient(optimum, True), whitening, gradient)
    assert made is optimum
    assert gradient.calls == [True]
