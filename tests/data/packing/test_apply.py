"""New rows compared, column by column, with what was packed: kept as they are, or refused with row and value."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from trainer.data.packing.apply import check_columns, check_packed, rows_like
from trainer.data.packing.pack import pack
from trainer.data.shards.index import Index
from trainer.data.sources.memory import MemorySource
from trainer.data.sources.source import open_source
from trainer.errors import UserError

OLD = {
    "n": np.arange(4),
    "f": np.arange(4.0) + 0.5,
    "b": np.array([True, False] * 2),
    "c": np.array(["7", "A", "7", "B"]),
    "year": pd.Categorical([2011, 2010, 2011, 2010]),
    "m": np.ones((4, 2)),
    "k": np.ones((4, 2), int),
}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return pack(MemorySource(OLD), tmp_path_factory.mktemp("old") / "out", held_out=0)[0]


def made(index: Index, name: str, source: Any) -> np.ndarray:
    """The rows of one column, two at a time."""
    return np.concatenate([batch[name] for batch in rows_like(index, source, [name], 2)])


@pytest.mark.parametrize(
    ("name", "new", "values", "dtype"),
    [
        ("n", [2.0, 2.5], [2.0, 2.5], "float64"),
        ("n", [2.0, 3.0], [2, 3], "int64"),
        ("n", [1e300, 2.0], [1e300, 2.0], "float64"),
        ("n", [True, False], [1, 0], "int64"),
        ("n", pd.Series([2.5, 3.0], dtype="Float64"), [2.5, 3.0], "float64"),
        ("k", [[1.0, 2.0], [1.5, 2.0]], [[1.0, 2.0], [1.5, 2.0]], "float64"),
        ("f", [1, 2], [1.0, 2.0], "float32"),
        ("f", [True, False], [1.0, 0.0], "float32"),
        ("b", [0, 1], [False, True], "bool"),
        ("b", [0.0, 1.0], [False, True], "bool"),
        ("c", [7, 7], [0, 0], "int64"),
        ("c", [7.0, 7.0], [0, 0], "int64"),
        ("c", pd.Categorical(["B", "A"]), [2, 1], "int64"),
        ("year", [2011, 2010], [1, 0], "int64"),
        ("year", [2011.0], [1], "int64"),
        ("year", ["2011"], [1], "int64"),
    ],
)
def test_values_of_another_kind_keep_their_value(index: Index, name: str, new: Any, values: list, dtype: str) -> None:
    found = made(index, name, MemorySource({name: new}))
    assert (found.tolist(), found.dtype.name) == (values, dtype)


@pytest.mark.parametrize(
    ("name", "new", "sentence"),
    [
        (
            "n",
            ["1", "x"],
            "column 'n' of 'the data' is text ('x' in row 1, counted from 0), and int in the packed table",
        ),
        ("n", [1.0, 2.0, np.nan], "column 'n' has no value in row 2"),
        ("n", np.ma.array([1, 2], mask=[0, 1]), "column 'n' has no value in row 1"),
        ("f", ["a"], "column 'f' of 'the data' is text ('a' in row 0"),
        ("f", [1.0, 2.0, np.inf], "column 'f' is infinite, or too large for float32, in row 2"),
        ("f", np.array(["2020-01-01"], "M8[s]"), "column 'f' of 'the data' holds datetime64[s]"),
        ("f", np.array([1.0, "?"], object), "column 'f' of 'the data' holds numbers and text ('?' in row 1"),
        ("b", [0, 1, 2], "column 'b' holds 2.0 in row 2 (counted from 0), and truth values in the packed table"),
        ("b", [0.5], "column 'b' holds 0.5 in row 0"),
        ("c", ["7", "7", "Z"], "column 'c' holds 'Z' in row 2 (counted from 0)"),
        ("c", [7, 8], "column 'c' holds '8' in row 1"),
        ("c", [7.5], "column 'c' holds '7.5' in row 0"),
        ("c", [True], "column 'c' of 'the data' is bool, and text in the packed table"),
        ("year", [2011, 2012], "column 'year' holds 2012 in row 1"),
        ("year", ["2009"], "column 'year' holds '2009' in row 0"),
        ("m", np.ones((2, 3)), "column 'm' of 'the data' is float of shape [3], and float of shape [2]"),
        ("m", np.ones((2, 1)), "column 'm' of 'the data' is float of shape [1], and float of shape [2]"),
        ("m", np.ones(2), "column 'm' of 'the data' is float, and float of shape [2]"),
    ],
)
def test_what_cannot_be_the_same_is_named(index: Index, name: str, new: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        made(index, name, MemorySource({name: new}))


def test_a_csv_of_digits_is_read_as_the_text_that_was_packed(index: Index, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("c,year,n,b\n7,2011,1.5,true\n7,2010,2,false\n")
    source = open_source(tmp_path / "t.csv")
    assert {name: made(index, name, source).tolist() for name in ("c", "year", "n", "b")} == {
        "c": [0, 0], "year": [1, 0], "n": [1.5, 2.0], "b": [True, False],
    }  # fmt: skip
    (tmp_path / "t.csv").write_text("c\n007\n")
    with pytest.raises(UserError, match="column 'c' holds '007' in row 0"):
        made(index, "c", open_source(tmp_path / "t.csv"))
    (tmp_path / "t.csv").write_text("n,o\n1,1\n?,2\n")
    with pytest.raises(UserError, match=r"'n' of '.*t.csv' is text \('\?' in row 1, counted from 0\)"):
        made(index, "n", open_source(tmp_path / "t.csv"))


def test_like_reads_digits_as_text_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("c\nA\n7\n")
    (tmp_path / "b.csv").write_text("c\n7\n8\n")
    pack(tmp_path / "a.csv", tmp_path / "a", held_out=0)
    assert pack(tmp_path / "b.csv", tmp_path / "b", like=tmp_path / "a")[0].column("c").vocabulary == ["7", "A", "8"]
    pack(MemorySource({"b": [True, False]}), tmp_path / "c", held_out=0)
    with pytest.raises(UserError, match="'b' of 'the data' is int, and bool in the packed table"):
        pack(MemorySource({"b": [2, 1]}), tmp_path / "d", like=tmp_path / "c")


def test_a_missing_column_is_named_with_those_that_are_close(index: Index) -> None:
    with pytest.raises(UserError, match="'the data' has no column 'year': do you mean years"):
        check_columns(index, MemorySource({"years": [1]}), ["year"])


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("m", {"m": np.ones((4, 3))}, "shape"),
        ("c", {"c": np.array(["8", "A", "8", "B"])}, "codes"),
        ("c", {"c": np.arange(4)}, "kind"),
    ],
)
def test_packed_rows_that_mean_something_else_are_refused(
    index: Index, tmp_path: Path, name: str, change: dict, what: str
) -> None:
    other, _ = pack(MemorySource({**OLD, **change}), tmp_path / "out", held_out=0)
    check_packed(index, other, [each for each in OLD if each != name])
    with pytest.raises(UserError, match=f"column '{name}' of the new shards has another {what}"):
        check_packed(index, other, [name])


def test_packed_rows_of_another_shift_or_source_are_refused(tmp_path: Path) -> None:
    table, options = {"a": np.arange(6.0), "b": np.arange(6.0) ** 2}, {"standardize": ["x"], "held_out": 0}
    one, _ = pack(MemorySource(table), tmp_path / "one", columns={"x": ["a", "b"]}, **options)
    swapped, _ = pack(MemorySource(table), tmp_path / "two", columns={"x": ["b", "a"]}, **options)
    later = {**table, "a": table["a"] + 1}
    shifted, _ = pack(MemorySource(later), tmp_path / "three", columns={"x": ["a", "b"]}, **options)
    check_packed(one, one, ["x"])
    for other, what in ((swapped, "source columns"), (shifted, "mean and sd")):
        with pytest.raises(UserError, match=f"column 'x' of the new shards has another {what}"):
            check_packed(one, other, ["x"])
