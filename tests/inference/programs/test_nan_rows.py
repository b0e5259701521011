"""Rows whose terms are not finite are found by halving: all of them, up to a few, and no other."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from svi_problems import F64, build, chunk_of

from trainer.inference.optim.optimizers import Adam
from trainer.inference.optim.rounds import one_round
from trainer.inference.optim.schedules import Constant
from trainer.inference.programs.local_steps import LocalSteps
from trainer.inference.programs.nan_rows import _halved, nan_rows
from trainer.inference.programs.program import Eager, Program


@pytest.mark.parametrize("bad", [set(), {0}, {6}, {2, 3}, {0, 3, 6}, set(range(7))])
def test_halving_finds_the_bad_rows_and_no_others(bad):
    asked = []

    def is_bad(rows):
        asked.append(rows)
        return not bad.isdisjoint(rows)

    assert _halved(is_bad, list(range(7)), at_most=7) == sorted(bad)
    assert set(_halved(is_bad, list(range(7)), at_most=2)) <= bad
    assert len(_halved(is_bad, list(range(7)), at_most=2)) == min(2, len(bad))
    assert all(asked)


def regression(x, y=None):
    w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)


@pytest.mark.parametrize("make", [Eager, functools.partial(LocalSteps, program=Eager, sync_every=2)])
def test_every_program_names_the_slot_and_the_row(make):
    """By its own reference; the row is the fourth of the second group, at the third step of four."""
    inference, theta = build(regression, x=torch.randn(8, dtype=F64), y=torch.randn(8, dtype=F64))
    chunk = chunk_of(4, 2, 6, x=(), y=())
    chunk.columns["y"][2, 1, 3] = math.nan
    update = one_round(Adam(lr=0.01), Constant(), 4, 4)
    program: Program = make(inference, update, 0, [0, 1])
    assert nan_rows(program.reference, update.init(theta), chunk) == (2, [(1, 3)])
