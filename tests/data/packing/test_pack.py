"""Packing: every row exactly once, split, shuffled and described as promised, or nothing at all."""

import errno
import io
import itertools
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from trainer.data.packing.columns import recipes
from trainer.data.packing.pack import pack
from trainer.data.shards.files import read_index
from trainer.data.shards.index import Index
from trainer.data.shards.tar import ShardWriter
from trainer.data.sources.source import FileSource, open_source
from trainer.data.sources.synthetic import SyntheticSource
from trainer.errors import UserError

ROWS = 5000


def blocks(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    """The blocks of a shard folder as Python's own tar reads them."""
    for shard in read_index(folder).shards:
        with tarfile.open(folder / shard.name) as tar:
            members = tar.getmembers()
            for _, group in itertools.groupby(members, lambda member: member.name.split(".")[0]):
                block = {}
                for member in group:
                    file = tar.extractfile(member)
                    assert file is not None
                    block[member.name.split(".")[1]] = np.load(io.BytesIO(file.read()), allow_pickle=False)
                yield block


def rows(folder: Path) -> dict[str, np.ndarray]:
    read = list(blocks(folder))
    return {name: np.concatenate([block[name] for block in read]) for name in read[0]}


def both(out: Path) -> dict[str, np.ndarray]:
    """All rows in source order."""
    read = [rows(out / split) for split in ("train", "held_out") if (out / split).exists()]
    whole = {name: np.concatenate([part[name] for part in read]) for name in read[0]}
    order = np.argsort(whole["row_id"])
    return {name: values[order] for name, values in whole.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def table(count: int = ROWS) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "a": generator.normal(5, 3, size=count),
        "b": generator.integers(-9, 9, count),
        "flag": generator.random(count) < 0.3,
        "word": generator.choice(["red", "green", "blue"], count),
        "team": generator.integers(0, count // 10, count),
    }


COLUMNS = {"x": ["a", "b", "flag"], "y": "b", "flag": "flag", "word": "word"}


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    pq.write_table(pa.table(table()), tmp_path / "t.parquet", row_group_size=777)
    return tmp_path / "t.parquet"


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path / "t.parquet")
    return path / "t.parquet"


def expect_source_rows(out: Path) -> None:
    source, read = table(), both(out)
    assert np.array_equal(read["row_id"], np.arange(ROWS))
    assert np.array_equal(read["x"], np.stack([source["a"], source["b"], source["flag"]], 1).astype(np.float32))
    assert np.array_equal(read["y"], source["b"])
    assert np.array_equal(read["flag"], source["flag"])
    assert np.array_equal(np.array(["blue", "green", "red"])[read["word"]], source["word"])
    assert {name: values.dtype.name for name, values in read.items()} == {
        "x": "float32",
        "y": "int64",
        "flag": "bool",
        "word": "int64",
        "row_id": "int64",
    }


# Every source gives its rows back


def test_round_trip_of_parquet(parquet: Path, tmp_path: Path) -> None:
    train, held = pack(parquet, tmp_path / "out", columns=COLUMNS)
    assert held is not None
    assert train.num_rows + held.num_rows == ROWS
    assert train.column("x").shape == (3,)
    assert train.column("word").vocabulary == ["blue", "green", "red"]
    assert train.column("word").statistics is None
    assert train.meta["columns"] == COLUMNS
    assert read_index(tmp_path / "out" / "train").digest == train.digest
    assert read_index(tmp_path / "out" / "held_out").digest == held.digest
    assert (train.split, held.split) == ("train", "held_out")
    expect_source_rows(tmp_path / "out")


def test_round_trip_of_csv_and_npz(tmp_path: Path) -> None:
    source = table()
    np.savez(tmp_path / "t.npz", **source)  # type: ignore[arg-type]
    lines = [",".join(source), *(",".join(str(value.item()) for value in row) for row in zip(*source.values()))]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    for name in ("t.npz", "t.csv"):
        pack(tmp_path / name, tmp_path / f"{name}-out", columns=COLUMNS)
        expect_source_rows(tmp_path / f"{name}-out")


def test_npz_needs_no_columns(tmp_path: Path) -> None:
    x = np.arange(24, dtype=np.float64).reshape(4, 3, 2)
    np.savez(tmp_path / "t.npz", x=x, y=np.arange(4, dtype=np.uint8))
    train, held = pack(tmp_path / "t.npz", tmp_path / "out", held_out=0, float_dtype="float64")
    assert held is None
    assert sorted(os.listdir(tmp_path / "out")) == ["train"]
    read = both(tmp_path / "out")
    assert np.array_equal(read["x"], x)
    assert read["x"].dtype == np.float64
    assert np.array_equal(read["y"], np.arange(4))
    assert train.column("x").shape == (3, 2)


def test_synthetic_source(tmp_path: Path) -> None:
    def sample(generator: np.random.Generator, first_row: int, count: int) -> dict[str, np.ndarray]:
        return {"x": generator.normal(size=(count, 2)), "row": np.arange(first_row, first_row + count)}

    source = SyntheticSource(sample, 20_000, seed=1)
    pack(source, tmp_path / "out")
    read = both(tmp_path / "out")
    assert np.array_equal(read["row"], np.arange(20_000))
    wanted = np.concatenate([np.asarray(batch["x"]) for batch in source.batches(4096)])
    assert np.array_equal(read["x"], wanted.astype(np.float32))


def test_vectors_decimals_and_nulls_inside_vectors(tmp_path: Path) -> None:
    vector = pa.array([[1.0, 2.0], None, [3.0, None], [5.0, 6.0]], pa.list_(pa.float64(), 2))
    path = write(tmp_path, v=vector, d=pa.array(["1.5", "2.5", "3.5", "4.5"]).cast(pa.decimal128(4, 1)))
    train, _ = pack(path, tmp_path / "out", held_out=0, missing="drop")
    read = both(tmp_path / "out")
    assert read["v"].tolist() == [[1, 2], [5, 6]]
    assert read["d"].tolist() == [1.5, 4.5]
    assert read["row_id"].tolist() == [0, 3]
    assert train.meta["dropped"] == 2


def test_only_the_last_block_is_short(parquet: Path, tmp_path: Path) -> None:
    for memory in (1 << 30, 1 << 16):
        train, held = pack(parquet, tmp_path / str(memory), columns=COLUMNS, block_rows=512, memory_bytes=memory)
        for index in (train, held):
            assert isinstance(index, Index)
            assert (index.block_rows[:-1] == 512).all()
            assert 0 < index.block_rows[-1] <= 512


def test_a_block_fits_a_shard(parquet: Path, tmp_path: Path) -> None:
    train, _ = pack(parquet, tmp_path / "out", columns=COLUMNS, shard_bytes=1 << 14)
    assert train.block_rows.max() == (1 << 14) // (12 + 8 + 1 + 8 + 8)
    expect_source_rows(tmp_path / "out")


# The same seed gives the same bytes


def test_bytes_depend_on_the_seed_and_not_on_the_memory(parquet: Path, tmp_path: Path) -> None:
    def packed(name: str, **options: Any) -> dict[str, bytes]:
        pack(parquet, tmp_path / name, columns=COLUMNS, block_rows=256, shard_bytes=1 << 16, **options)
        return contents(tmp_path / name)

    first = packed("first")
    assert packed("again") == first
    assert packed("little", memory_bytes=1 << 16) == first
    assert packed("other", seed=1) != first


def test_split_is_by_row_and_nothing_else(tmp_path: Path) -> None:
    source = table()
    held = []
    for name, columns in (
        ("whole", source),
        ("other", {"z": source["a"][::-1], "b": source["b"]}),
        ("longer", {"z": np.zeros(2 * ROWS)}),
    ):
        pack(write(tmp_path, **columns), tmp_path / name, seed=4)
        ids = rows(tmp_path / name / "held_out")["row_id"]
        held.append(np.sort(ids[ids < ROWS]).tolist())
    assert held[0] == held[1] == held[2]
    pack(write(tmp_path, **source), tmp_path / "seed", seed=5)
    assert np.sort(rows(tmp_path / "seed" / "held_out")["row_id"]).tolist() != held[0]


# The shuffle


def test_where_rows_come_to_lie_is_uniform(tmp_path: Path) -> None:
    """Row ranges of the source against places in the output, 20 x 20 cells, over several seeds."""
    path, cells = write(tmp_path, x=np.zeros(ROWS)), np.zeros((20, 20))
    for seed in range(5):
        pack(path, tmp_path / f"{seed}", held_out=0, seed=seed, memory_bytes=1 << 16)
        ids = rows(tmp_path / f"{seed}" / "train")["row_id"]
        np.add.at(cells, (ids * 20 // ROWS, np.arange(ROWS) * 20 // ROWS), 1)
    # margins are fixed, so the statistic has 19 x 19 degrees of freedom for each seed's share
    expected = cells.sum() / cells.size
    statistic = ((cells - expected) ** 2 / expected).sum()
    assert 1e-3 < stats.chi2.sf(statistic, 19 * 19) < 0.999


# What the index says


def test_statistics_are_those_of_the_training_rows(parquet: Path, tmp_path: Path) -> None:
    train, held = pack(parquet, tmp_path / "out", columns=COLUMNS, memory_bytes=1 << 16)
    assert held is not None
    read = rows(tmp_path / "out" / "train")
    for name in ("x", "y", "flag"):
        values, said = read[name].astype(np.float64), train.column(name).statistics
        assert said is not None
        assert said == held.column(name).statistics
        np.testing.assert_allclose(said["mean"], values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(said["sd"], values.std(0), rtol=1e-12)
        assert np.array_equal(said["min"], values.min(0))
        assert np.array_equal(said["max"], values.max(0))


def test_standardize(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(1e9, 1, ROWS), generator.normal(-5, 1e-3, ROWS)  # in float32, `a` would be constant
    path = write(tmp_path, a=a, b=b, one=np.ones(ROWS))
    train, _ = pack(path, tmp_path / "out", columns={"x": ["a", "b", "one"], "y": "a"}, standardize=["x"])
    read, source = both(tmp_path / "out"), np.stack([a, b, np.ones(ROWS)], 1)
    kept = source[np.sort(rows(tmp_path / "out" / "train")["row_id"])]
    mean, sd = [*kept.mean(0)[:2], 0.0], [*kept.std(0)[:2], 1.0]
    np.testing.assert_allclose(read["x"], (source - mean) / sd, rtol=1e-5, atol=1e-5)
    assert read["x"].dtype == np.float32
    said = train.meta["standardised"]["x"]
    np.testing.assert_allclose(said["mean"], mean, rtol=1e-12)
    np.testing.assert_allclose(said["sd"], sd, rtol=1e-7)
    assert train.column("x").statistics == {
        "mean": [0.0, 0.0, 1.0],
        "sd": [1.0, 1.0, 0.0],
        "min": pytest.approx([*((kept.min(0) - mean) / sd)[:2], 1.0]),
        "max": pytest.approx([*((kept.max(0) - mean) / sd)[:2], 1.0]),
    }
    assert np.array_equal(read["y"], a)  # float64, or it would be constant
    with pytest.raises(UserError, match="standardize=z names no column of floats"):
        pack(path, tmp_path / "out2", columns={"x": ["a"]}, standardize=["z"])


def test_categories_of_many_kinds_of_text(tmp_path: Path) -> None:
    words = ["ü", "", "a", "B", "a"]
    kinds = {"plain": pa.array(words), "large": pa.array(words, pa.large_string())}
    kinds["dictionary"] = pa.array(words).dictionary_encode()
    train, _ = pack(write(tmp_path, **kinds), tmp_path / "out", held_out=0)
    read = both(tmp_path / "out")
    for name in kinds:
        assert train.column(name).vocabulary == ["", "B", "a", "ü"]
        assert read[name].tolist() == [3, 0, 2, 1, 2]
    np.savez(tmp_path / "t.npz", u=np.array(words), s=np.char.encode(np.array(words), "utf-8"))
    train, _ = pack(tmp_path / "t.npz", tmp_path / "npz", held_out=0)
    assert all(train.column(name).vocabulary == ["", "B", "a", "ü"] for name in "us")
    assert both(tmp_path / "npz")["s"].tolist() == [3, 0, 2, 1, 2]


# Groups


@pytest.mark.parametrize("key", ["number", "text"])
@pytest.mark.parametrize("memory", [1 << 30, 1 << 16])
def test_groups(tmp_path: Path, key: str, memory: int) -> None:
    source = table()
    team = source["team"] if key == "number" else np.array([f"team {number}" for number in source["team"]])
    path = write(tmp_path, **{**source, "team": team})
    columns = {"x": ["a", "b"], "y": "b", "team": "team"}
    train, held = pack(path, tmp_path / "out", columns=columns, group_by="team", memory_bytes=memory, block_rows=64)
    assert held is not None
    longest = int(np.unique(team, return_counts=True)[1].max())
    assert train.column("x").shape == held.column("x").shape == (longest, 2)
    assert train.column("y").shape == (longest,)
    assert train.meta["group_by"] == "team"
    read = both(tmp_path / "out")
    assert len(read["row_id"]) == len(np.unique(team))
    for first, length, x, y in zip(read["row_id"], read["length"], read["x"], read["y"]):
        members = np.flatnonzero(team == team[first])
        assert first == members[0]
        assert length == len(members)
        padded = members[np.minimum(np.arange(longest), length - 1)]
        assert np.array_equal(x, np.stack([source["a"], source["b"]], 1)[padded].astype(np.float32))
        assert np.array_equal(y, source["b"][padded])
    ours = rows(tmp_path / "out" / "train")
    lengths, said = train.column("length").statistics, train.column("x").statistics
    assert lengths is not None
    assert lengths["max"] == ours["length"].max()
    assert lengths["mean"] == pytest.approx(ours["length"].mean())
    real = np.isin(team, team[ours["row_id"]])
    assert said is not None
    assert said["mean"][1] == pytest.approx(source["b"][real].mean())


def test_the_split_of_groups_is_by_key(tmp_path: Path) -> None:
    names = np.array([f"g{number}" for number in range(500)])
    held = []
    for order, more in ((names, []), (names[::-1], ["a new one", "zebra"])):
        team = np.concatenate([more, np.repeat(order, 2)])
        path = write(tmp_path, team=team, x=np.arange(float(len(team))))
        pack(path, tmp_path / "out", columns={"x": "x"}, group_by="team", overwrite=True)
        held.append({*team[rows(tmp_path / "out" / "held_out")["row_id"]]} & {*names})
    assert held[0] == held[1]
    assert 20 < len(held[0]) < 80


@pytest.mark.parametrize("key", ["number", "text"])
@pytest.mark.parametrize("memory", [1 << 30, 1 << 16])
def test_values_of_a_column_are_held_out_with_all_their_rows(tmp_path: Path, key: str, memory: int) -> None:
    source = table()
    team = source["team"] if key == "number" else np.array([f"team {number}" for number in source["team"]])
    path = write(tmp_path, **{**source, "team": team})
    train, held = pack(path, tmp_path / "out", columns=COLUMNS, split_by="team", held_out=0.3, memory_bytes=memory)
    assert held is not None
    expect_source_rows(tmp_path / "out")
    assert train.meta["split_by"] == "team"
    ours, theirs = (rows(tmp_path / "out" / side)["row_id"] for side in ("train", "held_out"))
    assert not {*team[ours]} & {*team[theirs]}
    assert 0.2 < len({*team[theirs]}) / len({*team}) < 0.4
    # The same teams whatever else is in the table.
    half = write(tmp_path, **{name: values[::2] for name, values in {**source, "team": team}.items()})
    pack(half, tmp_path / "half", columns=COLUMNS, split_by="team", held_out=0.3)
    assert {*team[::2][rows(tmp_path / "half" / "held_out")["row_id"]]} == {*team[::2]} & {*team[theirs]}


@pytest.mark.parametrize(
    ("make", "after"),
    [
        (lambda day: day, 70),
        (lambda day: day + 0.5, 70.0),
        (lambda day: np.datetime64("2024-01-01") + day, "2024-03-11"),
        (
            lambda day: pa.array(np.datetime64("2024-01-01T00:00:00") + day * 86_400).cast(pa.timestamp("us")),
            "2024-03-11",
        ),
        (lambda day: (np.datetime64("2024-01-01") + day).astype(str), "2024-03-11"),
    ],
)
def test_rows_from_a_time_on_are_held_out(tmp_path: Path, make: Any, after: Any) -> None:
    """Whatever says the time; the chance of held_out is not asked."""
    day = np.random.default_rng(1).integers(0, 100, 500)
    path = write(tmp_path, x=np.arange(500.0), day=make(day))
    train, held = pack(path, tmp_path / "out", columns={"x": "x"}, split_time="day", split_after=after)
    assert held is not None
    assert np.array_equal(np.sort(rows(tmp_path / "out" / "held_out")["row_id"]), np.flatnonzero(day >= 70))
    assert np.array_equal(np.sort(rows(tmp_path / "out" / "train")["row_id"]), np.flatnonzero(day < 70))
    assert train.meta["split_time"] == ["day", str(after)]
    assert train.meta["held_out"] is None


def test_a_split_that_cannot_be_made(tmp_path: Path) -> None:
    path = write(tmp_path, x=np.arange(4.0), day=pa.array([1, 2, None, 4]), team=[1, 1, 2, 2])
    for options, message in (
        ({"split_time": "day"}, "split.time and split.after belong together"),
        ({"split_after": 3}, "split.time and split.after belong together"),
        ({"split_time": "day", "split_after": 3}, "no value for 'day' in row 2"),
        ({"split_time": "dya", "split_after": 3}, r"no column 'dya': do you mean day\?"),
        ({"split_time": "team", "split_after": "May"}, "split.after=May cannot be compared with column 'team'"),
        (
            {"split_time": "day", "split_after": 3, "split_by": "team"},
            "split.by=team and split.time=day are two splits",
        ),
        ({"split_by": "team", "group_by": "team"}, "groups are held out whole already"),
        ({"split_by": "x"}, "split.by=x is not a column of integers or text"),
    ):
        with pytest.raises(UserError, match=message):
            pack(path, tmp_path / "out", columns={"x": "x"}, **options)
    pack(path, tmp_path / "out", columns={"x": "x"}, split_time="day", split_after=3, missing="drop")
    assert rows(tmp_path / "out" / "held_out")["row_id"].tolist() == [3]


def test_groups_refuse_inexact_keys(parquet: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="group_by=a is not a column of integers or text"):
        pack(parquet, tmp_path / "out", columns={"x": "b"}, group_by="a")
    with pytest.raises(UserError, match=r"no column 'tam': do you mean team?"):
        pack(parquet, tmp_path / "out", columns={"x": "b"}, group_by="tam")
    with pytest.raises(UserError, match="keep the column 'length' for themselves"):
        pack(parquet, tmp_path / "out", columns={"length": "b"}, group_by="team")


# Missing and impossible values


def holed(tmp_path: Path) -> Path:
    return write(
        tmp_path,
        a=pa.array([1.0, None, float("nan"), 4.0, 5.0, 6.0]),
        n=pa.array([1, 2, 3, None, 5, 6]),
        flag=pa.array([True, False, True, True, None, False]),
        word=pa.array(["u", "v", "w", "u", "v", None]),
    )


@pytest.mark.parametrize(("column", "row"), [("a", 1), ("n", 3), ("flag", 4), ("word", 5)])
def test_missing_values_are_errors(tmp_path: Path, column: str, row: int) -> None:
    with pytest.raises(UserError, match=rf"no value for '{column}' in row {row} \(counted from 0\)"):
        pack(holed(tmp_path), tmp_path / "out", columns={"z": column})
    assert not (tmp_path / "out").exists()


def test_missing_values_are_dropped_and_counted(tmp_path: Path) -> None:
    train, _ = pack(holed(tmp_path), tmp_path / "out", columns={"x": ["a", "n"]}, held_out=0, missing="drop")
    assert train.meta["dropped"] == 3
    assert train.meta["source_rows"] == 6
    read = both(tmp_path / "out")
    assert read["row_id"].tolist() == [0, 4, 5]
    assert read["x"].tolist() == [[1, 1], [5, 5], [6, 6]]
    statistics = train.column("x").statistics
    assert statistics is not None
    assert statistics["max"] == [6.0, 6.0]


def test_missing_keys_of_groups(tmp_path: Path) -> None:
    train, _ = pack(holed(tmp_path), tmp_path / "out", columns={"f": "n"}, group_by="word", held_out=0, missing="drop")
    assert train.meta["dropped"] == 2
    assert both(tmp_path / "out")["length"].tolist() == [1, 2, 1]


@pytest.mark.parametrize("missing", ["error", "drop"])
@pytest.mark.parametrize(("value", "dtype"), [(float("inf"), "float64"), (-1e300, "float32")])
def test_infinity_is_always_an_error(tmp_path: Path, missing: str, value: float, dtype: str) -> None:
    path = write(tmp_path, a=[0.0, 1.0, value], b=[1.0, 2.0, 3.0])
    with pytest.raises(UserError, match=rf"column 'a' is infinite, or too large for {dtype}, in row 2"):
        pack(path, tmp_path / "out", columns={"x": ["b", "a"]}, missing=missing, float_dtype=dtype)


def test_an_integer_that_fits_no_int64(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", n=np.array([1, 2**63], np.uint64))
    with pytest.raises(UserError, match="column 'n' holds an integer above"):
        pack(tmp_path / "t.npz", tmp_path / "out")


# What is refused, in one sentence each


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": ["a", "word"]}, "text in a numeric column: 'word' in columns.x"),
        ({"x": ["a", "flagg"]}, "no column 'flagg': do you mean flag?"),
        ({"x": []}, "columns.x names no source column"),
        ({"x y": "a"}, "'x y' cannot name an argument"),
        ({"größe": "a"}, "cannot name an argument"),
        ({"row_id": "a"}, "keep the column 'row_id' for themselves"),
    ],
)
def test_bad_columns(parquet: Path, tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pack(parquet, tmp_path / "out", columns=columns)


def test_bad_types(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        day=pa.array([1, 2], pa.date32()),
        none=pa.nulls(2),
        v=pa.array([[1.0]] * 2, pa.list_(pa.float32(), 1)),
    )
    for name, message in (("day", r"holds date32\[day\]"), ("none", "holds no value in any row")):
        with pytest.raises(UserError, match=f"column '{name}' of .* {message}"):
            pack(path, tmp_path / "out", columns={"x": name})
    with pytest.raises(UserError, match=r"'v' in columns.x has rows of shape \[1\]"):
        pack(path, tmp_path / "out", columns={"x": ["v"]})
    np.savez(tmp_path / "t.npz", x=np.zeros((3, 0)))
    with pytest.raises(UserError, match="rows of no numbers"):
        pack(tmp_path / "t.npz", tmp_path / "out")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("held_out", 1.0, "held_out=1.0 is not a fraction"),
        ("held_out", -0.1, "is not a fraction"),
        ("held_out", float("nan"), "is not a fraction"),
        ("seed", -1, "seed=-1 is out of range"),
        ("shard_bytes", 0, "shard_bytes=0 holds nothing"),
        ("block_rows", 0, "block_rows=0 holds nothing"),
        ("memory_bytes", 10, "memory_bytes=10 is too little"),
        ("missing", "impute", "missing=impute is unknown"),
        ("float_dtype", "float16", "float_dtype=float16 is unknown"),
    ],
)
def test_bad_options(parquet: Path, tmp_path: Path, option: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pack(parquet, tmp_path / "out", columns=COLUMNS, **{option: value})


def test_no_training_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no row to train on \(of 2, 2 were dropped and 0 held out\)"):
        pack(write(tmp_path, a=[float("nan")] * 2), tmp_path / "out", missing="drop")
    with pytest.raises(UserError, match=r"no row to train on .of 2, 0 were dropped and 2 held out"):
        pack(write(tmp_path, a=[1.0, 2.0]), tmp_path / "out", held_out=1 - 1e-12)


# Whole or not at all


def test_out_is_not_replaced_unless_asked(parquet: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    pack(parquet, out, columns=COLUMNS)
    before = contents(out)
    with pytest.raises(UserError, match="exists: choose another out=, or write overwrite=true"):
        pack(parquet, out, columns=COLUMNS, seed=1)
    with pytest.raises(UserError, match=r"no column"):
        pack(parquet, out, columns={"x": "zz"}, overwrite=True)
    assert contents(out) == before
    pack(parquet, out, columns=COLUMNS, seed=1, overwrite=True)
    assert contents(out) != before
    assert os.listdir(out.parent) == ["out"]


def test_overwrite_never_removes_what_is_not_a_pack(parquet: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not a packed folder"):
        pack(parquet, tmp_path / "home", columns=COLUMNS, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").exists()


@pytest.mark.parametrize("method", ["write", "close"])
@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError, "no space is left on the disk of '.*out'"),
        (OSError(errno.EACCES, "Permission denied"), UserError, "cannot write '.*out': Permission denied"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_failure_leaves_nothing(
    parquet: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    error: BaseException,
    raised: type[BaseException],
    message: str | None,
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(ShardWriter, method, fail)
    with pytest.raises(raised, match=message):
        pack(parquet, tmp_path / "out", columns=COLUMNS, memory_bytes=1 << 16)
    assert os.listdir(tmp_path) == ["t.parquet"]


def test_a_folder_that_cannot_be_made(parquet: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        pack(parquet, parquet / "out", columns=COLUMNS)


KILLED = """
import sys
from trainer.data.packing.pack import pack
from trainer.data.shards.tar import ShardWriter
pack(sys.argv[1], sys.argv[2], columns={"x": ["a", "b"]}, memory_bytes=1 << 16, block_rows=16,
     progress=lambda done, total: print(done, flush=True) or input())
"""


@pytest.mark.parametrize("rows_done", [1, ROWS * 3 // 4])
def test_a_killed_pack_leaves_no_out(parquet: Path, tmp_path: Path, rows_done: int) -> None:
    """Killed in pass one and in pass two; the next pack removes what was left."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(parquet), str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process, process.stdin, process.stdout:
        while int(process.stdout.readline()) < rows_done:
            process.stdin.write("\n")
            process.stdin.flush()
        assert len(list(tmp_path.glob(".out.partial-*"))) == 1
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    assert not out.exists()
    assert list(tmp_path.glob(".out.partial-*"))
    pack(parquet, out, columns=COLUMNS)
    assert sorted(os.listdir(tmp_path)) == ["out", "t.parquet"]


def test_progress_reaches_the_total(parquet: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    pack(parquet, tmp_path / "out", columns=COLUMNS, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (ROWS, ROWS)
    assert all(0 < done <= ROWS for done, _ in seen)


def test_vocabularies_read_only_the_columns_of_text(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, source = [], open_source(parquet)
    batches = type(source).batches

    def spy(self: FileSource, rows: int, names: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        asked.append(names)
        return batches(self, rows, names)

    monkeypatch.setattr(type(source), "batches", spy)
    recipes(source, {"x": "a"}, "float32")
    assert asked == []
    recipes(source, {"x": "a", "w": "word"}, "float32")
    assert asked == [["word"]]
