"""Newton steps: to the exact optimum of a Gaussian problem, and nowhere where draws do not agree."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from svi_problems import F64, build, one_group, regression, regression_data, regression_posterior

from trainer.inference.estimates.full_gradient import MANY
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.recipe.convergence import newton_step, step_to_go
from trainer.inference.recipe.laplace import laplace_start
from trainer.inference.recipe.newton import conjugate_gradients, polished, step_by_products

DATA = regression_data(orthogonal=False)


@pytest.fixture(scope="module")
def problem():
    inference, theta = build(regression, **DATA)
    inference = replace(inference, objective=ELBO())
    start = laplace_start(inference, theta, one_group(**DATA))
    assert start is not None
    mean, covariance, _ = regression_posterior(**DATA)
    return inference.gaussian, *start, mean, torch.linalg.inv(covariance)


class Gradient:
    """The exact gradient of the Gaussian problem; fresh draws see the optimum ``off``. Keeps its calls."""

    def __init__(self, mean, precision, off=0.0):
        self.mean, self.precision, self.off, self.calls = mean, precision, off, []

    def __call__(self, theta, draws=MANY, fresh=True):
        self.calls.append(fresh)
        loc, scale = theta[:3] - self.mean - self.off * fresh, theta[3:].exp()
        return torch.cat([self.precision @ loc, scale**2 * self.precision.diagonal() - 1])


def away(optimum):
    """Three, two and one scales off, the scales by factors."""
    far = optimum.clone()
    far[:3] += torch.tensor([3.0, -2.0, 1.0], dtype=F64) * optimum[3:].exp()
    far[3:] += torch.tensor([0.4, -0.3, 0.1], dtype=F64)
    return far


def by(view, preconditioner):
    return partial(newton_step, view, preconditioner=preconditioner)


def test_one_step_solves_a_gaussian_problem(problem):
    view, optimum, preconditioner, mean, precision = problem
    gradient = Gradient(mean, precision)
    far = away(optimum)
    torch.testing.assert_close(
        far + newton_step(view, far, gradient(far, fresh=False), preconditioner), optimum, rtol=1e-7, atol=1e-9
    )
    gradient.calls.clear()
    made, found, left, agreed = polished(view, far, by(view, preconditioner), gradient)
    torch.testing.assert_close(made, optimum, rtol=1e-7, atol=1e-9)
    assert torch.equal(found, gradient(made))
    assert left < 1e-6
    assert agreed
    assert gradient.calls[:-1] == [False, False, True]


def test_a_curvature_that_is_off_takes_more_steps(problem):
    """Each of which would leave 0.21 of the error, 6 until less than 0.005 is left; two tell the next how much."""
    view, optimum, preconditioner, mean, precision = problem
    gradient, far = Gradient(mean, precision), away(optimum)
    wrong = preconditioner._replace(factor=1.1 * preconditioner.factor)
    made, found, left, _ = polished(view, far, by(view, wrong), gradient)
    assert step_to_go(view, made, newton_step(view, made, found, preconditioner)) <= left <= 0.005
    assert gradient.calls.count(False) <= 4


def test_where_fresh_draws_leave_a_little_they_have_more_draws(problem):
    view, optimum, preconditioner, mean, precision = problem

    class Noisy(Gradient):
        def __call__(self, theta, draws=MANY, fresh=True):
            self.off = 0.6 * optimum[3:].exp() * MANY.pairs / draws.pairs
            return super().__call__(theta, draws, fresh)

    gradient, levels = Noisy(mean, precision), [MANY._replace(pairs=times * MANY.pairs) for times in (1, 4, 16)]
    once = polished(view, away(optimum), by(view, preconditioner), gradient, levels[:1])
    assert once.left == pytest.approx(0.6)
    assert not once.agreed
    twice = polished(view, away(optimum), by(view, preconditioner), gradient, levels[:2])
    assert twice.left == pytest.approx(0.15)
    assert not twice.agreed
    made = polished(view, away(optimum), by(view, preconditioner), gradient, levels)
    assert made.left == pytest.approx(0.0375)
    assert made.agreed


@pytest.mark.parametrize("off", [0.8, -1.0])
def test_where_fresh_draws_do_not_agree_there_is_no_answer(problem, off):
    view, optimum, preconditioner, mean, precision = problem
    gradient = Gradient(mean, precision, off * optimum[3:].exp())
    assert polished(view, away(optimum), by(view, preconditioner), gradient) is None
    assert gradient.calls[-1]


def test_steps_that_do_not_settle_give_no_answer(problem):
    view, optimum, preconditioner, mean, precision = problem
    noise, gradient = torch.Generator().manual_seed(1), Gradient(mean, precision)

    def restless(theta, found):
        return newton_step(view, theta, found, preconditioner) + 0.1 * torch.randn(6, dtype=F64, generator=noise)

    assert polished(view, away(optimum), restless, gradient) is None
    assert not any(gradient.calls)
    assert polished(view, away(optimum), lambda theta, found: None, gradient) is None


def test_small_equal_parts_of_the_way_are_taken_at_once(problem):
    """Steps that go a twentieth of the way in one direction and all of it in the others: 90 would be needed."""
    view, optimum, preconditioner, mean, precision = problem
    slow, gradient = torch.zeros(6, dtype=F64), Gradient(mean, precision)
    slow[:3] = optimum[3:].exp()
    slow /= slow.norm()

    def short(theta, found):
        step = newton_step(view, theta, found, preconditioner)
        return step - 0.95 * (step @ slow) * slow

    made, _, left, _ = polished(view, away(optimum), short, gradient)
    torch.testing.assert_close(made[:3], optimum[:3], rtol=0, atol=1e-3 * float(optimum[3:].exp().min()))
    assert left < 0.01
    assert gradient.calls.count(False) <= 6


def test_conjugate_gradients_end_after_as_many_steps_as_there_are_directions():
    """A hierarchy: 300 effects of precision 1 + 1/i, and two top-level latents that hang together with all of them."""
    generator = torch.Generator().manual_seed(3)
    arrow = torch.diag(1 + 1 / torch.arange(1, 303, dtype=F64))
    arrow[:2, :2] = 60 * torch.eye(2, dtype=F64)
    arrow[:2, 2:] = torch.randn(2, 300, dtype=F64, generator=generator) / 3
    arrow[2:, :2] = arrow[:2, 2:].T
    want, calls = torch.randn(302, dtype=F64, generator=generator), []

    def product(along):
        calls.append(along)
        return arrow @ along

    found = conjugate_gradients(product, want, lambda v: v / arrow.diagonal())
    torch.testing.assert_close(found, torch.linalg.solve(arrow, want), rtol=1e-3, atol=1e-4)
    assert len(calls) <= 8


def test_conjugate_gradients_say_where_the_curvature_is_negative():
    saddle = torch.tensor([2.0, -1.0], dtype=F64)
    found = conjugate_gradients(lambda along: saddle * along, torch.tensor([1.0, 0.0], dtype=F64), lambda v: v)
    assert found is not None
    assert found.tolist() == [0.5, 0.0]
    assert conjugate_gradients(lambda along: saddle * along, torch.tensor([0.0, 1.0], dtype=F64), lambda v: v) is None


def test_a_step_by_products_is_the_one_by_the_matrix(problem):
    view, optimum, preconditioner, mean, precision = problem
    far = away(optimum)
    found = Gradient(mean, precision)(far, fresh=False)
    want = newton_step(view, far, found, preconditioner)
    step = step_by_products(view, far, found, lambda along: precision @ along)
    torch.testing.assert_close(step, want, rtol=1e-5, atol=1e-9)
    assert step_by_products(view, far, found, lambda along: -precision @ along) is None
