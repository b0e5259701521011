"""What a model receives of a table's columns, what is said of them, and what is refused."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from rich.console import Console

from trainer import Posterior, UserError, fit
from trainer.data.packing.pack import pack
from trainer.data.shards.cache import ShardCache
from trainer.data.shards.folder import ShardFolder
from trainer.data.sources.memory import MemorySource
from trainer.training.columns import precision_lines, refuse_spared
from trainer.training.tables import shards_of

N = 120
OPTIONS: dict[str, Any] = {"options": {"program": "eager"}, "max_steps": 20, "progress": False}
RNG = np.random.default_rng(0)
NUMBERS = RNG.uniform(1, 9, N).round(2)
KINDS: dict[str, torch.dtype] = {}


def slope(x, y=None):
    b = pyro.sample("b", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


def level(c, y=None):
    e = pyro.sample("e", dist.Normal(0.0, 10.0).expand([5]).to_event(1))
    with pyro.plate("data", len(c)):
        pyro.sample("y", dist.Normal(e[c], 1.0), obs=y)


def treated(x, t, c, y=None):
    KINDS.update(x=x.dtype, t=t.dtype, c=c.dtype)
    e = pyro.sample("e", dist.Normal(0.0, 10.0).expand([5]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(e[c] + torch.where(t, x, -x), 1.0), obs=y)


def write(path: Path, x: Any, head: str = "x,y") -> Path:
    rows = "".join(f'"{cell}",{k % 5}.5\n' if "," in str(cell) else f"{cell},{k % 5}.5\n" for k, cell in enumerate(x))
    path.write_text(f"{head}\n{rows}")
    return path


@pytest.fixture(scope="module")
def by_level() -> Posterior:
    c = RNG.integers(0, 5, N)
    return fit(level, {"c": c, "y": c + 0.1 * RNG.normal(size=N)}, **OPTIONS)


def test_columns_arrive_as_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    words = pd.Categorical(["a", "b", "c"] * (N // 3))
    table = {"x": NUMBERS, "t": NUMBERS > 5, "c": words, "y": NUMBERS, "other": ["?"] * N}
    fit(treated, table, **{**OPTIONS, "progress": True})
    assert [KINDS["x"], KINDS["t"], KINDS["c"]] == [torch.float64, torch.bool, torch.int64]
    assert capsys.readouterr().out.splitlines()[0] == "columns: x float32 · t bool · c 3 categories · y float32"


@pytest.mark.parametrize("stray", ["?", "1,234.5"])
def test_words_among_numbers_are_refused_where_a_model_calculates_with_them(tmp_path: Path, stray: str) -> None:
    cells = [f"{v}" for v in NUMBERS]
    cells[50] = stray
    path = write(tmp_path / "t.csv", cells)
    for data in (path, pd.read_csv(path)):
        with pytest.raises(UserError) as error:
            fit(slope, data, **OPTIONS)
        assert "column 'x' of" in str(error.value)
        assert f"'{stray}' in row 50" in str(error.value)
    named = fit(slope, path, categories=["x"], **OPTIONS)
    assert len(named.index.column("x").vocabulary or ()) == len(set(cells))


def test_words_among_numbers_are_categories_where_a_model_looks_up_by_them(tmp_path: Path) -> None:
    words = RNG.choice(["A1", "7", "8", "B"], N)
    posterior = fit(level, write(tmp_path / "t.csv", words, "c,y"), **OPTIONS)
    assert posterior.index.column("c").vocabulary == ["7", "8", "A1", "B"]
    found = posterior.predict(write(tmp_path / "new.csv", ["7", "7"], "c,y"))["y"].mean
    assert found[0] == found[1]
    with pytest.raises(UserError, match="column 'c' holds 'Z' in row 1"):
        posterior.predict(write(tmp_path / "new.csv", ["7", "Z"], "c,y"))


def test_labels_of_a_classifier_may_be_words_among_numbers(tmp_path: Path) -> None:
    def classes(y=None, rows=N):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("data", rows if y is None else len(y)):
            pyro.sample("y", dist.Categorical(p), obs=y)

    path = write(tmp_path / "t.csv", RNG.choice(["0", "1", "other"], N), "y,z")
    assert fit(classes, path, **OPTIONS).index.column("y").vocabulary == ["0", "1", "other"]


def test_a_column_that_no_model_takes_stops_nothing(tmp_path: Path) -> None:
    table = {
        "x": NUMBERS,
        "y": NUMBERS,
        "gap": np.where(NUMBERS > 5, np.nan, 1.0),
        "day": np.array(["2020-01-01"] * N, "M8[D]"),
        "mixed": np.array([1, "?"] * (N // 2), object),
        "a b": NUMBERS,
        "row_id": NUMBERS,
    }
    twice = pd.concat([pd.DataFrame({"x": NUMBERS, "y": NUMBERS}), *[pd.DataFrame({"k": [1] * N})] * 2], axis=1)
    for data in (table, twice):
        assert fit(slope, data, **OPTIONS).index.column("x").dtype == "float32"


def test_missing_values_are_named_or_dropped() -> None:
    table = {"x": np.where(np.arange(N) == 7, np.nan, NUMBERS), "y": NUMBERS, "gap": [None] * N}
    with pytest.raises(UserError, match="no value for 'x' in row 7"):
        fit(slope, table, **OPTIONS)
    assert fit(slope, table, missing="drop", **OPTIONS).inference.num_obs == N - 1


def test_fractions_are_kept_where_they_count_and_refused_where_they_cannot(by_level: Posterior) -> None:
    posterior = fit(slope, {"x": np.arange(N) % 10, "y": 3.0 * (np.arange(N) % 10)}, **OPTIONS)
    two, half, three = posterior.predict({"x": [2.0, 2.5, 3.0]})["y"].mean
    assert half == pytest.approx((two + three) / 2, abs=1e-12)
    assert np.array_equal(by_level.predict({"c": [1.0, 2.0]})["y"].mean, by_level.predict({"c": [1, 2]})["y"].mean)
    with pytest.raises(UserError, match=r"column 'c' holds 2.5 in row 1 \(counted from 0\), whole numbers were packed"):
        by_level.predict({"c": [1.0, 2.5]})


def test_a_column_that_was_fitted_with_is_missed_and_one_that_is_observed_is_not() -> None:
    def shifted(x, z=None, y=None):
        b = pyro.sample("b", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            mean = b * x + (0.0 if z is None else z)
            pyro.sample("y", dist.Normal(mean, 1.0), obs=None if y is None else (y - 1) / 2)

    posterior = fit(shifted, {"x": NUMBERS, "z": NUMBERS[::-1].copy(), "y": NUMBERS}, **OPTIONS)
    said: list[str] = []
    list(posterior.predictions({"x": [1.0], "z": [1.0]}, say=said.append))
    assert not said
    list(posterior.predictions({"x": [1.0]}, say=said.append))
    assert said == ["the data has no column z, which the model was fitted with: it takes its default there."]


def test_shards_of_other_codes_are_not_predicted(tmp_path: Path) -> None:
    words = RNG.choice(["a", "b", "c"], N)
    posterior = fit(level, {"c": words, "y": NUMBERS}, **OPTIONS)
    pack(MemorySource({"c": np.array(["b", "c"])}), tmp_path / "new", held_out=0)
    with pytest.raises(UserError, match="column 'c' of the new shards has another codes"):
        posterior.predict(tmp_path / "new")


def test_a_table_that_is_packed_on_the_fly_leaves_out_what_it_must(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x,y,gap,day\n1,2,,2020-01-01\n2,3,1,2020-01-02\n")
    console = Console(file=io.StringIO(), width=200)
    (out,) = shards_of([str(tmp_path / "t.csv")], console, ShardCache(tmp_path / "cache"))
    assert "columns: x int64 · y int64 · left out: day · gap" in console.file.getvalue()  # type: ignore[attr-defined]
    index = ShardFolder(Path(out) / "train").index
    refuse_spared(index, slope)

    def with_gap(x, gap=None, y=None):
        del x, gap, y

    with pytest.raises(UserError, match="no value for 'gap' in row 0"):
        refuse_spared(index, with_gap)


def test_what_float32_cannot_hold_is_said_in_one_line(tmp_path: Path) -> None:
    seconds = 1_700_000_000 + 10 * np.arange(50)
    table = {"t": seconds, "s": seconds + 0.25, "n": np.arange(50), "c": ["a", "b"] * 25}
    index, _ = pack(MemorySource(table), tmp_path / "out", held_out=0)
    lines = precision_lines(index, ["t", "s", "n", "c"], torch.float32)
    assert [line.partition(":")[0] for line in lines] == [
        "float32 rounds the integers of column t", "float32 rounds the values of column s",
    ]  # fmt: skip
    assert not precision_lines(index, ["t", "s"], torch.float64)


def test_an_argument_that_is_no_column_is_told_beside_all_columns_of_the_table() -> None:
    table = {"hour": NUMBERS, "xx": NUMBERS, "y": NUMBERS, **{f"c{k}": NUMBERS for k in range(30)}}
    with pytest.raises(
        UserError, match=r'argument "x" that is not a column of the data \(hour, xx, y, c0, .* and 13 more; do'
    ):
        fit(slope, table, **OPTIONS)
    with pytest.raises(
        UserError, match=r'argument "x" that is not a column of the data \(hour, y\): name its column with'
    ):
        fit(slope, {"hour": NUMBERS, "y": NUMBERS}, **OPTIONS)
