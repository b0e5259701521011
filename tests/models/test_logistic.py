"""Logistic regression: its density, its dtypes and its rows."""

import numpy as np
import pytest
import torch
from model_tools import check_dtype_and_device, check_rows_are_reproducible, draw, log_joint
from scipy import special, stats

from trainer.models.logistic import LogisticRegression

MODEL = LogisticRegression(features=3, weight_sd=1.7, intercept_sd=0.6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [np.float64, np.int64, np.bool_])
def test_log_joint_is_the_density(seed, kind):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(40, 3)), rng.integers(0, 2, 40)
    weight, intercept = rng.normal(size=3), rng.normal()
    expected = stats.norm(0, 1.7).logpdf(weight).sum() + stats.norm(0, 0.6).logpdf(intercept)
    expected += stats.bernoulli(special.expit(intercept + x @ weight)).logpmf(y).sum()
    found = log_joint(MODEL, {"weight": weight, "intercept": intercept}, {"x": x, "y": y.astype(kind)})
    torch.testing.assert_close(found.item(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_device(dtype):
    check_dtype_and_device(MODEL, draw(MODEL, 6)[1], dtype)


def test_rows_are_reproducible():
    check_rows_are_reproducible(MODEL)


def test_rows_follow_the_truth():
    """The score at the truth has mean zero and the Fisher information as its variance."""
    truth, columns = draw(MODEL, 20_000)
    design = np.column_stack([np.ones(20_000), columns["x"]]).astype(float)
    p = special.expit(design @ [truth["intercept"], *truth["weight"]])
    score, information = design.T @ (columns["y"] - p), design.T @ (design * (p * (1 - p))[:, None])
    assert (abs(score) < 4 * np.sqrt(information.diagonal())).all()
    assert set(np.unique(columns["y"])) == {0.0, 1.0}
