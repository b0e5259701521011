"""Poisson regression: its density with and without an exposure, its dtypes and its rows."""

import numpy as np
import pytest
import torch
from model_tools import check_dtype_and_device, check_rows_are_reproducible, draw, log_joint
from scipy import stats

from trainer.models.poisson import PoissonRegression

MODEL = PoissonRegression(features=3, weight_sd=1.7, intercept_sd=0.6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [np.float64, np.int64])
@pytest.mark.parametrize("exposed", [True, False])
def test_log_joint_is_the_density(seed, kind, exposed):
    rng = np.random.default_rng(seed)
    x, y, exposure = rng.normal(size=(40, 3)), rng.poisson(2.0, 40), rng.uniform(0.1, 5, 40)
    weight, intercept = 0.5 * rng.normal(size=3), rng.normal()
    rate = np.exp(intercept + x @ weight) * (exposure if exposed else 1)
    expected = stats.norm(0, 1.7).logpdf(weight).sum() + stats.norm(0, 0.6).logpdf(intercept)
    expected += stats.poisson(rate).logpmf(y).sum()
    columns = {"x": x, "y": y.astype(kind)} | ({"exposure": exposure} if exposed else {})
    found = log_joint(MODEL, {"weight": weight, "intercept": intercept}, columns)
    torch.testing.assert_close(found.item(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("names", [("x", "y"), ("x", "y", "exposure")])
def test_dtype_and_device(dtype, names):
    columns = draw(MODEL, 6)[1]
    check_dtype_and_device(MODEL, {name: columns[name] for name in names}, dtype)


def test_rows_are_reproducible():
    check_rows_are_reproducible(MODEL)


def test_rows_follow_the_truth():
    """The score at the truth has mean zero and the Fisher information as its variance."""
    truth, columns = draw(MODEL, 20_000)
    design = np.column_stack([np.ones(20_000), columns["x"]]).astype(float)
    rate = columns["exposure"] * np.exp(design @ [truth["intercept"], *truth["weight"]])
    score, information = design.T @ (columns["y"] - rate), design.T @ (design * rate[:, None])
    assert (abs(score) < 4 * np.sqrt(information.diagonal())).all()
    assert (columns["exposure"] > 0).all()
