"""How long a run trains and where its rounds end: whatever the plan, by the rules that they keep."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
from app_tools import config
from omegaconf import OmegaConf

from trainer.training.budget import Begun, moved, optimizer_of, update_of


def plan_of(steps_per_epoch):
    """As much of a plan as is asked for, of so many steps an epoch."""
    return SimpleNamespace(
        steps_per_epoch=steps_per_epoch, step_after=lambda epochs: -(-round(epochs * steps_per_epoch * 1000) // 1000)
    )


@pytest.fixture(scope="module")
def made():
    """`made(steps_per_epoch=…, OPTION=…)`: the update of a config with these options."""
    plain = config("train", "data.path=x")

    def make(steps_per_epoch=10, begun=None, budget=None, **options):
        cfg = replace(plain, budget=replace(plain.budget, **(budget or {})), **options)
        return update_of(cfg, plan_of(steps_per_epoch), whitened=False, anchored=0, begun=begun)

    return make


@pytest.mark.parametrize(
    ("options", "horizon"),
    [
        ({"max_steps": 700}, 700),
        ({"max_epochs": 12.0}, 120),
        ({"max_epochs": 1.5}, 15),
        ({"max_steps": 100, "max_epochs": 12.0}, 100),
        ({"max_steps": 200, "max_epochs": 12.0}, 120),
        ({"budget": {"steps": 900, "epochs": 5}}, 900),
        ({"budget": {"steps": 10, "epochs": 50}}, 500),
    ],
)
def test_the_end_is_the_nearer_limit_or_the_larger_budget(made, options, horizon):
    assert made(**options).horizon == horizon


@pytest.mark.parametrize(
    ("steps", "epoch"), [(1, 10), (449, 10), (450, 10), (1050, 10), (4500, 10), (4500, 400), (9999, 1)]
)
def test_each_round_is_twice_the_one_before_and_none_is_short(made, steps, epoch):
    """Of 150 steps and an epoch or more; as many as fit."""
    rounds = made(epoch, max_steps=steps, rounds=4).rounds
    assert rounds[0].start == 0
    assert rounds[-1].horizon == steps
    assert all(one.horizon == two.start for one, two in pairwise(rounds))
    lengths = [each.horizon - each.start for each in rounds]
    least = max(150, epoch)
    assert len(lengths) == max(n for n in (1, 2, 3, 4) if n == 1 or (2**n - 1) * least <= steps)
    for one, two in pairwise(lengths):
        assert abs(two - 2 * one) <= 2
    assert len(lengths) == 1 or min(lengths) >= least


@pytest.mark.parametrize("epoch", [1, 7, 100, 10_000])
@pytest.mark.parametrize("averaging", [0, 0.25, 0.9])
def test_the_last_share_of_a_round_is_averaged_in_whole_epochs_where_it_has_one(made, epoch, averaging):
    for each in made(epoch, max_steps=3333, rounds=3, averaging=averaging).rounds:
        length, share = each.horizon - each.average_from, (each.horizon - each.start) * averaging
        assert length <= share
        assert length % epoch == 0 if share >= epoch else length == int(share)
        assert share - length < max(epoch, 1)


def test_rounds_end_where_local_steps_are_averaged(made):
    update = made(max_steps=4500, program=OmegaConf.create({"sync_every": 16}))
    assert len(update.rounds) > 2
    assert [each.horizon % 16 for each in update.rounds[:-1]] == [0] * (len(update.rounds) - 1)
    assert update.horizon == 4500


def test_what_is_past_stays_and_the_rest_is_stretched():
    begun = Begun(400, [100, 400, 700, 1000])
    assert moved(begun, 1000) == [100, 400, 700]
    assert moved(begun, 1600) == [100, 400, 1000]
    assert moved(begun, 500) == [100, 400, 450]
    assert moved(Begun(0, [100]), 50) == []


@pytest.mark.parametrize("step", [0, 99, 100, 555, 999])
@pytest.mark.parametrize("horizon", [1000, 1001, 12_345])
def test_ends_keep_their_order(step, horizon):
    ends = [100, 300, 700]
    found = moved(Begun(step, [*ends, 1000]), horizon)
    assert found == sorted(found)
    assert all(new == old for new, old in zip(found, ends) if old <= step)
    assert all(step < new <= horizon for new, old in zip(found, ends) if old > step)


def test_a_run_that_goes_on_with_another_end(made):
    begun = Begun(1000, [300, 1000])
    rounds = made(max_steps=1500, begun=begun).rounds
    assert [(each.start, each.horizon) for each in rounds] == [(0, 300), (300, 1500)]
    shorter = made(max_steps=600, begun=Begun(500, [300, 1000])).rounds
    assert [(each.start, each.horizon) for each in shorter] == [(0, 300), (300, 600)]
    before = made(max_steps=200, begun=Begun(100, [300, 1000])).rounds
    assert [each.horizon for each in before] == [100 + 200 * 100 // 900, 200]


def test_what_the_optimizer_leaves_open_is_the_recipes():
    cfg = config("train", "data.path=x")
    given = replace(cfg, optimizer=OmegaConf.create({**cfg.optimizer, "lr": 0.5}))
    for whitened, rates in ((True, cfg.rates.whitened), (False, cfg.rates.plain)):
        found, kept = optimizer_of(cfg, whitened), optimizer_of(given, whitened)
        assert (found.lr, found.beta2) == (rates.lr, rates.beta2)
        assert (kept.lr, kept.beta2) == (0.5, rates.beta2)
    assert cfg.optimizer.lr is None
    assert cfg.rates.whitened != cfg.rates.plain
