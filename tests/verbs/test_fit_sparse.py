"""From sparse matrices and lists to a posterior: the one of the dense table."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch

from trainer import Posterior, UserError, fit
from trainer.data.fields import RaggedRows
from trainer.data.packing.pack import pack
from trainer.data.shards.folder import open_split
from trainer.data.sources.memory import MemorySource
from trainer.inference.recipe.convergence import Rule
from trainer.models.linear import LinearRegression
from trainer.models.logistic import LogisticRegression
from trainer.models.poisson import PoissonRegression
from trainer.posterior.predictive import Asked

WIDTH, N = 12, 600
QUICK = {"program": "eager", "slots": 16, "draws": 2}
COMMON = {"dtype": "float64", "max_steps": 300, "batch_size": 128, "progress": False, "options": QUICK}


def words(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(WIDTH, dtype=x.dtype), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def visits(times, y=None):
    """A rate for each row, from the mean of its list."""
    slope = pyro.sample("slope", dist.Normal(times.values.new_zeros(()), 1.0))
    with pyro.plate("data", len(times)):
        mean = times.total(times.values) / times.lengths.clamp(min=1)
        pyro.sample("y", dist.Normal(slope * mean, 0.5), obs=y)


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    x = scipy.sparse.random(N, WIDTH, 0.2, "csr", random_state=1, data_rvs=lambda n: rng.integers(1, 6, n))
    return {"x": x, "y": x @ rng.normal(size=WIDTH) + 0.5 * rng.normal(size=N)}


@pytest.fixture(scope="module")
def fitted(table):
    return fit(words, table, **COMMON)


def test_the_posterior_is_that_of_the_dense_table_and_the_exact_one(table):
    dense = {"x": table["x"].toarray(), "y": table["y"]}
    fitted, want = (fit(words, each, **COMMON) for each in (table, dense))
    torch.testing.assert_close(fitted.theta, want.theta, rtol=0, atol=1e-10)
    assert fitted.metrics["elbo"] == pytest.approx(want.metrics["elbo"], abs=1e-8)
    x = dense["x"]
    precision = x.T @ x / 0.25 + np.eye(WIDTH)
    mean = np.linalg.solve(precision, x.T @ table["y"] / 0.25)
    (site,) = fitted.summary()
    assert np.abs(site.loc - mean).max() < 0.1 * site.scale.min()


def test_it_predicts_new_sparse_rows_and_shards_and_is_the_same_when_loaded(table, fitted, tmp_path):
    new = {"x": table["x"][:5]}
    found = fitted.predict(new, num_draws=40)["y"]
    assert np.abs(found.mean - table["x"][:5] @ fitted.summary()[0].mean).max() < 0.2
    fitted.save(tmp_path / "p")
    again = Posterior.load(tmp_path / "p", words)
    assert np.array_equal(again.predict(new, num_draws=40)["y"].mean, found.mean)
    pack(MemorySource(table), tmp_path / "shards", held_out=0)
    folder = open_split(tmp_path / "shards", "train")
    assert fitted.predict(folder, num_draws=2)["y"].mean.shape == (N,)


@pytest.mark.parametrize("model", [LinearRegression(), LogisticRegression(), PoissonRegression()])
def test_the_regressions_of_the_zoo_take_sparse_rows_for_dense_ones(model, table):
    y = (table["y"] > 0).astype(float)
    short = {**COMMON, "max_steps": 40}
    found, want = (fit(model, {"x": x, "y": y}, **short) for x in (table["x"], table["x"].toarray()))
    torch.testing.assert_close(found.theta, want.theta, rtol=1e-9, atol=1e-9)  # the start is searched for
    assert found.metrics["elbo"] == pytest.approx(want.metrics["elbo"], rel=1e-9)


def test_rows_of_shards_are_predicted_by_their_numbers_and_another_width_is_refused(table, fitted, tmp_path):
    new = table["x"][100:150]
    pack(MemorySource({"x": new}), tmp_path / "shards", held_out=0, float_dtype="float64")
    folder = open_split(tmp_path / "shards", "train")
    parts = fitted.predictions(folder, Asked(20))
    found = {int(row): mean for rows, each in parts for row, mean in zip(rows, each["y"].mean)}
    want = fitted.predict({"x": new}, num_draws=20)["y"].mean
    np.testing.assert_allclose([found[row] for row in range(50)], want, rtol=1e-10)
    with pytest.raises(UserError, match="13 columns where the packed table has 12"):
        fitted.predict({"x": scipy.sparse.csr_matrix((3, WIDTH + 1))})


def test_a_weight_is_one_number_a_row(table):
    with pytest.raises(UserError, match='column "weight" holds'):
        fit(words, {**table, "weight": table["x"]}, **COMMON)


def test_lists_of_any_length(table):
    rng = np.random.default_rng(2)
    lengths = rng.integers(0, 5, N)
    times = RaggedRows(np.concatenate([[0], lengths.cumsum()]), rng.normal(1.0, 1.0, lengths.sum()))
    means = np.array([times.values[a:b].mean() if b > a else 0.0 for a, b in zip(times.offsets, times.offsets[1:])])
    y = 2.0 * means + 0.5 * rng.normal(size=N)
    found = fit(visits, {"times": times, "y": y}, **COMMON)
    (site,) = found.summary()
    precision = (means**2).sum() / 0.25 + 1
    assert abs(float(site.loc) - (means @ y) / 0.25 / precision) < 0.05 / np.sqrt(precision)
    assert float(site.scale) == pytest.approx(1 / np.sqrt(precision), rel=Rule().scale_error)
