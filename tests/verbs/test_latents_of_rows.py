"""`svi latents`: what Posterior.latents gives, row by row, from the run folder alone."""

import numpy as np
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch
from app_models import effects
from app_tools import WEIGHTS, config

from trainer import Posterior
from trainer.data.packing.pack import pack
from trainer.errors import UserError
from trainer.inference.estimates import full_elbo
from trainer.posterior import summary
from trainer.training.finished import posterior_of
from trainer.verbs import latents, predict, train


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A table of 90 rows, and its shards."""
    folder, generator = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    x = generator.normal(size=(90, 3))
    np.savez(folder / "table.npz", x=x, y=x @ WEIGHTS + 4 * (generator.random(90) < 0.5))
    pack(str(folder / "table.npz"), folder / "shards", block_rows=32)
    return folder / "table.npz", folder / "shards"


@pytest.fixture(scope="module")
def run_dir(small, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run") / "run"
    options = ["model._target_=app_models.effects", f"data.path={small[1]}", "max_steps=3", "recipe=plain"]
    rest = ["trainer=cpu", "threads=1", "program=eager", "batch_size=32", "guide.nodes=11", f"run_dir={run_dir}"]
    before = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as few:
        few.setattr(full_elbo, "_PAIRS", 8)
        few.setattr(full_elbo, "_KL_DRAWS", 20)
        few.setattr(summary, "_DRAWS", 20)
        train.run(config("train", *options, *rest), run_dir)
    torch.set_default_dtype(before)
    return run_dir


def found(verb, run_dir, data, out, *more):
    name = verb.__name__.rpartition(".")[2]
    verb.run(config(name, f"run={run_dir}", f"data.path={data}", f"out={out}", "draws=8", *more), run_dir)
    table = (pa_csv.read_csv if out.suffix == ".csv" else pq.read_table)(out)
    return {name: np.array(table.column(name).to_pylist()) for name in table.column_names}


def test_a_table_and_shards_give_the_same_rows(run_dir, small, tmp_path, capsys):
    """The run's own training rows, by their numbers in the source; the table has more: the held-out ones."""
    table, shards = small
    of_table = found(latents, run_dir, table, tmp_path / "a.parquet", "quantiles=[0.1,0.9]")
    assert list(of_table) == ["row_id", "u_mean", "u_sd", "u_q10", "u_q90", "k_class", "k_p0", "k_p1"]
    assert of_table["row_id"].tolist() == list(range(90))
    said = capsys.readouterr().out
    assert "a.parquet: 90 rows, given what is observed of each; 8 draws" in said
    assert "finding latents 90/90 rows" in said
    of_shards = found(latents, run_dir, shards, tmp_path / "b.csv")
    assert len(of_shards["row_id"]) < 90
    for name in ("u_mean", "u_sd", "k_p1"):
        np.testing.assert_allclose(of_shards[name], of_table[name][of_shards["row_id"]], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(of_table["k_p0"] + of_table["k_p1"], 1, atol=1e-9)
    posterior = Posterior.load(run_dir / "posterior.pt", effects)
    np.testing.assert_array_equal(posterior.latents(table, 8)["u"].mean, of_table["u_mean"])


def test_how_latents_of_rows_are_held_is_part_of_a_run(run_dir):
    for posterior in (posterior_of(run_dir, ["app_models"]), Posterior.load(run_dir / "posterior.pt", effects)):
        assert posterior.inference.rows.nodes == 11
        assert posterior.inference.model.fineness.points >= 11


def test_a_second_call_writes_the_same_bytes(run_dir, small, tmp_path):
    for name in ("a.parquet", "b.parquet"):
        found(latents, run_dir, small[0], tmp_path / name)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_predictions_say_where_latents_of_rows_come_from(run_dir, small, tmp_path, capsys):
    held_out = small[1] / "held_out"
    given = found(predict, run_dir, held_out, tmp_path / "a.csv")
    assert "latents of rows: given what is observed of each row" in capsys.readouterr().out
    prior = found(predict, run_dir, held_out, tmp_path / "b.csv", "latents=prior")
    assert "latents of rows: from their prior" in capsys.readouterr().out
    assert given["y_sd"].mean() < prior["y_sd"].mean()


def test_what_cannot_be_is_said_in_a_sentence(run_dir, small, tmp_path):
    table, before = small[0], set(tmp_path.iterdir())
    for out, overrides, message in (
        ("a.txt", (), "a.txt is of no known format"),
        ("a.csv", ("draws=0",), "draws=0 must be a whole number"),
        ("a.csv", (f"run={tmp_path}",), "is not a run folder"),
        ("a.csv", (f"data.path=[{table},{table}]",), "is a table: give one table at a time"),
    ):
        with pytest.raises(UserError, match=message):
            found(latents, run_dir, table, tmp_path / out, *overrides)
    assert set(tmp_path.iterdir()) == before


def test_a_model_without_latents_of_rows_is_refused(fit, table, tmp_path):
    plain = fit("max_steps=2")
    with pytest.raises(UserError, match="the model has no latents of rows"):
        found(latents, plain, table, tmp_path / "a.csv")
    assert not (tmp_path / "a.csv").exists()
