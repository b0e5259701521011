"""What options say of the latents of rows."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from svi_problems import F64, batch_of

from trainer.errors import UserError
from trainer.inference.guides.mean_field import MeanField
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.rows.options import DEFAULT, RowOptions
from trainer.inference.setup import guide_factory, set_up

Y = torch.linspace(0.0, 4.0, 12, dtype=F64).round()


def model_of(numbers):
    """Poisson counts with so many effects of a row."""

    def model(y):
        a = pyro.sample("a", dist.Normal(y.new_zeros(()), 1.0))
        with pyro.plate("data", len(y)):
            u = pyro.sample("u", dist.Normal(y.new_zeros(numbers), 1.0).to_event(1)) if numbers else 0 * y[:, None]
            pyro.sample("y", dist.Poisson((a + u.sum(-1)).exp()), obs=y)

    return model


def own(y):
    loc = pyro.param("loc", torch.zeros((), dtype=F64))
    pyro.sample("a", dist.Normal(loc, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("u", dist.Normal(loc.expand(len(y), 1), 1.0).to_event(1))


def problem(numbers, guide=MeanField, **options):
    return set_up(model_of(numbers), guide, batch_of(y=Y), 12, ELBO(), rows=RowOptions(**options))[0]


@pytest.mark.parametrize(
    ("numbers", "options", "nodes"),
    [(1, {}, 9), (1, {"nodes": 5}, 5), (2, {}, 25), (2, {"nodes": 4}, 16), (3, {}, 16), (3, {"row_draws": 5}, 10)],
)
def test_nodes_and_draws_are_those_that_are_asked_for(numbers, options, nodes):
    inference = problem(numbers, **options)
    assert len(inference.model.fn.nodes.at) == inference.model.fineness.copies == nodes
    assert inference.rows == RowOptions(**options)


@pytest.mark.parametrize(
    ("numbers", "guide", "options", "sentence"),
    [
        (0, MeanField, {"rows": "integrate"}, "guide.rows is for continuous latents of rows, and the model has none"),
        (1, guide_factory(own, ("y",)), {"nodes": 5}, 'guide.nodes is for .* and yours holds "u": drop it'),
        (1, MeanField, {"row_draws": 5}, "guide.row_draws is for rows of more than two numbers, .* give guide.nodes"),
        (1, MeanField, {"widths": [5]}, "guide.widths is for rows that an encoder holds, .* give guide.nodes"),
        (1, MeanField, {"rows": "amortise", "nodes": 5}, "guide.nodes is for .* give guide.widths"),
        (3, MeanField, {"nodes": 5}, "guide.nodes is for rows of one or two numbers, .* give guide.row_draws"),
    ],
)
def test_an_option_that_says_nothing_of_the_model_is_refused(numbers, guide, options, sentence):
    with pytest.raises(UserError, match=sentence):
        problem(numbers, guide, **options)


def test_defaults_fit_every_model():
    assert problem(0).rows == problem(1, guide_factory(own, ("y",))).rows == DEFAULT
