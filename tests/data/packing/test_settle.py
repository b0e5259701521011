"""What is to become of a table: what options and columns make of it, and which do not go together."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from trainer.data.fields import CsrRows, RaggedRows
from trainer.data.packing.ingest import Table
from trainer.data.packing.settle import Packing, settle
from trainer.data.sources.memory import MemorySource
from trainer.errors import UserError

TABLE: dict[str, Any] = {
    "x": np.array([0.5, 1.5, 2.5]),
    "n": np.array([1, 2, 3]),
    "t": np.array(["b", "a", "b"]),
    "g": np.array([1.5, 2.5, 2.5]),
    "v": np.zeros((3, 2)),
}
SPARSE = CsrRows(np.array([0, 2, 2, 3]), np.array([4, 0, 1]), np.array([1.0, 2.0, 3.0]), 5)


def settled(table: dict[str, Any] | None = None, **options: Any) -> Table:
    return settle(MemorySource(table or TABLE), Packing(**options))[1]


def test_every_column_is_packed_under_its_own_name() -> None:
    table = settled()
    assert [recipe.name for recipe in table.recipes] == list(TABLE)
    assert (table.rows, table.group, table.weighted, table.spared, table.mixed) == (3, None, False, None, {})
    assert (table.split.share, table.split.parts, table.seed, table.drop) == (0.1, (), 0, False)


def test_both_spellings_standardize_in_float64() -> None:
    table = settled(columns={"x": "x", "g": "g"}, standardize=["x"], standardise=["g"], float_dtype="float32")
    assert table.standardize == ("x", "g")
    assert [recipe.dtype for recipe in table.recipes] == ["float64", "float64"]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"split_by": "t"}, ("t",)),
        ({"split_by": "n"}, ("n",)),
        ({"split_time": "x", "split_after": 2}, ("x",)),
        ({}, ()),
    ],
)
def test_the_split_reads_what_it_is_by(options: dict[str, Any], parts: tuple[str, ...]) -> None:
    split = settled(held_out=0.25, seed=9, **options).split
    assert (split.parts, split.share, split.seed) == (parts, 0.25, 9)


def test_a_group_has_the_codes_of_its_words() -> None:
    group = settled(columns={"x": "x"}, group_by="t").group
    assert group is not None
    assert (group.parts, group.vocabulary) == (("t",), ["a", "b"])


def test_a_column_of_weights_is_weights_where_it_is_asked_for() -> None:
    table = {**TABLE, "weight": np.ones(3)}
    assert not settled(table).weighted
    assert settled(table, columns={"x": "x", "weight": "weight"}).weighted


def test_entries_of_sparse_rows_count_in_the_bytes_of_a_row() -> None:
    plain = settled({"x": np.zeros(3)})
    sparse = settled({"x": np.zeros(3), "s": SPARSE, "r": RaggedRows(np.array([0, 3, 3, 3]), np.zeros(3))})
    assert sparse.entry_bytes > plain.entry_bytes == 0
    assert sparse.row_bytes > plain.row_bytes


def test_codes_of_numbers_are_said_unless_they_are_meant() -> None:
    coded = {"c": pa.array([10, 20, 10]).dictionary_encode(), "d": pa.array([1, 0, 1]).dictionary_encode()}
    said = settled(coded).mixed
    assert list(said) == ["c"]  # the codes of d are its values
    assert "0 stands for 10" in said["c"]
    assert settled(coded, categories=["c"]).mixed == {}
    assert "holds numbers written as text" in settled({"t": np.array(["1.5", "2.5", "1.5"])}).mixed["t"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"standardize": ["z"]}, "standardize=z names no column of floats"),
        ({"standardize": ["n"]}, "standardize=n names no column of floats"),
        ({"standardize": ["t"]}, "standardize=t names no column of floats"),
        ({"group_by": "x"}, "group_by=x is not a column of integers or text"),
        ({"group_by": "v"}, "group_by=v is not a column of integers or text"),
        ({"group_by": "tt"}, "has no column 'tt': do you mean t"),
        ({"split_by": "g"}, "split.by=g is not a column of integers or text: what is held out needs an exact key"),
        ({"split_time": "day", "split_after": 1}, "has no column 'day'"),
        ({"categories": ["tt"]}, "categories=[tt] names no column that is packed: do you mean t?"),
        ({"columns": {"row_id": "x"}}, "the shards keep the column 'row_id' for themselves"),
        ({"columns": {"length": "x"}, "group_by": "t"}, "the shards keep the column 'length' for themselves"),
        ({"like": "nowhere"}, "there is no shard folder at nowhere"),
        ({"split_time": "x"}, "split.time and split.after belong together"),
        ({"split_after": 1}, "split.time and split.after belong together"),
        ({"split_time": "x", "split_after": 1, "split_by": "t"}, "split.by=t and split.time=x are two splits"),
        ({"split_time": "x", "split_after": 1, "group_by": "t"}, "group_by=t and split.time=x are two splits"),
        ({"group_by": "t", "split_by": "n"}, "split.by=n cannot be combined with group_by=t"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        settled(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"group_by": "n"}, "group_by=n cannot be combined with sparse or ragged columns"),
        ({"standardize": ["s"]}, "standardize=s names no column of floats"),
        ({"split_time": "s", "split_after": 1}, "split.time=s is not a column of one time per row"),
        ({"split_by": "s"}, "split.by=s is not a column of integers or text"),
    ],
    ids=str,
)
def test_what_does_not_fit_sparse_rows_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        settled({"s": SPARSE, "n": np.arange(3)}, **options)


def test_what_cannot_be_packed_is_spared_unless_nothing_is_left() -> None:
    table = {"row_id": np.arange(3), "length": np.arange(3.0), "day": pa.array([1, 2, 3], pa.date32())}
    made = settled(table, spare=True)
    assert [recipe.name for recipe in made.recipes] == ["length"]
    assert made.spared is not None
    assert set(made.spared) == {"row_id", "day"}
    assert "keep the column 'row_id'" in made.spared["row_id"]
    with pytest.raises(UserError, match=r"column 'day' .* holds date32"):
        settled({"day": table["day"]}, spare=True)


def test_only_the_columns_that_are_used_are_read(tmp_path: Path) -> None:
    """Of a file, so that one that cannot be read by itself stops nothing."""
    (tmp_path / "t.csv").write_text("a,b,k,a\n1,2,3,4\n")
    opened, table = settle(tmp_path / "t.csv", Packing(columns={"x": "b"}, group_by="k"))
    assert set(opened.fields) == {"b", "k"}
    assert [recipe.parts for recipe in table.recipes] == [("b",)]
