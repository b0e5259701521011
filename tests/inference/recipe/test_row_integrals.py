"""How finely rows are integrated: until the answer stays, and no further."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from svi_problems import F64, batch_of

from trainer.inference.guides.mean_field import MeanField
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.recipe import row_integrals as module
from trainer.inference.recipe.laplace import laplace_start
from trainer.inference.recipe.row_integrals import LIMIT, NATS, Move, _move_of, refined
from trainer.inference.rows.integral import Fineness
from trainer.inference.rows.options import RowOptions
from trainer.inference.setup import guide_factory, set_up

GENERATOR = torch.Generator().manual_seed(0)
ROWS = 400
U = torch.randn(ROWS, dtype=F64, generator=GENERATOR)
COUNTS = torch.poisson((0.5 + U).exp(), generator=GENERATOR)


def counts(y):
    a = pyro.sample("a", dist.Normal(y.new_zeros(()), 5.0))
    s = pyro.sample("s", dist.HalfNormal(y.new_ones(())))
    with pyro.plate("data", len(y)):
        u = pyro.sample("u", dist.Normal(0.0, s))
        pyro.sample("y", dist.Poisson((a + u).exp()), obs=y)


def problem(rows=ROWS, guide=MeanField, model=counts, y=COUNTS, **options):
    """The inference at its start, given so many rows like ``y``."""
    batch = batch_of(y=y)
    inference, theta = set_up(model, guide, batch._replace(num_obs=rows), rows, ELBO(), rows=RowOptions(**options))
    start = laplace_start(inference, theta, batch.as_group()) or (theta, None)
    return inference, start, batch.as_group()


def found(inference, start, rows):
    return refined(inference, start[0], rows, start[1])


def moved(inference, start, rows):
    return inference, start[0], rows, start[1]


def test_few_rows_are_content_with_few_nodes():
    result = found(*problem())
    assert result.fineness == Fineness(1, 9)
    assert result.moved == Move(0, 0)
    assert not result.off.matters(1)


def test_what_moves_the_answer_is_by_the_root_of_the_number_of_rows():
    some, more = (_move_of(*moved(*problem(rows)))(Fineness(1, 3), Fineness(1, 6)) for rows in (10**4, 10**6))
    assert more.scales == pytest.approx(10 * some.scales, rel=0.05)
    assert more.nats == pytest.approx(100 * some.nats, rel=0.05)


def test_nodes_are_raised_until_the_answer_stays():
    inference, start, rows = problem(10**8, nodes=3)
    result = found(inference, start, rows)
    assert result.moved.scales > LIMIT >= result.off.scales
    assert result.moved.nats > NATS >= result.off.nats
    assert inference.model.fineness == Fineness(1, 3)
    inference.model.refine(result.fineness)
    again = found(inference, start, rows)
    assert (again.fineness, again.moved) == (result.fineness, Move(0, 0))


def test_no_row_takes_more_memory_than_a_step_has(monkeypatch):
    inference, start, rows = problem(10**8, nodes=3)
    monkeypatch.setattr(module, "_MOST", inference.model.copies)
    result = found(inference, start, rows)
    assert result.fineness.points == 3
    assert result.off.scales > LIMIT


def test_the_move_is_that_of_the_optimum():
    """Of a location alone: its exact shift, by the derivative of the error over its curvature."""

    def model(y):
        a = pyro.sample("a", dist.Normal(y.new_zeros(()), 5.0))
        with pyro.plate("data", len(y)):
            u = pyro.sample("u", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Poisson((a + u).exp()), obs=y)

    inference, start, rows = problem(10**6, model=model)
    loc, sd = start[0][0].double(), start[0][1].double().exp()

    def evidence(a, nodes):
        inference.model.refine(Fineness(1, nodes))
        marginal = inference.model.fn
        return 10**6 / ROWS * marginal.log_density({"y": COUNTS}, {"a": a}).sum() - 0.5 * (a / 5.0) ** 2

    a = loc.clone().requires_grad_()
    slope = torch.autograd.grad(evidence(a, 80) - evidence(a, 5), a)[0]
    move = _move_of(*moved(inference, start, rows))(Fineness(1, 5), Fineness(1, 80))
    assert move.scales == pytest.approx(abs(float(slope * sd)), rel=0.01)
    assert move.scales > LIMIT


def test_a_mode_out_of_reach_gets_more_steps():
    far = torch.full((64,), 1e6, dtype=F64)
    inference, start, rows = problem(64, y=far)
    inference.model.refine(Fineness(1, 9, 1))
    assert found(inference, start, rows).fineness.steps > 4


def test_a_guide_of_pyros_is_judged_by_its_draws():
    guide = guide_factory(partial(AutoMultivariateNormal, init_scale=1e-3), ("y",))
    few, many = (found(*problem(rows, guide, nodes=3)) for rows in (ROWS, 10**9))
    assert few.moved.scales <= LIMIT
    assert many.fineness.points > 3
    assert math.isfinite(many.off.scales)


def test_what_is_known_in_closed_form_is_not_looked_at():
    def model(y):
        a = pyro.sample("a", dist.Normal(y.new_zeros(()), 5.0))
        with pyro.plate("data", len(y)):
            u = pyro.sample("u", dist.Normal(a, 2.0))
            pyro.sample("y", dist.Normal(u, 1.0), obs=y)

    assert found(*problem(model=model)) is None
