"""What columns of every kind become in a packed table: their values, their type, and what is missing."""

import datetime
import decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.data.packing.pack import pack
from trainer.data.packing.parts import PartOf, Parts
from trainer.data.shards.folder import ShardFolder
from trainer.data.shards.index import Index
from trainer.data.sources.memory import MemorySource
from trainer.errors import UserError

LEVELS = ["lo", "mid", "hi"]


def packed(table: Any, out: Path, **options: Any) -> tuple[Index, dict[str, np.ndarray]]:
    """The index, and the columns in the order of the source."""
    source = table if isinstance(table, Path) else MemorySource(table)
    index, _ = pack(source, out, held_out=0, **options)
    return index, columns_of(out)


def columns_of(out: Path) -> dict[str, np.ndarray]:
    folder = ShardFolder(out / "train")
    found = {
        c.name: np.concatenate([folder.read_block(b, c.name) for b in range(len(folder.block_rows))])
        for c in folder.index.columns
    }
    order = np.argsort(found["row_id"])
    return {name: values[order] for name, values in found.items()}


@pytest.mark.parametrize(
    ("column", "dtype", "values"),
    [
        (np.array([True, False, True]), "bool", [True, False, True]),
        (np.array([1, 2, 3], np.uint64), "int64", [1, 2, 3]),
        (np.array([1, 2, 3], ">i4"), "int64", [1, 2, 3]),
        (np.array([1.5, 2, 3], ">f8"), "float32", [1.5, 2.0, 3.0]),
        (np.array([1.5, 2, 3], np.float16), "float32", [1.5, 2.0, 3.0]),
        (np.array([1.5, 2, 3], np.longdouble), "float32", [1.5, 2.0, 3.0]),
        (np.ma.array([1.5, 2, 3], mask=False), "float32", [1.5, 2.0, 3.0]),
        ([decimal.Decimal("1.5"), decimal.Decimal(2), decimal.Decimal(3)], "float32", [1.5, 2.0, 3.0]),
        (pd.Series([1, 2, 3], dtype="Int16"), "int64", [1, 2, 3]),
        (pd.Series([True, False, True], dtype="boolean"), "bool", [True, False, True]),
        (pd.Series([1.5, 2, 3], dtype="Float32"), "float32", [1.5, 2.0, 3.0]),
        (pd.Series([1, 0, 3]).astype(pd.SparseDtype(float)), "float32", [1.0, 0.0, 3.0]),
        (pl.Series([1, 2, 3]), "int64", [1, 2, 3]),
        (pa.array([1, 2, 3]), "int64", [1, 2, 3]),
        ([1, 2.5, 3], "float32", [1.0, 2.5, 3.0]),
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}",
)
def test_numbers_and_truth_values_keep_their_kind(tmp_path: Path, column: Any, dtype: str, values: list) -> None:
    index, found = packed({"x": column}, tmp_path / "out")
    assert (index.column("x").dtype, found["x"].tolist()) == (dtype, values)


@pytest.mark.parametrize(
    ("table", "dtype", "left"),
    [
        ({"x": np.ma.array([1.0, 9.0, 3.0], mask=[0, 1, 0])}, "float32", [1.0, 3.0]),
        ({"x": np.ma.array([1, 9, 3], mask=[0, 1, 0])}, "int64", [1, 3]),
        ({"x": np.ma.array([True, True, False], mask=[0, 1, 0])}, "bool", [True, False]),
        ({"x": np.ma.array([[1, 2], [3, 9], [5, 6]], mask=[[0, 0], [0, 1], [0, 0]])}, "int64", [[1, 2], [5, 6]]),
        ({"x": np.ma.array(["a", "b", "c"], mask=[0, 1, 0])}, "int64", [0, 1]),
        ({"x": pd.Series([1, None, 3], dtype="Int64")}, "int64", [1, 3]),
        (pd.DataFrame({"x": pd.Series([1, None, 3], dtype="Int64")}), "int64", [1, 3]),
        (pd.DataFrame({"x": pd.Series([True, None, False], dtype="boolean")}), "bool", [True, False]),
        (pd.DataFrame({"x": pd.Series([1.5, None, 2], dtype="Float64")}), "float32", [1.5, 2.0]),
        ({"x": pd.array([True, None, False], dtype="bool[pyarrow]")}, "bool", [True, False]),
        ({"x": pd.Categorical(["b", None, "a"])}, "int64", [1, 0]),
        ({"x": [1, None, 3]}, "int64", [1, 3]),
        ({"x": ["b", None, "a"]}, "int64", [1, 0]),
        ({"x": np.array(["b", np.nan, "a"], object)}, "int64", [1, 0]),
        (pa.table({"x": pa.array([decimal.Decimal("1.5"), None, 2], pa.decimal128(5, 2))}), "float32", [1.5, 2.0]),
        (pl.DataFrame({"x": [1, None, 3]}), "int64", [1, 3]),
    ],
)
def test_a_missing_value_is_an_error_or_dropped_and_never_a_number(
    tmp_path: Path, table: Any, dtype: str, left: list
) -> None:
    with pytest.raises(UserError, match=r"no value for 'x' in row 1 \(counted from 0\)"):
        packed(table, tmp_path / "out")
    index, found = packed(table, tmp_path / "out", missing="drop")
    assert (index.column("x").dtype, found["x"].tolist(), index.meta["dropped"]) == (dtype, left, 1)


@pytest.mark.parametrize(
    ("column", "words", "codes"),
    [
        (pd.Categorical(["hi", "lo"], LEVELS, ordered=True), LEVELS, [2, 0]),
        (pd.Series(["hi", "lo"], dtype=pd.CategoricalDtype(LEVELS, ordered=True)), LEVELS, [2, 0]),
        (pd.Series(["lo", "hi"], dtype=pd.CategoricalDtype(LEVELS)), ["hi", "lo"], [1, 0]),
        (pd.Categorical([2011, 2010]), [2010, 2011], [1, 0]),
        (pd.Categorical([3, 1], [3, 1], ordered=True), [3, 1], [0, 1]),
        (pd.Categorical([0.5, 2.5]), [0.5, 2.5], [0, 1]),
        (pd.Categorical([True, False]), ["False", "True"], [1, 0]),
        (pd.cut(pd.Series([9, 1]), [0, 4, 6, 10]), ["(0, 4]", "(4, 6]", "(6, 10]"], [2, 0]),
        (pl.Series(["hi", "lo"], dtype=pl.Enum(LEVELS)), LEVELS, [2, 0]),
        (pl.Series(["lo", "hi"], dtype=pl.Categorical), ["hi", "lo"], [1, 0]),
        (np.array([b"lo", b"hi"]), ["hi", "lo"], [1, 0]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_categories_become_codes_and_ordered_ones_keep_their_order(
    tmp_path: Path, column: Any, words: list, codes: list
) -> None:
    index, found = packed({"x": column}, tmp_path / "out")
    assert (index.column("x").vocabulary, found["x"].tolist()) == (words, codes)
    again, _ = packed({"x": column}, tmp_path / "like", like=tmp_path / "out")
    assert again.column("x").vocabulary == words


def test_the_order_of_categories_outlives_a_parquet_file_of_several_row_groups(tmp_path: Path) -> None:
    levels = pd.Categorical(["hi"] * 5 + ["lo"] * 5, LEVELS, ordered=True)
    pq.write_table(pa.Table.from_pandas(pd.DataFrame({"x": levels})), tmp_path / "t.parquet", row_group_size=5)
    index, found = packed(tmp_path / "t.parquet", tmp_path / "out")
    assert (index.column("x").vocabulary, found["x"].tolist()) == (LEVELS, [2] * 5 + [0] * 5)


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (np.array([1, 2**63 + 5], np.uint64), "holds an integer above 2**63 - 1 in row 1"),
        (np.array([1j, 2]), "holds complex128"),
        (np.array(["2020-01-01", "2020-01-02"], "M8[s]"), "count the seconds or days"),
        (pd.to_timedelta([1, 2], unit="s"), "count the seconds or days"),
        ([datetime.date(2020, 1, 1)] * 2, "count the seconds or days"),
        (np.array([1.0, "?"], object), "holds numbers and text ('?' in row 1, counted from 0)"),
        (np.array([True, 2], object), "holds truth values and numbers ('2' in row 1, counted from 0)"),
        ([None, None], "holds no value in any row"),
        ([b"a", None], "holds binary"),
    ],
    ids=str,
)
def test_what_is_no_column_is_refused_where_it_is_used_and_nowhere_else(tmp_path: Path, column: Any, said: str) -> None:
    table = {"bad": column, "y": [1.0, 2.0]}
    with pytest.raises(UserError) as error:
        packed(table, tmp_path / "out", columns={"x": "bad"})
    assert "column 'bad'" in str(error.value)
    assert said in str(error.value)
    assert packed(table, tmp_path / "out", columns={"y": "y"})[1]["y"].tolist() == [1.0, 2.0]
    frame = pd.DataFrame({"bad": pd.Series(list(column), dtype=getattr(column, "dtype", object)), "y": [1.0, 2.0]})
    assert packed(frame, tmp_path / "frame", columns={"y": "y"})[1]["y"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("kind", ["frame", "arrow", "parquet", "csv"])
def test_two_columns_of_one_name_are_refused_where_they_are_used(tmp_path: Path, kind: str) -> None:
    arrow = pa.table([pa.array([1, 2]), pa.array([3, 4]), pa.array([5, 6])], names=["a", "a", "b"])
    table: Any = {"arrow": arrow, "frame": arrow.to_pandas()}.get(kind, tmp_path / f"t.{kind}")
    if kind == "parquet":
        pq.write_table(arrow, table)
    if kind == "csv":
        table.write_text("a,a,b\n1,3,5\n2,4,6\n")
    with pytest.raises(UserError, match="two columns named 'a': rename one of them"):
        packed(table, tmp_path / "out")
    assert packed(table, tmp_path / "out", columns={"b": "b"})[1]["b"].tolist() == [5, 6]


SECONDS = 1.7e9 + 10.0 * np.arange(60) + 0.25


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (SECONDS, "float64"),
        (1e6 * np.arange(60.0) + 1e9, "float32"),  # whole numbers that float32 holds
        (np.linspace(-3, 3, 60), "float32"),
        (np.linspace(2000, 2001, 60), "float64"),  # 3,400 sds from 0
        (np.array([*np.linspace(0, 1, 59), 1e39]), "float64"),  # beyond float32
        (np.full(60, 0.1), "float32"),  # constant: nothing to tell apart
        (SECONDS.astype(np.float32), "float32"),
        (np.stack([np.linspace(0, 1, 60), SECONDS], 1), "float64"),
        ([decimal.Decimal(f"{v:.2f}") for v in SECONDS], "float64"),
    ],
)
def test_float64_stays_where_float32_would_round_by_a_millionth_of_the_sd(
    tmp_path: Path, values: Any, dtype: str
) -> None:
    index, found = packed({"x": values}, tmp_path / "out")
    exact = np.array(values, dtype=np.float64)
    assert index.column("x").dtype == dtype
    assert np.array_equal(found["x"], exact.astype(dtype))
    forced, _ = packed({"x": np.linspace(0, 1, 60)}, tmp_path / "forced", float_dtype="float64")
    assert forced.column("x").dtype == "float64"


def test_a_stack_with_large_integers_keeps_them(tmp_path: Path) -> None:
    table = {"t": SECONDS.astype(np.int64), "a": np.linspace(0, 1, 60).astype(np.float32), "n": np.arange(60)}
    index, found = packed(table, tmp_path / "out", columns={"x": ["a", "t"], "z": ["a", "n"]})
    assert (index.column("x").dtype, index.column("z").dtype) == ("float64", "float32")
    assert np.array_equal(found["x"][:, 1], table["t"])


def test_parts_workers_and_memory_agree_on_the_type(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 5000)
    values[4321] = 40.00000123  # the only one, in the last piece
    pq.write_table(pa.table({"x": values, "y": np.linspace(0, 1, 5000)}), tmp_path / "t.parquet", row_group_size=500)
    whole, _ = pack(tmp_path / "t.parquet", tmp_path / "out")
    assert (whole.column("x").dtype, whole.column("y").dtype) == ("float64", "float32")
    small, _ = pack(tmp_path / "t.parquet", tmp_path / "small", memory_bytes=1 << 16, workers=2)
    parts = Parts(tmp_path / "parts")
    for part in (1, 2):
        parts.read(tmp_path / "t.parquet", PartOf(part, 2))
    assert whole.digest == small.digest == parts.finish()[0].digest


def test_a_held_out_row_beyond_float32_is_not_made_infinite(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 50)
    values[-1] = 1e300
    train, held = pack(MemorySource({"x": values}), tmp_path / "out", split_time="x", split_after=2)
    assert held is not None
    assert train.column("x").dtype == "float64"
    assert ShardFolder(tmp_path / "out" / "held_out").read_block(0, "x").tolist() == [1e300]


def test_what_cannot_be_packed_is_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    table = {
        "x": np.arange(6.0),
        "gap": np.array([1.0, np.nan, 1, 1, 1, 1]),
        "wide": np.array([1.0, np.inf, 1, 1, 1, 1]),
        "day": np.array(["2020-01-01"] * 6, "M8[D]"),
        "a b": np.arange(6),
        "row_id": np.arange(6),
        "mixed": np.array([1, "?", 1, 1, 1, 1], object),
    }
    index, found = packed(table, tmp_path / "out", spare=True)
    assert [column.name for column in index.columns] == ["x", "row_id"]
    assert found["x"].tolist() == list(range(6))
    spared = index.meta["spared"]
    assert set(spared) == set(table) - {"x"}
    assert "no value for 'gap' in row 1" in spared["gap"]
    assert "'wide' is infinite" in spared["wide"]
    assert "spared" not in packed({"x": table["x"]}, tmp_path / "plain", spare=True)[0].meta
    with pytest.raises(UserError, match="holds datetime64"):
        packed({"day": table["day"]}, tmp_path / "none", spare=True)


def test_numbers_that_are_names_become_codes(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("c,y\n00501,1\n10001,2\n00501,3\n")
    for table, words in (
        (tmp_path / "t.csv", ["00501", "10001"]),
        ({"c": np.array([501, 10001, 501])}, [501, 10001]),
        (pd.DataFrame({"c": pd.Series([501, 10001, 501], dtype="Int64")}), [501, 10001]),
        ({"c": np.array([0.5, 1.5, 0.5])}, [0.5, 1.5]),
    ):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        index, found = packed(table, out, columns={"k": "c"}, categories=["c"])
        assert (index.column("k").vocabulary, found["k"].tolist()) == (words, [0, 1, 0])
        again, _ = packed(table, out.with_suffix(".like"), like=out)
        assert again.column("k").vocabulary == words
    with pytest.raises(UserError, match=r"categories=\[c\] names a column of neither text nor single numbers"):
        packed({"c": np.ones((2, 2))}, tmp_path / "no", categories=["c"])
