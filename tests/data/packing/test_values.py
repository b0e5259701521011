"""A source column as numbers and which of them are missing, against the values written out."""

import decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from trainer.data.packing.values import as_codes, as_numbers, as_words, in_row
from trainer.errors import UserError

BIG = 2**63 - 1


@pytest.mark.parametrize(
    ("flags", "rows"),
    [
        (np.array([True, False]), [True, False]),
        (np.array([[False, False], [False, True]]), [False, True]),
        (np.zeros((2, 1, 3), bool), [False, False]),
        (np.zeros((1, 0), bool), [False]),
    ],
)
def test_a_row_has_a_flag_where_any_of_its_values_has(flags: np.ndarray, rows: list[bool]) -> None:
    assert in_row(flags).tolist() == rows


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (np.array(["a", "é"]), ["a", "é"]),
        (np.array(["a", "é"]).astype("U2").view(np.ndarray), ["a", "é"]),
        (np.char.encode(np.array(["a", "é"]), "utf-8"), ["a", "é"]),
        (np.array([0.5, np.nan]), [0.5, None]),
        (pa.array(["a", None]), ["a", None]),
        (pa.array(["b", "a", None, "b"]).dictionary_encode(), ["b", "a", None, "b"]),
        (pa.array([0.5, np.nan, None]), [0.5, None, None]),
        (pa.array([7, None]), [7, None]),
    ],
    ids=["U", "U2", "utf-8", "float", "text", "codes", "nan", "int"],
)
def test_words(raw: Any, words: list[Any]) -> None:
    assert as_words(raw).to_pylist() == words


@pytest.mark.parametrize(
    ("raw", "vocabulary", "codes"),
    [
        (pa.array(["b", None, "a"]), ["a", "b"], [1, None, 0]),
        (np.array(["b", "a"]), ["a", "b"], [1, 0]),
        (pa.array(["b", "a"]).dictionary_encode(), ["z", "a", "b"], [2, 1]),
        (pa.array(["b"], pa.large_string()), ["a", "b"], [1]),
        (np.array([3, 1]), [1, 3], [1, 0]),
        (np.array([3, 1], np.int8), [1, 3], [1, 0]),
        (np.array([3.0, np.nan]), [1, 3], [1, None]),  # as a column with a missing value has its integers
        (np.array([3.0, 1.0]), ["1", "3"], [1, 0]),
        (np.array([3, 1]), ["1", "3"], [1, 0]),
        (np.array([3, 1]), [0.5, 1.0, 3.0], [2, 1]),
        (np.array([0.5]), [0.5, 1.0], [0]),
        (pa.array([], pa.string()), ["a"], []),
    ],
    ids=str,
)
def test_codes_are_places_in_the_vocabulary(raw: Any, vocabulary: list[Any], codes: list[int | None]) -> None:
    found, absent = as_codes(raw, "x", vocabulary, 0)
    assert found.dtype == np.int64
    assert absent.tolist() == [code is None for code in codes]
    assert [None if lacks else code for code, lacks in zip(found.tolist(), absent)] == codes


@pytest.mark.parametrize(
    ("raw", "vocabulary", "word"),
    [
        (pa.array(["a", None, "c", "d"]), ["a", "b"], "'c'"),
        (np.array([1, 1, 2]), [1, 3], "2"),
        (np.array([1.0, 3.0, 1.5]), [1, 3], "'1.5'"),
    ],
)
def test_a_new_word_is_named_with_its_row(raw: Any, vocabulary: list[Any], word: str) -> None:
    with pytest.raises(UserError, match=rf"column 'x' holds {word} in row 102 \(counted from 0\)"):
        as_codes(raw, "x", vocabulary, 100)


@pytest.mark.parametrize(
    ("raw", "dtype", "values", "absent"),
    [
        (np.array([1, 2], np.int8), "int64", [1, 2], [0, 0]),
        (np.array([-(2**63), BIG]), "int64", [-(2**63), BIG], [0, 0]),
        (np.array([BIG], np.uint64), "int64", [BIG], [0]),
        (np.array([0.1]), "float32", [np.float32(0.1)], [0]),
        (np.array([1e300, -1e300]), "float32", [np.inf, -np.inf], [0, 0]),
        (pa.array([1, None, 3]), "int64", [1, 0, 3], [0, 1, 0]),
        (pa.array([BIG, None]), "int64", [BIG, 0], [0, 1]),
        (pa.array([True, None]), "bool", [True, False], [0, 1]),
        (pa.array([0.5, None]), "float64", [0.5, 0.0], [0, 1]),
        (pa.array([decimal.Decimal("1.25"), None]), "float64", [1.25, 0.0], [0, 1]),
        (pa.array([3, None, 3]).dictionary_encode(), "int64", [3, 0, 3], [0, 1, 0]),
        (pa.array([[1, 2], None, [3, None]], pa.list_(pa.int32(), 2)), "int64", [[1, 2], [0, 0], [3, 0]], [0, 1, 1]),
        (
            pa.array([[[1.0], [2.0]], [[3.0], None]], pa.list_(pa.list_(pa.float64(), 1), 2)),
            "float32", [[[1.0], [2.0]], [[3.0], [0.0]]], [0, 1],
        ),
        (pa.array([], pa.int64()), "int64", [], []),
        (pa.array([[1, 2]] * 3, pa.list_(pa.int8(), 2)).slice(1, 1), "int64", [[1, 2]], [0]),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_and_what_is_missing(raw: Any, dtype: str, values: list[Any], absent: list[int]) -> None:
    found, lacks = as_numbers(raw, "x", dtype, 0)
    assert found.dtype == dtype
    assert found.tolist() == np.array(values, dtype).tolist()
    assert lacks.astype(int).tolist() == absent


def test_of_a_slice_the_rows_of_the_slice_are_taken() -> None:
    """Lists keep the values of all rows behind a slice."""
    lists = pa.array([[1, 2], None, [5, 6], None, [9, 10]], pa.list_(pa.int64(), 2))
    for first in range(5):
        for count in range(6 - first):
            found, absent = as_numbers(lists.slice(first, count), "x", "int64", 0)
            want = lists.to_pylist()[first : first + count]
            assert [None if lacks else row for row, lacks in zip(found.tolist(), absent)] == want


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_an_integer_beyond_int64_is_named_with_its_row(shape: tuple[int, ...]) -> None:
    values = np.array([0, 1, 2**63, 2**64 - 1], np.uint64).reshape(shape)
    row = 100 + (2 if len(shape) == 1 else 1)
    with pytest.raises(UserError, match=rf"column 'x' holds an integer above .* in row {row} "):
        as_numbers(values, "x", "int64", 100)
    assert as_numbers(values, "x", "float64", 100)[0].max() == 2.0**64
