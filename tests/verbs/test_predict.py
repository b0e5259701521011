"""`svi predict`: what Posterior.predict gives, row by row, from the run folder alone."""

import numpy as np
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch
from app_models import linear
from app_tools import config, svi

from trainer import Posterior
from trainer.data.table import table_writer
from trainer.errors import UserError
from trainer.posterior.predictive import Prediction, table_columns
from trainer.training.finished import posterior_of
from trainer.verbs import predict


@pytest.fixture
def run_dir(fit):
    return fit("max_steps=40")


def predicted(run_dir, data, out, *more):
    predict.run(config("predict", f"run={run_dir}", f"data.path={data}", f"out={out}", "draws=7", *more), run_dir)
    table = (pa_csv.read_csv if out.suffix == ".csv" else pq.read_table)(out)
    return {name: np.array(table.column(name).to_pylist()) for name in table.column_names}


def test_a_table_and_shards_give_the_same_rows(run_dir, table, shards, tmp_path):
    """The run's own training rows, by their numbers in the source; the table has more: the held-out ones."""
    of_table = predicted(run_dir, table, tmp_path / "a.parquet", "quantiles=[0.1,0.9]")
    assert list(of_table) == ["row_id", "y_mean", "y_sd", "y_q10", "y_q90"]
    assert of_table["row_id"].tolist() == list(range(3000))
    of_shards = predicted(run_dir, shards, tmp_path / "b.csv")
    assert len(of_shards["row_id"]) < 3000
    np.testing.assert_allclose(of_shards["y_mean"], of_table["y_mean"][of_shards["row_id"]], rtol=1e-5, atol=1e-6)
    held_out = predicted(run_dir, shards / "held_out", tmp_path / "c.csv")
    assert sorted([*held_out["row_id"], *of_shards["row_id"]]) == list(range(3000))
    posterior = Posterior.load(run_dir / "posterior.pt", linear)
    np.testing.assert_array_equal(posterior.predict(table, 7)["y"].mean, of_table["y_mean"])


def test_the_modules_of_a_class_are_made_in_the_type_of_the_run(fit):
    run_dir = fit("model._target_=app_models.VAE", "max_steps=4")
    assert posterior_of(run_dir).theta.dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32


def test_classes_are_columns_of_their_own():
    """The most likely one and the probability of each, by its word where it has one."""
    numbers, shares = np.zeros((2, 1)), np.array([[0.3, 0.7], [0.6, 0.4]])
    of_codes = table_columns("y", Prediction(numbers, numbers, numbers, shares), [0.5])
    assert {name: column.tolist() for name, column in of_codes.items()} == {
        "y_class": [1, 0], "y_p0": [0.3, 0.6], "y_p1": [0.7, 0.4]
    }  # fmt: skip
    of_words = table_columns("y", Prediction(numbers, numbers, numbers, shares, ("no", "yes")), [0.5])
    assert list(of_words) == ["y_class", "y_p_no", "y_p_yes"]
    assert of_words["y_class"].tolist() == ["yes", "no"]
    many = table_columns("y", Prediction(numbers, numbers, numbers, np.full((2, 1001), 1 / 1001)), [0.5])
    assert list(many) == ["y_class", "y_p"]


def test_what_is_no_number_is_left_blank(tmp_path):
    with table_writer(tmp_path / "a.csv") as write:
        write({"row_id": np.array([0, 1]), "y_mean": np.array([np.nan, 2.0])})
    assert (tmp_path / "a.csv").read_text().splitlines()[1:] == ["0,", "1,2"]


def test_what_cannot_be_is_said_in_a_sentence(run_dir, table, tmp_path):
    for out, overrides, message in (
        ("a.txt", (), "a.txt is of no known format"),
        ("no/a.csv", (), "does not exist: make it first"),
        ("a.csv", ("quantiles=[0.5,2]",), "quantiles=.0.5,2. must be a list, each a number above 0 and below 1"),
        ("a.csv", (f"run={tmp_path}",), "is not a run folder"),
        ("a.csv", ("data.path=nowhere.csv",), "no file at 'nowhere.csv'"),
    ):
        with pytest.raises(UserError, match=message):
            predicted(run_dir, table, tmp_path / out, *overrides)
    (run_dir / "posterior.pt").unlink()
    with pytest.raises(UserError, match="has no result yet: finish it with svi train"):
        predicted(run_dir, table, tmp_path / "a.csv")
    assert [path.name for path in tmp_path.iterdir()] == [run_dir.name]


def test_memory_does_not_grow_with_the_rows(run_dir, tmp_path):
    peaks = []
    for rows in (4_000, 600_000):
        x = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float32)
        np.savez(tmp_path / "new.npz", x=x[:, :3], y=x[:, 3])
        code = (
            "import resource, sys; from trainer.cli import main; main(sys.argv[1:]); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = svi(
            "predict", f"run={run_dir}", f"data.path={tmp_path}/new.npz", f"out={tmp_path}/out.parquet", "draws=2",
            launcher=("-c", code),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert pq.read_metadata(tmp_path / "out.parquet").num_rows == 600_000
    assert peaks[1] - peaks[0] < 24  # MB; what is written alone is 29 in memory
