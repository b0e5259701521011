"""Enumerations beyond memory are refused with their numbers before any state is evaluated."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from svi_problems import F64, batch_of, build

from trainer.errors import UserError
from trainer.inference.checks import enumeration
from trainer.inference.checks.enumeration import refuse_large
from trainer.inference.model.plates import PlatedModel
from trainer.inference.rows.marginal import without_latents_of_rows
from trainer.inference.setup import mean_field

ONE = torch.ones((), dtype=F64)
Y = torch.randn(20, 4, dtype=F64, generator=torch.Generator().manual_seed(0))


def pair(first, second):
    def model(y):
        b = pyro.sample("b", dist.Normal(0 * ONE, 1.0))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(torch.ones(first, dtype=F64)))
            j = pyro.sample("j", dist.Categorical(torch.ones(second, dtype=F64)))
            pyro.sample("y", dist.Normal(b + k + j / second, 1.0), obs=y[:, 0])

    return model


def chain(y):
    """Of 5^12 joint states, of which two times meet."""
    b = pyro.sample("b", dist.Normal(0 * ONE, 1.0))
    with pyro.plate("data", len(y)):
        state = 0
        for t in pyro.markov(range(12)):
            state = pyro.sample(f"z_{t}", dist.Categorical(torch.eye(5, dtype=F64)[state] + 0.1))
            pyro.sample(f"y_{t}", dist.Normal(b + state, 1.0), obs=y[:, t % 4])


def numbers(model):
    batch = batch_of(y=Y)
    return without_latents_of_rows(PlatedModel(model, ("y",)), batch).numbers


def test_the_numbers_of_a_row_are_those_of_states_that_meet():
    assert numbers(pair(90, 100)) == 90 * 100
    assert numbers(pair(3, 2)) == 1  # little enough
    assert 25 <= numbers(chain) <= 5**3


def test_what_does_not_fit_is_refused_before_it_is_made():
    told = r"summing out k, j takes 3,000,000,000 states x 20 rows x 8 bytes = 447.0 GiB at once, and .* fewer states"
    with pytest.raises(UserError, match=told):
        build(pair(60_000, 50_000), mean_field, y=Y)


def test_the_rows_of_a_step_are_too_many(monkeypatch):
    monkeypatch.setattr(enumeration, "memory_share", lambda ranks: 2**30 // ranks)
    model = without_latents_of_rows(PlatedModel(pair(90, 100), ("y",)), batch_of(y=Y))
    assert model.copies > 8  # a start takes the fewer rows
    refuse_large(model, 14_000, F64, "")
    with pytest.raises(UserError, match=r"9,000 states x 14,000 rows x 8 bytes = 961\.3 MiB.* up to 7,456 rows"):
        refuse_large(model, 14_000, F64, "up to {fit:,} rows", 2)
    refuse_large(PlatedModel(pair(90, 100), ("y",)), 10**9, F64, "")  # which has nothing summed out
