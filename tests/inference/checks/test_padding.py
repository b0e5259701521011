"""Places that only fill rows up may not count: found by other values there, whatever way the model is written."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from svi_problems import F64

from trainer.errors import UserError
from trainer.inference.model.plates import Batch
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.setup import mean_field, set_up

LENGTH = torch.tensor([3, 1, 2, 3])
Y = torch.arange(12, dtype=F64).view(4, 3)
Y = torch.where(torch.arange(3) < LENGTH[:, None], Y, Y.gather(1, LENGTH[:, None] - 1))  # as packing fills them up


def checked(model, length=LENGTH, y=Y):
    set_up(model, mean_field, Batch.whole({"y": y, "length": length}), 4, ELBO(), grouped=True)


def level():
    return pyro.sample("level", dist.Normal(torch.zeros((), dtype=F64), 3.0))


def counting(y):
    a = level()
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a.expand(3), 1.0).to_event(1), obs=y)


def in_another_plate(y):
    a = level()
    with pyro.plate("data", len(y), dim=-2), pyro.plate("visits", 3, dim=-1):
        pyro.sample("y", dist.Normal(a, 1.0), obs=y)


def in_entries(y):
    a = level()
    with pyro.plate("data", len(y), dim=-2), pyro.plate("entries", 3, dim=-1):
        pyro.sample("y", dist.Normal(a, 1.0), obs=y)


def masked(y, length):
    a = level()
    with pyro.plate("data", len(y)):
        real = torch.arange(3) < length[:, None]
        pyro.sample("y", dist.Normal(a.expand(len(y), 3), 1.0).mask(real).to_event(1), obs=y)


def chained(y, length):
    a = level()
    with pyro.plate("data", len(y)):
        for t in pyro.markov(range(3)):
            with poutine.mask(mask=t < length):
                before = y[:, t - 1] if t else 0.0
                pyro.sample(f"y_{t}", dist.Normal(a + 0.5 * before, 1.0), obs=y[:, t])


def of_the_first(y):
    a = level()
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a, 1.0), obs=y[:, 0])


@pytest.mark.parametrize("model", [counting, in_another_plate])
def test_what_fills_rows_up_is_refused_where_it_counts(model):
    with pytest.raises(UserError, match=r'site "y" counts places that only fill a row up \(column "length".*"entries"'):
        checked(model)


@pytest.mark.parametrize("model", [in_entries, masked, chained, of_the_first])
def test_a_model_that_leaves_it_out_passes(model):
    checked(model)


def test_rows_of_one_length_have_nothing_that_fills_them_up():
    checked(counting, torch.full((4,), 3))
