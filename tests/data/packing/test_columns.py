"""Recipes of shard columns: what they are made of, what they refuse, and the values that they write."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from trainer.data.fields import NOT_UTF8, CsrRows, Field, RaggedRows
from trainer.data.packing.columns import Recipe, check_usable, recipes, source_columns, vocabularies
from trainer.data.sources.memory import MemorySource
from trainer.errors import UserError

CSR = CsrRows(np.array([0, 2, 2, 3]), np.array([4, 0, 1]), np.array([1.0, 2.0, 3.0]), 5)
SOURCE = MemorySource(
    {
        "i": np.array([1, 2, 3], np.int16),
        "f": np.array([0.5, 1.5, 2.5]),
        "g": np.array([0.5, 1.5, 2.5], np.float32),
        "b": np.array([True, False, True]),
        "t": np.array(["b", "a", "b"]),
        "v": np.arange(6.0).reshape(3, 2),
        "s": CSR,
        "r": RaggedRows(np.array([0, 1, 1, 3]), np.array([1, 2, 3], np.int32)),
        "bad name": np.arange(3),
        "d": pa.array([None, None, None]),
    }
)


def made(columns: Any, float_dtype: str | None = None, **options: Any) -> Recipe:
    (recipe,) = recipes(SOURCE, columns, float_dtype, **options)
    return recipe


@pytest.mark.parametrize(
    ("columns", "recipe"),
    [
        ({"x": "i"}, Recipe("x", ("i",), False, (), "int64")),
        ({"x": "b"}, Recipe("x", ("b",), False, (), "bool")),
        ({"x": "f"}, Recipe("x", ("f",), False, (), "float64", follows=True)),
        ({"x": "g"}, Recipe("x", ("g",), False, (), "float32")),
        ({"x": "v"}, Recipe("x", ("v",), False, (2,), "float64", follows=True)),
        ({"x": "t"}, Recipe("x", ("t",), False, (), "int64", ["a", "b"])),
        ({"x": ["i", "f"]}, Recipe("x", ("i", "f"), True, (2,), "float64", follows=True)),
        ({"x": ["b", "g"]}, Recipe("x", ("b", "g"), True, (2,), "float32")),
        ({"x": ["i"]}, Recipe("x", ("i",), True, (1,), "float64", follows=True)),
        ({"x": "s"}, Recipe("x", ("s",), False, (5,), "float64", kind="csr", follows=True)),
        ({"x": "r"}, Recipe("x", ("r",), False, (), "int32", kind="ragged")),
    ],
    ids=str,
)
def test_what_a_column_becomes(columns: Any, recipe: Recipe) -> None:
    assert made(columns) == recipe
    for dtype in ("float32", "float64"):
        floats = recipe.follows or recipe.dtype == "float32"
        assert made(columns, dtype) == replace(recipe, dtype=dtype if floats else recipe.dtype, follows=False)


def test_what_is_to_be_standardized_is_carried_in_float64() -> None:
    assert made({"x": "g"}, "float32", wide=["x"]).dtype == "float64"
    assert made({"x": "b"}, wide=["x"]).dtype == "float64"
    assert made({"x": "i"}, wide=["x"]).dtype == "int64"


def test_numbers_are_categories_where_they_are_said_to_be() -> None:
    assert made({"x": "i"}, categories=["i"]).vocabulary == [1, 2, 3]
    assert made({"x": "f"}, categories=["x"]).vocabulary == [0.5, 1.5, 2.5]
    with pytest.raises(UserError, match=r"categories=\[v\] names a column of neither text nor single numbers"):
        made({"x": "v"}, categories=["x"])


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"x": "ii"}, "has no column 'ii': do you mean i?"),
        ({"a b": "i"}, "'a b' cannot name an argument"),
        ({"é": "i"}, "'é' cannot name an argument"),
        ({"x" * 65: "i"}, "cannot name an argument"),
        ({"x": ["f", "t"]}, "'t' in columns.x holds text; give it a column of its own (columns.x_t=t)"),
        ({"x": ["f", "v"]}, "'v' in columns.x has rows of shape [2]"),
        ({"x": ["f", "s"]}, "column 's' of 'the data' holds csr"),
        ({"x": "d"}, "column 'd' of 'the data' holds no value in any row"),
        ({"x": []}, "columns.x names no source column"),
        ({"x": ""}, "columns.x names no source column"),
    ],
)
def test_what_cannot_be_a_column_is_named(columns: Any, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        made(columns)


def test_what_cannot_be_a_column_is_left_out_where_that_may_be() -> None:
    spared: dict[str, str] = {}
    found = recipes(SOURCE, None, None, spared=spared)
    assert [recipe.name for recipe in found] == ["i", "f", "g", "b", "t", "v", "s", "r"]
    assert list(spared) == ["bad name", "d"]
    assert "'bad name' cannot name an argument" in spared["bad name"]
    assert "holds no value in any row" in spared["d"]


@pytest.mark.parametrize(
    ("field", "said"),
    [
        (Field("timestamp[ns]"), "holds timestamp[ns], and neither numbers, truth values nor text: count the seconds"),
        (Field("date32[day]"), "count the seconds or days"),
        (Field("struct<a: int8>"), "cast it, or leave it out"),
        (
            Field("list<item: double>"),
            "give each entry a row of its own, beside a column that says",
        ),
        (Field(NOT_UTF8), "save the file as UTF-8"),
        (Field("numbers and text ('a' in row 1, counted from 0)"), "('a' in row 1, counted from 0): make them one"),
        (Field("twice"), "'the data' has two columns named 'x'"),
        (Field("float", (0,)), "has rows of no numbers"),
    ],
)
def test_a_field_that_cannot_be_used_comes_with_its_remedy(field: Field, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        check_usable("x", field, SOURCE)


def test_the_source_columns_are_those_that_are_named_in_order() -> None:
    assert source_columns({"x": ["b", "a"], "y": "c", "z": ("b",)}) == ["b", "a", "c", "b"]
    with pytest.raises(UserError, match=r"columns\.x names no source column"):
        source_columns({"x": ["a", 3]})  # type: ignore[list-item]


def test_a_stack_has_its_parts_side_by_side() -> None:
    recipe = made({"x": ["i", "f", "b"]}, "float64")
    out = np.full((3, 3), -1.0)
    assert recipe.fill(out, next(SOURCE.batches(10)), 0) == {}
    np.testing.assert_array_equal(out, [[1, 0.5, 1], [2, 1.5, 0], [3, 2.5, 1]])


def test_rows_that_miss_a_value_are_told_by_the_column_that_lacks_it() -> None:
    recipe = Recipe("x", ("a", "b"), True, (2,), "float32")
    batch = {"a": np.array([1.0, np.nan, 3.0]), "b": pa.array([1, None, None])}
    missing = recipe.fill(np.empty((3, 2), np.float32), batch, 0)
    assert {name: rows.tolist() for name, rows in missing.items()} == {
        "a": [False, True, False],
        "b": [False, True, True],
    }
    words = Recipe("t", ("t",), False, (), "int64", ["a"])
    out = np.full(2, -1)
    assert words.fill(out, {"t": pa.array([None, "a"])}, 0)["t"].tolist() == [True, False]
    assert out.tolist() == [0, 0]


@pytest.mark.parametrize(("dtype", "value"), [("float32", np.inf), ("float32", 1e39), ("float64", -np.inf)])
def test_an_infinite_number_is_named_with_its_row(dtype: str, value: float) -> None:
    recipe = Recipe("x", ("a",), False, (2,), dtype)
    batch = {"a": np.array([[1.0, 2.0], [np.nan, 0.0], [0.0, value]])}
    with pytest.raises(UserError, match=rf"column 'a' is infinite, or too large for {dtype}, in row 102 "):
        recipe.fill(np.empty((3, 2), dtype), batch, 100)


def test_sparse_rows_keep_their_places_and_take_their_type() -> None:
    recipe = made({"x": "s"}, "float32")
    rows, missing = recipe.varying({"s": CSR}, 0)
    assert (rows.values.dtype, missing) == (np.float32, {})
    np.testing.assert_array_equal(rows.offsets, CSR.offsets)
    lacking = replace(CSR, values=np.array([1.0, 2.0, np.nan]))
    assert recipe.varying({"s": lacking}, 0)[1]["s"].tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"indices": np.array([4, 0, 5])}, "an index outside 0 to 4 in row 102"),
        ({"indices": np.array([-1, 0, 1])}, "an index outside 0 to 4 in row 100"),
        ({"values": np.array([1.0, 2.0, 1e39])}, "infinite, or too large for float32, in row 102"),
    ],
)
def test_a_wrong_entry_is_named_with_its_row(change: dict[str, np.ndarray], said: str) -> None:
    with pytest.raises(UserError, match=f"column 's' (has|is) {said}"):
        made({"x": "s"}, "float32").varying({"s": replace(CSR, **change)}, 100)


def test_vocabularies_are_sorted_or_in_their_own_order() -> None:
    table = pd.DataFrame(
        {
            "t": ["b", None, "a", "b"],
            "o": pd.Categorical(["lo", "hi", None, "lo"], ["lo", "mid", "hi"], ordered=True),
            "u": pd.Categorical(["lo", "hi", None, "lo"], ["lo", "mid", "hi"]),
            "n": [10, 9, 10, 9],
        }
    )
    assert vocabularies(MemorySource(table), ["t", "o", "u", "n"]) == {
        "t": ["a", "b"],
        "o": ["lo", "mid", "hi"],
        "u": ["hi", "lo"],
        "n": [9, 10],
    }
    assert vocabularies(MemorySource(table), []) == {}
