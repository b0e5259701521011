"""A table packed like another one: what a code, a column and a standardised value mean stays the same."""

from pathlib import Path

import numpy as np
import pytest

from trainer.data.fields import CsrRows
from trainer.data.packing.pack import pack
from trainer.data.packing.parts import PartOf, Parts
from trainer.data.shards.folder import ShardFolder
from trainer.data.sources.memory import MemorySource
from trainer.errors import UserError

MONDAY = {
    "age": np.array([20.0, 30.0, 40.0, 70.0]),
    "pay": np.array([1.0, 2.0, 3.0, 4.0]),
    "city": np.array(["Oslo", "Rome", "Oslo", "Bern"]),
    "n": np.array([1, 2, 3, 4]),
}
TUESDAY = {
    "age": np.array([10.0, 50.0]),
    "pay": np.array([9.0, 8.0]),
    "city": np.array(["Rome", "Aachen"]),
    "n": np.array([True, False]),
}
COLUMNS = {"x": ["age", "pay"], "where": "city", "n": "n"}


def table(folder: Path) -> dict[str, np.ndarray]:
    """The columns of the training rows by their numbers."""
    found = ShardFolder(folder / "train")
    columns = {
        c.name: np.concatenate([found.read_block(b, c.name) for b in range(len(found.block_rows))])
        for c in found.index.columns
    }
    order = np.argsort(columns["row_id"])
    return {name: each[order] for name, each in columns.items()}


@pytest.fixture
def monday(tmp_path: Path) -> Path:
    pack(MemorySource(MONDAY), tmp_path / "monday", columns=COLUMNS, held_out=0, standardise=["x"], seed=5)
    return tmp_path / "monday"


def test_codes_shifts_and_columns_are_those_of_the_other_and_new_words_follow(monday: Path, tmp_path: Path) -> None:
    first, _ = pack(MemorySource(TUESDAY), tmp_path / "tuesday", like=monday)
    before = ShardFolder(monday / "train").index
    assert before.column("where").vocabulary == ["Bern", "Oslo", "Rome"]
    assert first.column("where").vocabulary == ["Bern", "Oslo", "Rome", "Aachen"]
    assert (first.meta["standardised"], first.meta["columns"], first.seed) == (
        before.meta["standardised"], before.meta["columns"], 5,
    )  # fmt: skip
    found, shift = table(tmp_path / "tuesday"), before.meta["standardised"]["x"]
    raw = np.stack([TUESDAY["age"], TUESDAY["pay"]], 1)
    np.testing.assert_array_equal(found["where"], [2, 3])
    np.testing.assert_array_equal(found["x"], ((raw - shift["mean"]) / shift["sd"]).astype("float32"))
    np.testing.assert_array_equal(found["n"], [1, 0])
    assert found["n"].dtype == np.int64
    np.testing.assert_allclose(first.column("x").statistics["mean"], found["x"].mean(0), atol=1e-6)


def test_the_same_table_packed_like_itself_is_the_same(monday: Path, tmp_path: Path) -> None:
    again, _ = pack(MemorySource(MONDAY), tmp_path / "again", like=monday)
    assert again.digest == ShardFolder(monday / "train").index.digest


def test_parts_are_packed_like_it_too(monday: Path, tmp_path: Path) -> None:
    pack(MemorySource(TUESDAY), tmp_path / "whole", like=monday)
    parts = Parts(tmp_path / "parts")
    for part in (1, 2):
        parts.read(MemorySource(TUESDAY), PartOf(part, 2), like=monday)
    assert parts.finish()[0].digest == ShardFolder(tmp_path / "whole" / "train").index.digest


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"n": np.array([0.5, 1.0])}, "column 'n' of 'the data' is float, and int in the packed table: cast it."),
        ({"city": np.array([1, 2])}, "column 'city' of 'the data' is int, and text in the packed table: cast it."),
        ({"age": np.ones((2, 3))}, "column 'age' of 'the data' is float of shape [3], and float in the packed table"),
        ({"age": None}, "'the data' has no column 'age'"),
    ],
)
def test_what_cannot_become_the_same_is_refused(monday: Path, tmp_path: Path, change: dict, sentence: str) -> None:
    rows = {name: value for name, value in {**TUESDAY, **change}.items() if value is not None}
    with pytest.raises(UserError) as error:
        pack(MemorySource(rows), tmp_path / "tuesday", like=monday)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    "option",
    [{"columns": COLUMNS}, {"standardize": ["x"]}, {"group_by": "city"}, {"held_out": 0.3}, {"seed": 1}],
    ids=lambda option: next(iter(option)),
)
def test_options_that_say_otherwise_are_refused(monday: Path, tmp_path: Path, option: dict) -> None:
    with pytest.raises(UserError, match="cannot be combined with like="):
        pack(MemorySource(TUESDAY), tmp_path / "tuesday", like=monday, **option)


def test_groups_and_split_are_those_of_the_other(tmp_path: Path) -> None:
    who, value = np.repeat(np.arange(60), 3), np.arange(180.0)
    pack(MemorySource({"who": who, "v": value}), tmp_path / "a", group_by="who", held_out=0.5, seed=3)
    less = np.flatnonzero(np.arange(180) % 3 < 2)
    rows = {"who": who[less], "v": value[less]}
    made, _ = pack(MemorySource(rows), tmp_path / "b", like=tmp_path / "a")
    assert made.column("v").shape == (3,)
    assert set(table(tmp_path / "b")["length"]) == {2}
    sides = [set(table(tmp_path / each)["who"][:, 0].tolist()) for each in ("a", "b")]
    assert sides[0] == sides[1]  # a group of both tables is held out in both or in none
    with pytest.raises(UserError, match="has a group of 4 rows"):
        pack(MemorySource({"who": np.zeros(4, int), "v": np.ones(4)}), tmp_path / "c", like=tmp_path / "a")


def test_a_split_by_time_is_that_of_the_other(tmp_path: Path) -> None:
    pack(MemorySource({"t": np.arange(9)}), tmp_path / "a", split_time="t", split_after=6)
    train, held = pack(MemorySource({"t": np.array([5, 6, 7, 1])}), tmp_path / "b", like=tmp_path / "a")
    assert (train.num_rows, held and held.num_rows) == (2, 2)


def test_sparse_rows_have_the_same_width_and_type(tmp_path: Path) -> None:
    def words(width: int, dtype: str) -> MemorySource:
        return MemorySource({"w": CsrRows(np.array([0, 1, 3]), np.array([0, 1, 2]), np.array([1, 2, 3], dtype), width)})

    pack(words(5, "int16"), tmp_path / "a", held_out=0)
    assert pack(words(5, "uint8"), tmp_path / "b", like=tmp_path / "a")[0].column("w").dtype == "int16"
    for width, dtype, sentence in ((6, "int16", "of shape"), (5, "int64", "holds int64, and int16")):
        with pytest.raises(UserError, match=sentence):
            pack(words(width, dtype), tmp_path / "c", like=tmp_path / "a")


@pytest.mark.parametrize("column", ["x", "v"])
def test_values_that_the_float32_of_the_other_would_round_are_refused(tmp_path: Path, column: str) -> None:
    def made(values: np.ndarray) -> MemorySource:
        return MemorySource({"v": np.stack([values, values], 1), "x": values, "y": values})

    near, far = np.arange(8.0), 1e9 + np.arange(8.0)
    pack(made(near), tmp_path / "first", columns={column: column}, held_out=0)
    index, _ = pack(made(near / 3), tmp_path / "like", like=tmp_path / "first")
    assert index.column(column).dtype == "float32"
    np.testing.assert_array_equal(table(tmp_path / "like")[column].reshape(8, -1)[:, 0], (near / 3).astype("float32"))
    with pytest.raises(UserError, match=f"column '{column}' is float32 in the table that 'the data' is to be like"):
        pack(made(far), tmp_path / "no", like=tmp_path / "first")
    with pytest.raises(UserError, match=r"categories=.* cannot be combined with like="):
        pack(made(near), tmp_path / "no", like=tmp_path / "first", categories=[column])
