"""The optimum of guides of other families: against exact posteriors, and functions whose optimum is known."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoDelta, AutoNormal

from trainer.inference.estimates.full_gradient import Draws, full_loss
from trainer.inference.estimates.many_draws import terms_together
from trainer.inference.estimates.passes import Block, Pass
from trainer.inference.guides.mean_field import MeanField
from trainer.inference.model.plates import Batch
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.recipe import optimum
from trainer.inference.recipe.optimum import can_be_settled, problem_of, settled
from trainer.inference.setup import guide_factory, set_up

F64 = torch.float64


def param(name, value):
    return pyro.param(name, torch.tensor(value, dtype=F64), constraint=constraints.positive)


def coin(y):
    share = pyro.sample("share", dist.Beta(y.new_tensor(10.0), 10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(share), obs=y)


def coin_guide(y):
    pyro.sample("share", dist.Beta(param("a", 80.0), param("b", 80.0)))


def counts(y):
    rate = pyro.sample("rate", dist.Gamma(y.new_tensor(2.0), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def counts_guide(y):
    pyro.sample("rate", dist.Gamma(param("a", 1.0), param("b", 1.0)))


def kinds(y):
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3, dtype=F64)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Categorical(share), obs=y)


def kinds_guide(y):
    a = pyro.param("a", torch.ones(3, dtype=F64), constraint=constraints.positive)
    pyro.sample("share", dist.Dirichlet(a))


def level(y):
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 2.0), obs=y)


def level_guide(y):
    loc = pyro.param("loc", torch.zeros((), dtype=F64))
    pyro.sample("mean", dist.Normal(loc, param("scale", 1.0)))


generator = torch.Generator().manual_seed(0)
HEADS = (torch.rand(100, dtype=F64, generator=generator) < 0.6).double()
COUNTS = torch.poisson(torch.full((100,), 3.0, dtype=F64), generator=generator)
KINDS = torch.multinomial(torch.tensor([0.2, 0.3, 0.5]), 100, True, generator=generator)
LEVELS = 3 + 2 * torch.randn(100, dtype=F64, generator=generator)
PRECISION = 1 / 100 + len(LEVELS) / 4
CASES = {
    "beta": (coin, coin_guide, HEADS, {"a": 10 + HEADS.sum(), "b": 110 - HEADS.sum()}),
    "gamma": (counts, counts_guide, COUNTS, {"a": 2 + COUNTS.sum(), "b": torch.tensor(101.0)}),
    "dirichlet": (kinds, kinds_guide, KINDS, {"a": 1.0 + torch.bincount(KINDS)}),
    "normal": (
        level,
        level_guide,
        LEVELS,
        {"loc": LEVELS.sum() / 4 / PRECISION, "scale": torch.tensor(PRECISION**-0.5)},
    ),
}


def problem(model, guide, y):
    ids = torch.arange(len(y))
    batch = Batch.whole({"y": y}, ids)
    inference, theta = set_up(model, guide_factory(guide, ["y"]), batch, len(y), ELBO("monte_carlo"))
    blocks = [Block(0, {"y": y[:30]}, ids[:30]), Block(1, {"y": y[30:]}, ids[30:])]

    def loss(theta, draws, number):
        return full_loss(
            terms_together(problem_of(inference)), theta, Pass(blocks, 2, number, lambda total: total), draws
        )

    return inference, theta, loss, batch


def exact(inference, theta, values):
    unconstrained = {
        name: torch.distributions.transform_to(inference.parameters.constrained[name]).inv(value.double())
        for name, value in values.items()
    }
    return inference.parameters.flatten(unconstrained).to(theta.dtype)


@pytest.mark.parametrize("name", ["beta", "gamma", "dirichlet"])
def test_the_noise_of_the_gradient_vanishes_at_the_posterior(name):
    """Where q is the posterior every draw's path gradient is zero, whatever the draw."""
    model, guide, y, values = CASES[name]
    inference, theta, loss, _ = problem(model, guide, y)
    rows = Pass([Block(0, {"y": y}, torch.arange(len(y)))], 1, 0, lambda total: total)
    end = exact(inference, theta, values)
    assert loss(theta, Draws(2, 1), 0)[1].abs().min() > 0.1
    whole = Draws(2, len(y))  # each draw on all rows
    _, plain = full_loss(terms_together(inference), end, rows, whole)
    _, found = full_loss(terms_together(problem_of(inference)), end, rows, whole)
    assert plain.norm() > 0.1
    near = 1e-4 if name == "dirichlet" else 1e-8  # as near as torch's derivative of a draw is
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=near)


@pytest.mark.parametrize("name", CASES)
def test_a_guide_that_can_be_the_posterior_is_it_at_the_end(name):
    model, guide, y, values = CASES[name]
    inference, theta, loss, rows = problem(model, guide, y)
    assert can_be_settled(inference)
    found = settled(inference, theta, loss, rows)
    assert found.gain <= optimum.ENOUGH * len(theta)
    made = inference.parameters.constrain(inference.parameters.unflatten(found.theta))
    for each, value in values.items():
        torch.testing.assert_close(made[each], value.double(), rtol=0.06, atol=0)  # 3 % of an sd


def test_points_are_brought_to_the_mode_exactly():
    inference, theta, loss, rows = problem(level, AutoDelta, LEVELS)
    found = settled(inference, theta, loss, rows)
    torch.testing.assert_close(found.theta[0], LEVELS.sum() / 4 / PRECISION, rtol=1e-4, atol=0)
    assert found.gain < 1e-6


def test_the_answer_is_the_mean_of_two_optima_and_what_is_left_is_known():
    """Quadratics whose optima differ by the draws: the second one's rise at the first optimum, a quarter of it."""
    hessian = torch.tensor([[4.0, 1.0], [1.0, 0.5]], dtype=F64)
    centers = {0: (9.0, 9.0), 2: (1.0, 2.0), 3: (1.02, 2.02)}

    def loss(theta, draws, number):
        off = theta - torch.tensor(centers[number], dtype=F64)
        return float(off @ hessian @ off / 2), hessian @ off

    found = optimum.by_fixed_draws(torch.zeros(2), loss, optimum.LEVELS[1:2])
    torch.testing.assert_close(found.theta, torch.tensor([1.01, 2.01], dtype=F64), rtol=0, atol=1e-4)
    assert found.gain == pytest.approx(0.5 * 0.0004 * float(hessian.sum()) / 4, rel=0.05)


def test_a_natural_step_is_newtons_where_the_guide_is_the_posterior():
    information = torch.tensor([[2.0, 0.5], [0.5, 1e4]], dtype=F64)
    gradient = torch.tensor([0.3, -2.0], dtype=F64)
    step, gain = optimum._natural(gradient, information)
    torch.testing.assert_close(step, -torch.linalg.solve(information, gradient))
    assert gain == pytest.approx(float(gradient @ torch.linalg.solve(information, gradient)) / 2)


def test_a_loss_that_is_not_finite_moves_nothing():
    inference, theta, _, rows = problem(level, level_guide, LEVELS)
    nothing = torch.full_like(theta, float("nan"))
    assert settled(inference, theta, lambda *_, **__: (float("nan"), nothing), rows) is None


def test_points_beside_a_family_without_normals_are_left_to_the_steps():
    """Nothing tells how far the point may go, so nothing is said to have converged."""

    def model(y):
        scale = pyro.sample("scale", dist.LogNormal(y.new_zeros(()), 1.0))
        rate = pyro.sample("rate", dist.Gamma(y.new_tensor(2.0), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(rate, scale), obs=y)

    def guide(y):
        pyro.sample("scale", dist.Delta(param("point", 1.0)))
        pyro.sample("rate", dist.Gamma(param("a", 1.0), param("b", 1.0)))

    inference, theta, loss, rows = problem(model, guide, LEVELS)
    assert settled(inference, theta, loss, rows) is None


def test_what_can_be_settled():
    assert not can_be_settled(problem(level, MeanField, LEVELS)[0])  # it has Newton steps of its own
    assert can_be_settled(problem(level, AutoNormal, LEVELS)[0])

    def of_rows(y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0)), 1.0), obs=y)

    def network(y):
        slope = pyro.param("slope", torch.tensor(0.5, dtype=F64))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(slope * y, 0.7))

    assert not can_be_settled(problem(of_rows, network, LEVELS)[0])
