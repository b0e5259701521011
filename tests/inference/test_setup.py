"""Which guide is made of what the user gives, and what a problem knows once it is set up."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation, AutoNormal
from svi_problems import F64, batch_of, regression, regression_data

from trainer.errors import UserError
from trainer.inference.guides.auto_laplace import Laplace
from trainer.inference.guides.mean_field import MeanField
from trainer.inference.guides.pyro_guides import PyroGuide
from trainer.inference.model.plates import PlatedModel
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.setup import guide_factory, is_family, mean_field, set_up

DATA = regression_data()


def own_guide(x, y=None):
    loc = pyro.param("loc", torch.zeros(3, dtype=F64))
    pyro.sample("w", dist.Normal(loc, 1.0).to_event(1))


def maximum_likelihood(x, y=None):
    w = pyro.param("w", torch.zeros(3, dtype=F64))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def made_of(guide, model=regression, columns=DATA):
    """The guide that a factory makes, with what it calls."""
    batch = batch_of(**columns)
    with pyro.validation_enabled(False):
        return guide_factory(guide, columns)(PlatedModel(model, columns), batch)


class Network(torch.nn.Module):
    """A guide that is a module."""

    def forward(self, x, y=None):
        own_guide(x, y)


@pytest.mark.parametrize(
    ("guide", "kind"),
    [
        ("mean_field", MeanField),
        (MeanField, MeanField),
        (partial(MeanField), MeanField),
        (partial(MeanField, init_scale=0.3), MeanField),
        (AutoNormal, PyroGuide),
        (AutoLaplaceApproximation, Laplace),
        (partial(AutoNormal, init_scale=0.3), PyroGuide),
        (AutoDelta(regression), PyroGuide),
        (AutoLaplaceApproximation(regression), Laplace),
        (own_guide, PyroGuide),
        (partial(own_guide), PyroGuide),
        (Network(), PyroGuide),
        (lambda model: AutoNormal(model), PyroGuide),
        (lambda model: AutoLaplaceApproximation(model), Laplace),
        (lambda model: own_guide, PyroGuide),
    ],
)
def test_each_guide_is_made_as_what_it_is(guide, kind):
    assert type(made_of(guide)) is kind


@pytest.mark.parametrize("guide", ["fullrank", "", None, 3, MeanField.__name__])
def test_what_is_no_guide_is_named(guide):
    with pytest.raises(
        UserError, match=rf"guide={guide} is unknown \(.*(mean_field|full_rank).*\): give one of these, one of pyro"
    ):
        guide_factory(guide, DATA)


def test_only_a_class_with_the_methods_of_a_guide_is_a_family():
    assert is_family(MeanField)
    assert not any(map(is_family, (AutoNormal, PyroGuide.draw, partial(MeanField), "mean_field", object)))


def test_options_of_a_family_reach_its_guide():
    batch = batch_of(**DATA)
    _, theta = set_up(regression, guide_factory(partial(MeanField, init_scale=0.3), DATA), batch, 12, ELBO())
    torch.testing.assert_close(theta[3:].exp(), torch.full((3,), 0.3, dtype=F64))


def test_without_latents_a_family_holds_nothing():
    guide = made_of("mean_field", maximum_likelihood)
    assert type(guide) is PyroGuide
    inference, theta = set_up(maximum_likelihood, mean_field, batch_of(**DATA), 12, ELBO())
    assert theta.tolist() == [0.0] * 3
    assert (inference.sites, inference.kinds) == (("y",), ("likelihood",))


def test_a_callable_of_a_column_is_a_guide_and_not_asked_for_one():
    """Its one argument is a column, so it is called with it, and never with the model."""
    called = []

    def guide(x):
        called.append(x)
        own_guide(x)

    made_of(guide)
    assert called == []


def test_a_problem_knows_its_sites_its_rows_and_its_start():
    inference, theta = set_up(regression, mean_field, batch_of(**DATA), 1000, ELBO())
    assert (inference.num_obs, len(theta), theta.dtype) == (1000.0, 6, F64)
    assert dict(zip(inference.sites, inference.kinds))["y"] == "likelihood"
    assert inference.wide
    assert inference.derived == ()
    again = set_up(regression, mean_field, batch_of(**DATA), 1000, ELBO())[1]
    assert torch.equal(theta, again)


def test_what_a_model_derives_from_its_latents_alone_is_known():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
        pyro.deterministic("twice", 2 * w)
        with pyro.plate("data", len(x)):
            pyro.deterministic("mean", x @ w)
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    assert set_up(model, mean_field, batch_of(**DATA), 12, ELBO())[0].derived == ("twice",)


@pytest.mark.parametrize("own_matrix", [False, True])
def test_a_model_with_a_float32_matrix_of_its_own_is_not_wide(own_matrix):
    matrix = torch.eye(3, dtype=torch.float32)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ matrix @ w if own_matrix else x @ w, 0.5), obs=y)

    narrow = {name: column.float() for name, column in DATA.items()}
    inference, theta = set_up(model, mean_field, batch_of(**narrow), 12, ELBO())
    assert theta.dtype == torch.float32
    assert inference.wide is not own_matrix
    assert torch.get_default_dtype() == torch.float32
