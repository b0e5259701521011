"""Varying slopes: its density in both parametrisations, its dtypes, its rows, and many groups."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from model_tools import check_dtype_and_device, check_rows_are_reproducible, draw, latents, log_joint
from scipy import stats

from trainer.errors import UserError
from trainer.models.hierarchical import VaryingSlopes

MODEL = VaryingSlopes(groups=5, slopes=2, mean_sd=1.7, scale_sd=0.9, noise_prior_sd=2.5)
BOTH = [MODEL, replace(MODEL, centered=True)]


def point(seed: int) -> tuple[dict, dict]:
    """Random values of every site, `effect` and `deviation` both, and a batch in which group 4 has no row."""
    rng = np.random.default_rng(seed)
    mean, scale, deviation = rng.normal(size=3), rng.uniform(0.2, 2, 3), rng.normal(size=(5, 3))
    sites = {"mean": mean, "scale": scale, "sigma": rng.uniform(0.2, 2), "deviation": deviation}
    columns = {"x": rng.normal(size=(40, 2)), "group": rng.integers(0, 4, 40), "y": rng.normal(size=40)}
    return sites | {"effect": mean + scale * deviation}, columns


@pytest.mark.parametrize("model", BOTH, ids=["non-centered", "centered"])
@pytest.mark.parametrize("seed", range(3))
def test_log_joint_is_the_density(model, seed):
    sites, columns = point(seed)
    x, group, effect = columns["x"], columns["group"], sites["effect"]
    expected = stats.norm(0, 1.7).logpdf(sites["mean"]).sum() + stats.halfnorm(scale=0.9).logpdf(sites["scale"]).sum()
    expected += stats.halfnorm(scale=2.5).logpdf(sites["sigma"])
    for row in range(len(x)):
        at = effect[group[row], 0] + x[row] @ effect[group[row], 1:]
        expected += stats.norm(at, sites["sigma"]).logpdf(columns["y"][row])
    if model.centered:
        expected += stats.norm(sites["mean"], sites["scale"]).logpdf(effect).sum()
    else:
        expected += stats.norm(0, 1).logpdf(sites["deviation"]).sum()
    own = {name: value for name, value in sites.items() if name != ("deviation" if model.centered else "effect")}
    torch.testing.assert_close(log_joint(model, own, columns).item(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", BOTH, ids=["non-centered", "centered"])
def test_dtype_and_device(model, dtype):
    check_dtype_and_device(model, draw(model, 6)[1], dtype)


@pytest.mark.parametrize("model", BOTH, ids=["non-centered", "centered"])
def test_rows_are_reproducible(model):
    check_rows_are_reproducible(model)


def test_both_parametrisations_make_the_same_rows():
    non_centered, centered = (draw(model, 50)[1] for model in BOTH)
    assert all(np.array_equal(non_centered[name], centered[name]) for name in centered)


def test_least_squares_within_groups_recovers_the_effects():
    model = BOTH[1]
    truth, columns = draw(model, 20_000)
    assert columns["group"].dtype == np.int64
    for group in range(5):
        rows = columns["group"] == group
        design = np.column_stack([np.ones(rows.sum()), columns["x"][rows]]).astype(float)
        ols, residual = np.linalg.lstsq(design, columns["y"][rows], rcond=None)[:2]
        np.testing.assert_allclose(ols, truth["effect"][group], atol=5 * truth["sigma"] / np.sqrt(rows.sum()))
        np.testing.assert_allclose(residual / rows.sum(), truth["sigma"] ** 2, rtol=0.1)


def test_a_hundred_thousand_groups():
    model = VaryingSlopes(groups=100_000)
    columns = draw(model, 256)[1]
    assert latents(model, columns)["deviation"] == (100_000, 2)


@pytest.mark.parametrize("groups", [None, 0])
def test_the_number_of_groups_must_be_given(groups):
    with pytest.raises(UserError, match=r"model\.groups="):
        VaryingSlopes(groups=groups)
