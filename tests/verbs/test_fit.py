"""`fit` from Python: the same answer from every kind of table, no file left behind, and what a Posterior can do."""

import io
import re
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from rich.console import Console

import trainer
from trainer import Posterior, ShardFolder, UserError, fit
from trainer.data.packing.pack import pack
from trainer.engine.progress import _can_show
from trainer.inference.estimates.full_gradient import FEW, MANY
from trainer.inference.recipe.newton import Polished
from trainer.posterior.summary import SiteSummary, between_seeds

N, NOISE = 256, 0.5
FOUR = {"x": np.ones((4, 3)), "y": np.ones(4)}
PAIRS = {"program": "eager", "slots": 64, "optimizer.lr": 0.03, "objective.pairs": 4}
QUICK = {"program": "eager", "slots": 64, "optimizer.lr": 0.05}


def regression(x, y=None):
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


def by_group(group, y=None):
    with pyro.plate("groups", 3):
        level = pyro.sample("level", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(group)):
        pyro.sample("y", dist.Normal(level[group], NOISE), obs=y)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    x = np.linalg.qr(rng.normal(size=(N, 3)))[0] * np.sqrt(N)
    y = x @ np.array([1.0, -1.0, 0.5]) + NOISE * rng.normal(size=N)
    return pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "c": x[:, 2], "y": y})


COLUMNS = {"x": ["a", "b", "c"], "y": "y"}


def guide_of(sites):
    """loc and scale [D] of all sites."""
    return tuple(np.concatenate([np.ravel(getattr(site, name)) for site in sites]) for name in ("loc", "scale"))


def quick_fit(data, model=regression, **more):
    more = {"max_steps": 400, "dtype": "float64", "progress": False, **more}
    return fit(model, data, options=QUICK, **more)


@pytest.fixture(scope="module")
def fitted(table: pd.DataFrame) -> Posterior:
    return fit(regression, table, columns=COLUMNS, dtype="float64", max_steps=1500, progress=False, options=PAIRS)


def exact(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Mean and mean-field sd of w (its precision is diagonal here)."""
    x = table[["a", "b", "c"]].to_numpy()
    precision = x.T @ x / NOISE**2 + np.eye(3) / 4
    return np.linalg.solve(precision, x.T @ table["y"].to_numpy() / NOISE**2), 1 / np.sqrt(np.diag(precision))


def test_the_answer_is_the_exact_one(fitted, table):
    mean, sd = exact(table)
    (w,) = fitted.summary()
    assert np.abs(w.mean - mean).max() < 0.1 * sd.min()
    np.testing.assert_allclose(w.sd, sd, rtol=0.03)
    assert fitted.metrics["stop_reason"] == "converged"
    assert "w" in str(fitted)


def test_every_kind_of_table_gives_the_same_bits(fitted, table, tmp_path):
    arrow = pa.Table.from_pandas(table)
    pq.write_table(arrow, tmp_path / "table.parquet")
    pack(tmp_path / "table.parquet", tmp_path / "shards", columns=COLUMNS, held_out=0.0, float_dtype="float64")
    arrays = {name: table[name].to_numpy() for name in table}
    files = [tmp_path / "table.parquet", str(tmp_path / "table.parquet")]
    whole = {"x": torch.tensor(table[["a", "b", "c"]].to_numpy()), "y": torch.tensor(table["y"].to_numpy())}
    packed = [tmp_path / "shards", ShardFolder(tmp_path / "shards" / "train")]
    wanted = quick_fit(table, columns=COLUMNS, max_steps=20).theta
    for data in (arrow, arrays, pl.from_arrow(arrow), *files):
        assert torch.equal(quick_fit(data, columns=COLUMNS, max_steps=20).theta, wanted)
    for data in (whole, *packed):
        assert torch.equal(quick_fit(data, max_steps=20).theta, wanted)


def test_no_file_is_left_behind_and_the_process_is_as_before(table, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = torch.get_default_dtype(), torch.get_num_threads()
    quick_fit(table, columns=COLUMNS, max_steps=5)
    assert not list(tmp_path.iterdir())
    assert (torch.get_default_dtype(), torch.get_num_threads()) == before


def test_a_run_folder_stays_where_it_was_asked_for(table, tmp_path):
    quick_fit(table, columns=COLUMNS, max_steps=5, run_dir=tmp_path / "run")
    assert {"metrics.json", "summary.csv", "checkpoints"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_in_a_notebook_the_posterior_is_its_table(fitted):
    assert "posterior" in repr(fitted)
    assert "\x1b" not in repr(fitted)
    assert [line.split()[0] for line in repr(fitted).splitlines() if line.startswith("w ")] == ["w"]


@pytest.mark.parametrize(("terminal", "jupyter", "shown"), [(True, False, 1), (False, True, 1), (False, False, 0)])
def test_a_bar_is_drawn_on_a_terminal_and_in_a_notebook(terminal, jupyter, shown, monkeypatch):
    monkeypatch.setattr("trainer.engine.progress.find_spec", lambda name: name)
    console = Console(file=io.StringIO(), force_terminal=terminal, force_jupyter=jupyter)
    assert _can_show(console) == shown


def test_draws_have_the_moments_of_the_summary(fitted):
    (w,) = fitted.summary()
    draws = fitted.sample(800)["w"]
    assert draws.shape == (800, 3)
    assert np.abs((draws.mean(0) - w.mean) / w.sd).max() < 5 / np.sqrt(800)
    assert np.abs(np.log(draws.std(0) / w.sd)).max() < 5 / np.sqrt(2 * 800)
    assert np.array_equal(fitted.sample(3)["w"], draws[:3])
    assert not np.array_equal(fitted.sample(3, seed=1)["w"], draws[:3])


def test_predictions_of_new_rows(fitted, table):
    """Mean x'm and variance NOISE^2 + sum x^2 s^2, on more rows than one batch, which have no y."""
    (w,) = fitted.summary()
    rows = pd.concat([table[["c", "b", "a"]]] * 9, ignore_index=True)  # in another order, 2,304 rows
    found = fitted.predict(rows, num_draws=400)["y"]
    x = rows[["a", "b", "c"]].to_numpy()
    spread = np.sqrt((x**2) @ w.sd**2)
    assert found.mean.shape == found.sd.shape == (2304,)
    assert np.abs((found.mean - x @ w.mean) / spread).max() < 5 / np.sqrt(400)
    np.testing.assert_allclose(found.sd, np.sqrt(NOISE**2 + spread**2), rtol=0.01)
    inside = (found.quantiles[0] < x @ w.mean) & (x @ w.mean < found.quantiles[2])
    assert inside.all()
    again = fitted.predict(rows, num_draws=400)["y"]
    assert all(np.array_equal(one, two) for one, two in zip(found, again))


def test_a_saved_posterior_comes_back(fitted, table, tmp_path):
    fitted.save(tmp_path / "fit.posterior")
    again = Posterior.load(tmp_path / "fit.posterior", regression)
    assert again.metrics == fitted.metrics
    assert np.array_equal(again.sample(5)["w"], fitted.sample(5)["w"])
    rows = table[["a", "b", "c"]].head(7)
    assert np.array_equal(again.predict(rows, 5)["y"].quantiles, fitted.predict(rows, 5)["y"].quantiles)
    assert [path.name for path in tmp_path.iterdir()] == ["fit.posterior"]

    def wider(x, y=None):
        pyro.sample("extra", dist.Normal(x.new_zeros(()), 1.0))
        regression(x, y)

    with pytest.raises(UserError, match="give the model and guide that were fitted"):
        Posterior.load(tmp_path / "fit.posterior", wider)
    with pytest.raises(UserError, match=r"no\.posterior does not exist"):
        Posterior.load(tmp_path / "no.posterior", regression)
    (tmp_path / "text").write_text("nothing of the kind")
    with pytest.raises(UserError, match="is not a saved posterior"):
        Posterior.load(tmp_path / "text", regression)


def test_codes_and_standardizing_are_those_of_the_fit(table):
    rng = np.random.default_rng(1)
    names = rng.choice(["low", "mid", "top"], 300)
    y = np.array([{"low": -1.0, "mid": 0.0, "top": 2.0}[name] for name in names])
    posterior = quick_fit({"group": names, "y": y + 0.1 * rng.normal(size=300)}, by_group)
    found = posterior.predict({"group": np.array(["top", "low"])}, num_draws=20)["y"]
    np.testing.assert_allclose(found.mean, [2.0, -1.0], atol=0.2)
    with pytest.raises(UserError, match="'group' holds 'new' in row 1"):
        posterior.predict({"group": np.array(["top", "new"])})
    scaled = quick_fit(table * [100, 10, 1, 1], columns=COLUMNS, standardise=["x"])  # as of 0.1
    far = scaled.predict((table * [100, 10, 1, 1]).drop(columns="y"), num_draws=20)["y"]
    assert np.corrcoef(far.mean, table["y"])[0, 1] > 0.9


def test_other_guides(table):
    posterior = quick_fit(table, guide=AutoNormal, columns=COLUMNS)
    mean, sd = exact(table)
    assert np.abs(posterior.sample(100)["w"].mean(0) - mean).max() < 6 * sd.max()
    assert posterior.predict(table.head(3), 10)["y"].mean.shape == (3,)


def test_several_seeds_say_whether_they_agree(table, capsys):
    posterior = quick_fit(table, columns=COLUMNS, seeds=2)
    assert posterior.rhat["w"].shape == (3,)
    assert posterior.rhat["w"].max() < 1.05
    early = quick_fit(table, columns=COLUMNS, seeds=2, max_steps=1, progress=True)
    assert early.rhat["w"].max() >= 1.0


def test_agreement_between_seeds_by_hand():
    def site(mean, sd):
        return [SiteSummary("z", (1,), np.array([mean]), np.array([sd]), np.zeros((3, 1)), None, None)]

    assert between_seeds([site(0.0, 1.0), site(0.0, 1.0)])["z"].tolist() == [1.0]
    np.testing.assert_allclose(between_seeds([site(0.0, 1.0), site(2.0, 2.0)])["z"], np.sqrt(1 + 2 / 2.5))


@pytest.mark.parametrize(
    ("data", "more", "message"),
    [
        ({"x": np.ones((4, 3)), "y": np.ones(5)}, {}, "differ in length .x 4, y 5."),
        ({"x": np.ones((4, 3)), "y": 1.0}, {}, "'y' of the data is a single value"),
        (
            {"x": np.ones((4, 3)), "y": [[1.0], [2.0, 3.0]] * 2},
            {},
            "give each entry of a list a row of its own, beside",
        ),
        ({}, {}, "the data have no columns"),
        ({"x": np.ones((0, 3)), "y": np.ones(0)}, {}, "the data have no rows"),
        ([1, 2], {}, "data of type list are no table"),
        ("nowhere.parquet", {}, "no file at 'nowhere.parquet'"),
        ({"x": np.ones((4, 3))}, {"model": lambda x, z: None}, 'needs an argument "z"'),
        (
            {"x": np.ones((4, 3)), "y": np.ones(4)},
            {"options": {"optimiser": "adam"}},
            "option optimiser is unknown .do you mean optimizer",
        ),
        (
            {"x": np.ones((4, 3)), "y": np.ones(4)},
            {"options": {"optimizer": "adan"}},
            "optimizer=adan is unknown",
        ),
        ({"x": np.ones((4, 3)), "y": np.ones(4)}, {"guide": "fullrank"}, "guide=fullrank is unknown"),
        ({"x": np.ones((4, 3)), "y": np.ones(4)}, {"seeds": 0}, "seeds=0 must be a whole number from 1 up"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(data, more, message):
    with pytest.raises(UserError, match=message):
        fit(more.pop("model", regression), data, progress=False, **more)


def test_packing_options_of_what_is_packed_are_refused(table, tmp_path):
    pack(trainer.data.sources.memory.MemorySource(table), tmp_path / "shards", columns=COLUMNS)
    with pytest.raises(UserError, match="packed already"):
        quick_fit(tmp_path / "shards", standardize=["x"])


def test_new_rows_that_lack_a_column_are_refused(fitted, table):
    with pytest.raises(UserError, match="'the data' has no column 'c': it has a, b"):
        fitted.predict(table[["a", "b"]])
    empty = table[["a", "b", "c"]].copy()
    empty.loc[5, "b"] = np.nan
    with pytest.raises(UserError, match="column 'b' has no value in row 5"):
        fitted.predict(empty)


def test_the_package_names_what_it_offers():
    assert {name: getattr(trainer, name).__name__ for name in trainer.__all__} == {
        name: name for name in trainer.__all__
    }
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = trainer.nothing
    assert Path(trainer.__file__).name == "__init__.py"


def test_a_weight_counts_a_row_that_many_times(table):
    """A table with weights 0 to 4 has the posterior and the ELBO of the table in which the rows stand that often."""
    times = np.random.default_rng(1).integers(0, 5, len(table))
    x, y = table[["a", "b", "c"]].to_numpy(), table["y"].to_numpy()
    long = quick_fit({"x": np.repeat(x, times, 0), "y": np.repeat(y, times)})
    short = quick_fit({"x": x, "y": y, "weight": times.astype(float)})
    for one, other in zip(long.summary(), short.summary(), strict=True):
        np.testing.assert_allclose(other.loc, one.loc, rtol=0, atol=1e-3 * one.scale.min())
        np.testing.assert_allclose(other.scale, one.scale, rtol=1e-3)
    assert short.metrics["elbo"] == pytest.approx(long.metrics["elbo"], abs=1e-3)
    assert short.metrics["elbo_per_row"] == pytest.approx(long.metrics["elbo_per_row"], rel=1e-6)
    assert short.predict({"x": x[:3]})["y"].mean.shape == (3,)
    with pytest.raises(UserError, match='column "weight" is -'):
        quick_fit({"x": x, "y": y, "weight": -times.astype(float)})


def takes_weight(x, weight, y=None):
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, NOISE / weight.sqrt()), obs=y)


def test_a_model_that_takes_the_weight_has_it_to_itself(table):
    """As the precision of a row, say: then a row counts once. An exposure or an offset is such an argument too."""
    x, y = table[["a", "b", "c"]].to_numpy(), table["y"].to_numpy()
    found = quick_fit({"x": x, "y": y, "weight": np.full(len(y), 4.0)}, takes_weight).summary()[0]
    precision = 4 * x.T @ x / NOISE**2 + np.eye(3) / 4
    np.testing.assert_allclose(found.scale, 1 / np.sqrt(np.diag(precision)), rtol=1e-3)


def school(group, y=None):
    """A hierarchy of known scales, in which the mean and the 300 effects are strongly correlated."""
    mean = pyro.sample("mean", dist.Normal(torch.zeros((), dtype=torch.float64), 10.0))
    with pyro.plate("groups", 300):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(group)):
        pyro.sample("y", dist.Normal(mean + effect[group], NOISE), obs=y)


@pytest.fixture(scope="module")
def pupils():
    rng = np.random.default_rng(5)
    group = np.arange(2400) % 300
    return {"group": group, "y": 3.0 + rng.normal(size=300)[group] + NOISE * rng.normal(size=2400)}


def school_optimum(group, y):
    """The exact mean-field optimum, mean first: means of the posterior, scales 1 / sqrt(diagonal of the precision)."""
    rows = np.concatenate([np.ones((len(group), 1)), np.eye(300)[group]], axis=1)
    precision = rows.T @ rows / NOISE**2 + np.diag(np.r_[10.0**-2, np.ones(300)])
    return np.linalg.solve(precision, rows.T @ y / NOISE**2), np.diag(precision) ** -0.5


def off_by(posterior, optimum):
    """Largest error of the locations in scales, and the largest of the effects' log scales."""
    loc, scale = guide_of(posterior.summary())
    return np.abs((loc - optimum[0]) / optimum[1]).max(), np.abs(np.log(scale / optimum[1])[1:]).max()


def test_with_many_latents_newton_steps_by_passes_end_a_round_at_the_optimum(pupils):
    """A hundred steps leave a Newton step of whole sds, along the ridge; with Newton steps nothing is left."""
    options = {**QUICK, "rounds": 1, "stop": "budget", "estimator": "plain"}

    def trained(newton_after):
        given = {**options, "newton_after": newton_after}
        return fit(school, pupils, dtype="float64", max_steps=100, batch_size=600, progress=False, options=given)

    optimum = school_optimum(**pupils)
    without, scales_without = off_by(trained(None), optimum)
    assert without > 1.0
    assert scales_without > 0.05
    found = trained(0)
    error, scales = off_by(found, optimum)
    assert error < 1e-3
    assert scales < 1e-6
    assert found.metrics["passes"] > 10


def test_with_many_latents_training_ends_when_newton_steps_leave_nothing_to_go(pupils, capsys):
    found = fit(school, pupils, dtype="float64", batch_size=600, options=QUICK)
    out = " ".join(capsys.readouterr().out.split())
    assert "Newton steps, in some dozens of passes over all rows" in out
    assert found.metrics["stop_reason"] == "converged"
    assert set(found.metrics["evidence"]) >= {"scale_error", "gradient"}
    assert off_by(found, school_optimum(**pupils))[0] < 0.05


def test_training_ends_where_draws_can_tell_no_more(pupils, capsys, monkeypatch):
    def nearly(inference, theta, *rest):
        return Polished(theta + 1e-3, theta, 0.5, False)

    monkeypatch.setattr("trainer.training.newton_steps.polished", nearly)
    options = {**QUICK, "newton_after": 0}
    found = fit(school, pupils, dtype="float64", max_steps=1_000, batch_size=600, options=options)
    assert found.metrics["stop_reason"] == "noise"
    assert found.metrics["steps"] == 333
    assert found.metrics["evidence"]["gradient"] == 0.5
    assert "at the noise of the draws: remaining Newton step 0.5 guide sd" in " ".join(capsys.readouterr().out.split())


def test_training_goes_on_where_four_times_the_draws_leave_something_to_go(table, monkeypatch):
    asked = []

    def gradient(inference, theta, rows, preconditioner=None, draws=FEW, sweep=None):
        asked.append(draws.pairs)
        return torch.full_like(theta, asked.count(4 * MANY.pairs) == 1 and draws.pairs > MANY.pairs, dtype=torch.double)

    monkeypatch.setattr("trainer.posterior.full_data.full_gradient", gradient)
    options = {**QUICK, "recipe": "auto", "rounds": 2}
    found = fit(regression, table, columns=COLUMNS, max_steps=900, progress=False, options=options)
    assert asked.count(4 * MANY.pairs) == 2
    assert (found.metrics["stop_reason"], found.metrics["steps"]) == ("converged", 900)


def test_newton_steps_that_fail_are_tried_again_after_four_times_as_many_training_steps(pupils, capsys, monkeypatch):
    monkeypatch.setattr("trainer.training.newton_steps.polished", lambda *given: None)
    options = {**QUICK, "newton_after": 0, "stop": "budget"}
    fit(school, pupils, dtype="float64", max_steps=2_100, batch_size=600, options=options)
    tried = re.findall(r"step ([\d,]+): Newton steps", " ".join(capsys.readouterr().out.split()))
    assert tried == ["300", "2,100"]


def test_a_model_without_second_derivatives_goes_without_newton_steps(pupils, capsys):
    def model(group, y=None):
        with pyro.plate("groups", 300):
            effect = pyro.sample("effect", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("data", len(group)):
            far = torch.cdist(effect[:, None], effect.new_zeros(1, 1), p=1.0)[:, 0]
            pyro.sample("y", dist.Normal(far[group], NOISE), obs=y)

    options = {**QUICK, "newton_after": 0, "rounds": 1}
    found = fit(model, pupils, dtype="float64", max_steps=50, options=options)
    assert "no Newton steps, since curvature is not to be had" in " ".join(capsys.readouterr().out.split())
    assert found.metrics["stop_reason"] == "budget"


def separable(x, y=None):
    w = pyro.sample("w", dist.ImproperUniform(dist.constraints.real, (), (3,)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def ridge(x, y=None):
    a = pyro.sample("a", dist.Normal(x.new_zeros(()), 15.0))
    b = pyro.sample("b", dist.Normal(x.new_zeros(()), 15.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(a + b, NOISE), obs=y)


def narrow(x, y=None):
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 0.01).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (separable, "with separable data or an improper prior the optimum lies at infinity"),
        (ridge, "are strongly correlated"),
        (narrow, "prior sds from the mean of its prior"),
    ],
)
def test_a_problem_without_a_good_answer_says_so(table, capsys, model, sentence):
    x = table[["a", "b", "c"]].to_numpy()
    y = (x[:, 0] > 0).astype(float) if model is separable else table["y"].to_numpy()
    quick_fit({"x": x, "y": y}, model, progress=True, max_steps=300)
    out = " ".join(capsys.readouterr().out.split())
    assert sentence in out
    if model is separable:  # what was said before training is said again where the answer did not come
        assert "not converged within the budget" in out.partition(sentence)[2].partition(sentence)[0]


def test_a_model_without_data_says_so():
    def nothing(x):
        pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(UserError, match="observe"):
        quick_fit({"x": np.ones((4, 3))}, nothing)
