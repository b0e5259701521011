"""Latents of rows that an encoder holds: its posterior and predictions, where it is the line that is right."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from trainer.data.shards.index import Column, Index
from trainer.errors import UserError
from trainer.inference.guides.mean_field import MeanField
from trainer.inference.model.plates import Batch
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.rows.options import RowOptions
from trainer.inference.setup import set_up
from trainer.posterior.posterior import Posterior

F64 = torch.float64
N = 25
GENERATOR = torch.Generator().manual_seed(5)
X = torch.randn(N, dtype=F64, generator=GENERATOR)
Y = 2 * torch.randn(N, dtype=F64, generator=GENERATOR)
NOISE = 0.5
SHARE = 1 / (1 + NOISE**2)
MEAN, SD = SHARE * (Y - 0.7 * X), math.sqrt(SHARE) * NOISE
TABLE = {"x": X.numpy(), "y": Y.numpy()}


def effects(x, y=None):
    b = pyro.sample("b", dist.Normal(torch.zeros((), dtype=F64), 1.0))
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0 * x, 1.0))
        pyro.sample("y", dist.Normal(b * x + u, NOISE), obs=y)


@pytest.fixture(scope="module")
def fitted():
    """b = 0.7, and the encoder of two hidden numbers a and -a, whose silu differ by a, the mean of u."""
    rows = Batch.whole({"x": X, "y": Y}, torch.arange(N))
    inference, theta = set_up(effects, MeanField, rows, N, ELBO(), rows=RowOptions("amortise", widths=(2,)))
    values = {name: torch.zeros_like(value) for name, value in inference.parameters.unflatten(theta).items()}
    of_x, of_y = inference.rows.facts["x"], inference.rows.facts["y"]
    sides = torch.tensor([1.0, -1.0], dtype=F64)
    values |= {
        "guide.loc": torch.tensor([0.7], dtype=F64),
        "guide.log_scale": torch.tensor([-40.0], dtype=F64),
        "guide.rows.x.weight": -SHARE * 0.7 * of_x["sd"][0] * sides[None],
        "guide.rows.y.weight": SHARE * of_y["sd"][0] * sides[None],
        "guide.rows.0.bias": SHARE * (of_y["mean"][0] - 0.7 * of_x["mean"][0]) * sides,
        "guide.rows.end.weight": torch.stack([sides, 0 * sides], 1),
        "guide.rows.end.bias": torch.tensor([0.0, 10 * math.atanh(0.1 * math.log(SD))], dtype=F64),
    }
    known = (*(Column(name, "float64") for name in ("x", "y")), Column("row_id", "int64"))
    return Posterior(inference, inference.parameters.flatten(values), rows, Index(known, (), 0, "train"))


def test_latents_are_those_of_the_encoder(fitted):
    found = fitted.latents(TABLE, draws=1000)["u"]
    np.testing.assert_allclose(found.mean, MEAN, atol=1e-9)  # draws come in pairs
    np.testing.assert_allclose(found.sd, SD, rtol=0.1)
    assert fitted.sample(3).keys() == {"b"}
    assert [site.name for site in fitted.summary()] == ["b"]
    assert not fitted.parameters()


def test_a_saved_posterior_knows_the_columns_as_they_were(fitted, tmp_path):
    """Its few rows have other means and sds than those that the encoder was made with."""
    few = Posterior(fitted.inference, fitted.theta, fitted.rows.at(torch.arange(3)), fitted.index)
    few.save(tmp_path / "a.pt")
    again = Posterior.load(tmp_path / "a.pt", effects)
    assert again.inference.rows.facts == fitted.inference.rows.facts
    np.testing.assert_array_equal(again.latents(TABLE)["u"].mean, fitted.latents(TABLE)["u"].mean)


def test_predictions_are_given_the_row_or_from_the_prior(fitted):
    given = fitted.predict(TABLE, 600)["y"]
    np.testing.assert_allclose(given.mean, 0.7 * X + MEAN, atol=5 * SD / math.sqrt(600))
    np.testing.assert_allclose(given.sd, math.sqrt(SD**2 + NOISE**2), rtol=0.1)
    prior = fitted.predict(TABLE, 600, latents="prior")["y"]
    with pytest.warns(UserWarning, match="no column y"):
        new = fitted.predict({"x": TABLE["x"]}, 600)["y"]
    for each in (prior, new):
        np.testing.assert_allclose(each.mean, 0.7 * X, atol=5 / math.sqrt(600))
        np.testing.assert_allclose(each.sd, math.sqrt(1 + NOISE**2), rtol=0.1)
    with pytest.warns(UserWarning, match="no column y"), pytest.raises(UserError, match="has to be given"):
        fitted.predict({"x": TABLE["x"]}, 10, latents="posterior")


def test_latents_need_what_is_observed(fitted):
    with pytest.warns(UserWarning, match="no column y"), pytest.raises(UserError, match="has to be given"):
        fitted.latents({"x": TABLE["x"]})
