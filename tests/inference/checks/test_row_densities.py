"""Latents of rows that have no integral are refused before anything is trained, by their site and their rows."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from svi_problems import F64, batch_of, build

from trainer.errors import UserError
from trainer.inference.checks.row_densities import check_row_densities
from trainer.inference.model.plates import PlatedModel
from trainer.inference.rows.marginal import without_latents_of_rows
from trainer.inference.setup import mean_field

ONE = torch.ones((), dtype=F64)
Y = (torch.arange(300) % 3 == 0).double()
FLAT = dist.ImproperUniform(constraints.real, (), ())


def of_rows(prior, likelihood):
    """Rows of two latents, of which the first is right."""

    def model(y):
        b = pyro.sample("b", dist.Normal(0 * ONE, 1.0))
        with pyro.plate("data", len(y)):
            v = pyro.sample("v", dist.Normal(0 * ONE, 1.0))
            u = pyro.sample("u", prior)
            pyro.sample("y", likelihood(b + v, u), obs=y)

    return model


def improper_in(rows):
    """A latent that nothing bounds in some rows."""

    def model(y):
        b = pyro.sample("b", dist.Normal(0 * ONE, 1.0))
        with pyro.plate("data", len(y)):
            u = pyro.sample("u", FLAT)
            seen = torch.where(y > rows, u, 0.0)
            pyro.sample("y", dist.StudentT(4.0, b + seen, 1.0), obs=y)

    return model


def checked(model, y=Y):
    batch = batch_of(y=y)
    check_row_densities(without_latents_of_rows(PlatedModel(model, ("y",)), batch), batch)


@pytest.mark.parametrize(
    "model",
    [
        of_rows(FLAT, lambda mean, u: dist.Normal(mean + 0 * u, 1.0)),
        of_rows(FLAT, lambda mean, u: dist.Bernoulli(logits=mean + u)),
    ],
    ids=["no data, in closed form", "data that push it on"],
)
def test_an_improper_latent_is_refused(model):
    with pytest.raises(UserError, match='site "u" cannot be integrated out of 256 of the first 256 rows: its density'):
        build(model, mean_field, y=Y)


def test_two_values_that_do_equally_well_are_refused():
    model = of_rows(dist.Normal(0 * ONE, 1.0), lambda mean, u: dist.Normal(mean + 9 * u**2, 0.1))
    with pytest.raises(UserError, match=r'site "u" cannot.*curvature of its density is not positive.*\(HalfNormal\)'):
        checked(model, Y + 4)


def test_a_row_in_a_hundred_may_be_so():
    checked(improper_in(0.5), torch.arange(256, dtype=F64) - 1)  # two rows
    with pytest.raises(UserError, match='"u" cannot be integrated out of 3 of the first 256 rows'):
        checked(improper_in(0.5), torch.arange(256, dtype=F64) - 2)


@pytest.mark.parametrize(
    "prior",
    [dist.Cauchy(0 * ONE, 1.0), dist.Normal(0 * ONE, 1e4), dist.Gamma(2 * ONE, 1.0), dist.Beta(0.5 * ONE, 0.5)],
    ids=lambda prior: type(prior).__name__,
)
def test_proper_latents_pass(prior):
    checked(of_rows(prior, lambda mean, u: dist.Bernoulli(logits=mean + u)))


def test_models_that_cannot_run_are_left_to_other_checks():
    def model(y):
        pyro.sample("b", dist.Normal(0 * ONE, 1.0))
        with pyro.plate("data", len(y)):
            u = pyro.sample("u", dist.Normal(0 * ONE, 1.0))
            pyro.sample("y", dist.Normal(torch.stack([u, u]).sum(0)[: 2 * int(y.sum())], 1.0), obs=y)

    checked(model)
    checked(lambda y: None)


def test_globals_stand_at_zero_whatever_their_priors():
    """Drawn from so wide a prior, the sd of a row's response would be 0, and an improper one cannot be drawn from."""

    def wide(y):
        log_sd = pyro.sample("log_sd", dist.Normal(0 * ONE, 1e4))
        with pyro.plate("data", len(y)):
            u = pyro.sample("u", dist.Normal(0 * ONE, 1.0))
            pyro.sample("y", dist.Normal(u, log_sd.exp()), obs=y)

    def flat(y):
        b = pyro.sample("b", FLAT)
        with pyro.plate("data", len(y)):
            u = pyro.sample("u", FLAT)
            pyro.sample("y", dist.Bernoulli(logits=b + u), obs=y)

    for seed in range(4):
        torch.manual_seed(seed)
        checked(wide)
    with pytest.raises(UserError, match='latent site "u" cannot be integrated out of'):
        checked(flat)
