"""Rows beyond those of the start are checked as they come: in chunks of any program, in passes, held out."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from trainer import UserError, fit
from trainer.data.packing.pack import pack
from trainer.data.shards.folder import open_split
from trainer.data.sources.memory import MemorySource
from trainer.inference.model.plates import Batch
from trainer.training import first_rows

N, FIRST = 4_096, 1_024


def clicks(x, y=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=a + x), obs=y)


def waits(x, y=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Exponential((a + x).exp()), obs=y - 1.0)


def by_level(level, y=None):
    with pyro.plate("levels", 12):
        e = pyro.sample("e", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(level)):
        pyro.sample("y", dist.Normal(e[level], 1.0), obs=y)


def before(level, y=None):
    by_level(level - 1, y)


@pytest.fixture(autouse=True)
def small_start(monkeypatch):
    monkeypatch.setattr(first_rows, "MOST", FIRST)


@pytest.fixture(scope="module")
def columns(tmp_path_factory):
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=N).astype(np.float32),
        "clicks": (rng.random(N) < 0.5).astype(np.float32),
        "waits": rng.exponential(size=N).astype(np.float32) + 1,
        "level": rng.integers(0, 12, N),
        "above": rng.integers(1, 13, N),
    }


def folder_of(place, table, held_out=0.0):
    pack(MemorySource(table), place, held_out=held_out, block_rows=128, shard_bytes=1_000_000)
    return place


@pytest.fixture(scope="module")
def late(tmp_path_factory):
    """A row that is not among the first."""
    place = folder_of(tmp_path_factory.mktemp("order") / "s", {"x": np.zeros(N)})
    folder = open_split(place, "train")
    return int(folder.read_block(20, "row_id")[5])


CASES = {
    "label": (clicks, {"x": "x", "y": "clicks"}, "y", 9, "observes 9 in row {} .* Bernoulli"),
    "derived": (waits, {"x": "x", "y": "waits"}, "y", 0.5, "observes -0.5 in row {} .* Exponential"),
    "beyond": (by_level, {"level": "level", "y": "x"}, "level", 12, 'column "level" is 12 in row {} .* table of 12'),
    "wraps": (by_level, {"level": "level", "y": "x"}, "level", -1, 'column "level" is -1 in row {} '),
    "derived index": (before, {"level": "above", "y": "x"}, "level", 0, "an index .* is -1 in row {} "),
}


def run(case, columns, place, late, held_out=0.0, **options):
    model, named, wrong, value, words = CASES[case]
    table = {name: columns[of].copy() for name, of in named.items()}
    table[wrong][late] = value
    folder_of(place, table, held_out)
    with pytest.raises(UserError, match=words.format(late)):
        fit(model, str(place), progress=False, batch_size=256, max_steps=40, seed=1,
            options={"program": "eager", "slots": 4, **options})  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_late_row_is_named(case, columns, late, tmp_path):
    run(case, columns, tmp_path / "s", late)


def test_a_late_row_is_named_by_a_pass_over_all_rows(columns, late, tmp_path):
    run("label", columns, tmp_path / "s", late, estimator="anchor")


def test_rows_are_looked_at_before_a_compiled_step_meets_them(columns, tmp_path, monkeypatch):
    """The steps that it is compiled and timed on among them: it may end the process at an index out of range."""
    place = folder_of(tmp_path / "order", {"x": np.zeros(N)})
    folder = open_split(place, "train")
    first = np.concatenate([folder.read_block(number, "row_id") for number in range(FIRST // 128)])
    spoilt = np.where(np.isin(np.arange(N), first), columns["level"], 12)
    monkeypatch.setattr("trainer.inference.programs.fused.Fused.prepare", None)
    folder_of(tmp_path / "s", {"level": spoilt, "y": columns["x"]})
    with pytest.raises(UserError, match=r'column "level" is 12 in row .* and so in rows'):
        fit(by_level, str(tmp_path / "s"), progress=False, batch_size=256, max_steps=40, options={"program": "fused"})


def test_a_held_out_row_is_named_before_training(columns, tmp_path, monkeypatch):
    place = folder_of(tmp_path / "order", {"x": np.zeros(N)}, held_out=0.1)
    held_out = int(open_split(place, "held_out").read_block(0, "row_id")[3])
    monkeypatch.setattr("trainer.training.prepare.start_of", None)
    run("label", columns, tmp_path / "s", held_out, held_out=0.1)


def test_rows_that_are_right_are_looked_at_once(columns, tmp_path, monkeypatch):
    """The model is evaluated for the first rows alone; of the others the labels, in the first epoch."""
    seen, whole = [], []
    right, faults = first_rows.RowCheck.is_right, first_rows.RowCheck.faults
    monkeypatch.setattr(
        first_rows.RowCheck,
        "is_right",
        lambda self, columns: (seen.append(columns["y"].numel()), right(self, columns))[1],
    )
    monkeypatch.setattr(
        first_rows.RowCheck, "faults", lambda self, *more: (whole.append(more[0].size), faults(self, *more))[1]
    )
    place = folder_of(tmp_path / "s", {"x": columns["x"], "y": columns["clicks"]})
    fit(clicks, str(place), progress=False, batch_size=256, max_steps=24, options={"program": "eager", "slots": 4})
    assert seen == [4 * 256] * 5  # the first chunk also before it is timed
    assert whole == [128, FIRST]


@pytest.mark.parametrize(
    ("weights", "words"), [(0.0, 'column "weight" is 0 in every row'), (-1.0, '"weight" is -1 in row')]
)
def test_weights_that_cannot_be(weights, words, columns, late):
    weight = np.zeros(N) if weights == 0 else np.ones(N)
    weight[late] = weights
    table = {"x": columns["x"], "y": columns["clicks"], "weight": weight}
    with pytest.raises(UserError, match=words):
        fit(clicks, table, progress=False, batch_size=256, max_steps=20, options={"program": "eager", "slots": 4})


@pytest.mark.parametrize(("copies", "count"), [(1, 6000), (40, 6000), (100, 2621), (10**5, 512)])
def test_a_start_takes_fewer_rows_where_many_copies_of_each_fill_memory(copies, count, monkeypatch):
    monkeypatch.setattr(first_rows, "MOST", 65_536)
    x = torch.arange(6000.0)
    sample = first_rows.sample_of(Batch.whole({"x": x}), copies)
    assert torch.equal(sample.columns["x"], x[None, :count])
    assert int(sample.batch_rows) == int(sample.valid) == count
