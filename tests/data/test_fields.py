"""Varying rows against lists of lists, types against what they hold, and the sentences that name a column."""

import decimal
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from trainer.data.fields import (
    LONG,
    TWICE,
    CsrRows,
    Field,
    Piece,
    RaggedRows,
    VaryingRows,
    arrow_field,
    choose,
    concatenate,
    merge,
    numpy_field,
    object_field,
    pieces_of,
    schema_fields,
)
from trainer.data.sources.memory import MemorySource
from trainer.errors import UserError

LISTS = [[1.0, 2.0], [], [3.0], [4.0, 5.0, 6.0], []]
SELECTIONS: list[Any] = [
    slice(None),
    slice(1, 4),
    slice(-2, None),
    slice(2, 2),
    slice(4, 1),
    slice(5, 9),
    np.array([3, 0, 3, 1]),
    np.array([], np.int64),
    np.array([True, False, False, True, True]),
    np.zeros(5, bool),
]


def ragged(lists: list[list[float]]) -> RaggedRows:
    return RaggedRows(np.cumsum([0, *map(len, lists)]), np.array([v for row in lists for v in row]))


def csr(lists: list[list[float]]) -> CsrRows:
    """Entry v of a row is v at 10 v."""
    rows = ragged(lists)
    return CsrRows(rows.offsets, (10 * rows.values).astype(np.int32), rows.values, 100)


def lists_of(rows: VaryingRows) -> list[list[float]]:
    assert rows.offsets[0] == 0
    assert rows.offsets[-1] == len(rows.values)
    return [rows.values[a:b].tolist() for a, b in zip(rows.offsets, rows.offsets[1:])]


@pytest.mark.parametrize("make", [ragged, csr])
@pytest.mark.parametrize("at", SELECTIONS, ids=str)
def test_rows_are_chosen_as_those_of_a_list(make: Any, at: Any) -> None:
    found = make(LISTS)[at]
    places = np.arange(len(LISTS))[at]
    assert lists_of(found) == [LISTS[i] for i in places]
    assert len(found) == len(places)
    if make is csr:
        assert found.width == 100
        assert found.indices.dtype == np.int32
        np.testing.assert_array_equal(found.indices, 10 * found.values)


def test_a_slice_shares_the_memory_and_a_mask_does_not() -> None:
    rows = ragged(LISTS)
    assert np.shares_memory(rows[2:4].values, rows.values)
    assert not np.shares_memory(rows[np.array([2, 3])].values, rows.values)


def test_entries_of_several_numbers_stay_whole() -> None:
    rows = RaggedRows(np.array([0, 1, 3]), np.arange(6).reshape(3, 2))
    np.testing.assert_array_equal(rows[np.array([1])].values, [[2, 3], [4, 5]])


@pytest.mark.parametrize("make", [ragged, csr])
def test_parts_joined_are_the_whole(make: Any) -> None:
    whole = make(LISTS)
    joined = concatenate([whole[:2], whole[2:2], whole[2:3], whole[3:]])
    assert lists_of(joined) == LISTS
    for name, entries in whole.entries.items():
        np.testing.assert_array_equal(joined.entries[name], entries)
    np.testing.assert_array_equal(concatenate([np.arange(2), np.arange(2, 5)]), np.arange(5))


@pytest.mark.parametrize(
    ("counts", "pieces"),
    [
        ([], []),
        ([0, 0], []),
        ([3], [Piece(3, 0, 1)]),
        ([4, 6, 3, 8], [Piece(10, 0, 2), Piece(11, 2, 4)]),
        ([4, 6, 3], [Piece(10, 0, 2), Piece(3, 2, 3)]),
        ([25, 1], [Piece(25, 0, 1), Piece(1, 1, 2)]),
        ([0, 12, 0], [Piece(12, 0, 2)]),
    ],
)
def test_neighbors_are_joined_until_they_have_enough_rows(counts: list[int], pieces: list[Piece]) -> None:
    found = pieces_of(counts, least=10)
    assert found == pieces
    assert sum(piece.rows for piece in found) == sum(counts)


def test_columns_are_chosen_in_the_order_asked_for() -> None:
    assert choose(["b", "a"], ["a", "b", "c"], "t") == ["b", "a"]
    assert choose(None, ["a", "b", "a"], "t") == ["a", "b"]
    assert choose([], ["a"], "t") == []


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (["price"], r"'t\.csv' has no column 'price': do you mean prices\?"),
        (["zzz"], r"'t\.csv' has no column 'zzz': it has prices, y, y\."),
        (["y"], r"'t\.csv' has two columns named 'y'"),
    ],
)
def test_a_column_that_is_not_there_once_is_named(wanted: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        choose(wanted, ["prices", "y", "y"], "t.csv")


INT, FLOAT, NULL = Field("int"), Field("float"), Field("null")


@pytest.mark.parametrize(
    ("known", "found", "both"),
    [
        (None, INT, INT),
        (NULL, INT, INT),
        (INT, NULL, INT),
        (INT, INT, INT),
        (INT, FLOAT, FLOAT),
        (FLOAT, INT, FLOAT),
        (Field("float", dtype="float32"), FLOAT, FLOAT),
        (Field("int", (2,)), Field("float", (2,)), Field("float", (2,))),
        (
            Field("csr", (9,), "uint16", 3, ("a",)),
            Field("csr", (9,), "float32", 4, ("a",)),
            Field("csr", (9,), "float32", 7, ("a",)),
        ),
        (Field("ragged", (), "int32", 1), Field("ragged", (), "float32", 0), Field("ragged", (), "float64", 1)),
    ],
)
def test_the_field_of_both_holds_both(known: Field | None, found: Field, both: Field) -> None:
    assert merge(known, found, "x", "t") == both


@pytest.mark.parametrize(
    ("known", "found", "said"),
    [
        (INT, Field("text"), "is text, and int before it"),
        (Field("bool"), INT, "is int, and bool before it"),
        (Field("int", (2,)), Field("int", (3,)), r"is int of shape \[3\], and int of shape \[2\] before it"),
        (Field("csr", (9,), "int8"), Field("csr", (8,), "int8"), r"is csr of shape \[8\]"),
    ],
)
def test_fields_that_differ_are_named(known: Field, found: Field, said: str) -> None:
    with pytest.raises(UserError, match=f"column 'x' of 't.csv' {said}"):
        merge(known, found, "x", "t.csv")


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (pa.int8(), INT),
        (pa.uint64(), INT),
        (pa.bool_(), Field("bool")),
        (pa.float16(), Field("float", dtype="float32")),
        (pa.float32(), Field("float", dtype="float32")),
        (pa.float64(), FLOAT),
        (pa.decimal128(9, 2), FLOAT),
        (pa.string(), Field("text")),
        (pa.large_string(), Field("text")),
        (pa.dictionary(pa.int8(), pa.string()), Field("text")),
        (pa.dictionary(pa.int8(), pa.float64()), Field("text")),
        (pa.list_(pa.float32(), 3), Field("float", (3,), "float32")),
        (pa.list_(pa.list_(pa.int8(), 2), 3), Field("int", (3, 2))),
        (pa.date32(), Field("date32[day]")),
        (pa.timestamp("ns", "UTC"), Field("timestamp[ns, tz=UTC]")),
    ],
    ids=str,
)
def test_arrow_types(kind: pa.DataType, field: Field) -> None:
    assert arrow_field(kind) == field


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float32()),
        pa.list_(pa.string(), 3),
        pa.struct([("a", pa.int8())]),
        pa.dictionary(pa.int8(), pa.bool_()),
    ],
)
def test_other_arrow_types_are_in_words(kind: pa.DataType) -> None:
    assert arrow_field(kind) == Field(str(kind))


def test_two_columns_of_one_name_have_no_type() -> None:
    schema = pa.schema([("a", pa.int8()), ("b", pa.float64()), ("a", pa.string())])
    assert schema_fields(schema, ["b", "a"]) == {"b": FLOAT, "a": Field(TWICE)}


@pytest.mark.parametrize(
    ("dtype", "shape", "field"),
    [
        ("f2", (), Field("float", (), "float32")),
        ("f4", (3,), Field("float", (3,), "float32")),
        ("f8", (3,), Field("float", (3,))),
        (">i2", (), INT),
        ("u8", (), INT),
        ("?", (2, 2), Field("bool", (2, 2))),
        ("U5", (), Field("text")),
        ("S5", (), Field("text")),
        ("U5", (2,), Field("text of shape [2]", (2,))),
        ("c16", (), Field("complex128")),
        ("M8[s]", (), Field("datetime64[s]")),
    ],
)
def test_numpy_types(dtype: str, shape: tuple[int, ...], field: Field) -> None:
    assert numpy_field(np.dtype(dtype), shape) == field


NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([], "null"),
        ([None, NAN, pd.NA, pd.NaT], "null"),
        ([1, None, 2], "int"),
        ([NAN, 1, 2.5], "float"),
        ([decimal.Decimal("0.5")], "float"),
        ([None, True, np.bool_(False)], "bool"),
        (["a", pd.NA], "text"),
        ([2**63 - 1, -(2**63)], "int"),
        ([2**63, -1], LONG),
        ([0, -(2**63) - 1], LONG),
        ([1, "a"], "numbers and text ('a' in row 8, counted from 0)"),
        ([None, True, 1], "truth values and numbers ('1' in row 9, counted from 0)"),
        ([pd.NA, "b" * 30, 0.5, 1], "text and numbers ('0.5' in row 9, counted from 0)"),
        ([1j], "complex"),
        ([np.eye(2), np.eye(3)], "list<item: double>"),
    ],
    ids=str,
)
def test_python_objects(values: list[Any], kind: str) -> None:
    assert object_field(values, first_row=7).kind == kind


def objects(*values: Any) -> np.ndarray:
    made = np.empty(len(values), object)
    made[:] = values
    return made


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (objects(2**70, 1), LONG),
        (objects(-1, 2**63), LONG),
        (objects(2**70, "a"), "numbers and text"),
        (objects(np.eye(2), np.eye(3)), "list<"),
        (objects(pd.NA, 1, "a"), "numbers and text"),
    ],
    ids=["long", "no one type", "long and text", "matrices", "NA"],
)
@pytest.mark.parametrize("frame", [False, True])
def test_objects_that_are_no_column_stop_nothing_but_their_column(column: np.ndarray, kind: str, frame: bool) -> None:
    data: dict[str, Any] = {"x": column, "y": np.arange(len(column))}
    assert MemorySource(pd.DataFrame(data) if frame else data).fields["x"].kind.startswith(kind)
