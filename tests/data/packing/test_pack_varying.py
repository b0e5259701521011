"""Packing sparse and ragged columns: every row whole, in any memory, and bad entries named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse
from shard_tools import csr, ragged

from trainer.data.fields import CsrRows, RaggedRows
from trainer.data.packing.apply import rows_like
from trainer.data.packing.pack import pack
from trainer.data.shards.folder import ShardFolder
from trainer.data.shards.index import Column
from trainer.data.sources.memory import MemorySource
from trainer.errors import UserError


def sparse_table(rows: int) -> dict[str, Any]:
    """Words and marks of varying numbers, beside the row's number."""
    return {"row": np.arange(rows), "words": csr(rows, 70_000), "marks": ragged(rows, ())}


def contents(rows: CsrRows | RaggedRows) -> list[list[list]]:
    bounds = list(zip(rows.offsets[:-1], rows.offsets[1:]))
    return [[each[first:stop].tolist() for each in rows.entries.values()] for first, stop in bounds]


@pytest.mark.parametrize("memory_bytes", [1 << 16, 1 << 30])
def test_sparse_and_ragged_rows_stay_whole_through_the_buckets(tmp_path: Path, memory_bytes: int) -> None:
    table = sparse_table(3000)
    indexes = pack(MemorySource(table), tmp_path / "out", memory_bytes=memory_bytes, block_rows=500, held_out=0.2)
    seen = []
    for split, index in zip(("train", "held_out"), indexes):
        assert index is not None
        folder = ShardFolder(tmp_path / "out" / split)
        for block in range(len(folder.block_rows)):
            rows = folder.read_block(block, "row")
            assert contents(folder.read_block(block, "words")) == contents(table["words"][rows])
            marks = table["marks"][rows]
            assert contents(folder.read_block(block, "marks")) == contents(marks)
            seen += rows.tolist()
        assert index.column("words") == Column("words", "uint16", (70_000,), kind="csr")
        assert index.column("marks") == Column("marks", "float32", (), kind="ragged")
    assert sorted(seen) == list(range(3000))


def test_memory_changes_no_byte_of_sparse_columns(tmp_path: Path) -> None:
    for name, memory in (("a", 1 << 16), ("b", 1 << 30)):
        pack(MemorySource(sparse_table(2000)), tmp_path / name, memory_bytes=memory)
    for file in ("train/000000.tar", "held_out/000000.tar", "train/index.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("form", ["csr_array", "csr_matrix", "csc_array", "coo_array"])
def test_scipy_matrices_are_sparse_columns(tmp_path: Path, form: str) -> None:
    dense = np.random.default_rng(0).poisson(0.2, (200, 30))
    pack(MemorySource({"words": getattr(sparse, form)(dense), "row": np.arange(200)}), tmp_path / "out", held_out=0)
    folder = ShardFolder(tmp_path / "out" / "train")
    rows = folder.read_block(0, "words")
    found = np.zeros((200, 30), int)
    np.add.at(found, (np.repeat(np.arange(200), np.diff(rows.offsets)), rows.indices), rows.values)
    assert np.array_equal(found, dense[folder.read_block(0, "row")])
    assert folder.index.column("words").dtype == "int64"


def test_shard_bytes_bound_blocks_of_sparse_rows(tmp_path: Path) -> None:
    index, _ = pack(MemorySource(sparse_table(3000)), tmp_path / "out", shard_bytes=20_000, held_out=0)
    assert all(20_000 / 3 < shard.bytes < 3 * 20_000 for shard in index.shards[:-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_by": "row"}, "group_by=row cannot be combined with sparse or ragged columns"),
        ({"split_by": "marks"}, "split.by=marks is not a column of integers or text"),
        ({"split_time": "marks", "split_after": 1}, "split.time=marks is not a column of one time per row"),
        ({"standardize": ["words"]}, "standardize=words names no column of floats"),
        ({"columns": {"x": ["words", "row"]}}, "column 'words' of 'the data' holds csr"),
    ],
)
def test_what_sparse_columns_cannot_be_used_for(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pack(MemorySource(sparse_table(50)), tmp_path / "out", **options)


def test_bad_entries_are_named_by_their_row(tmp_path: Path) -> None:
    offsets, indices = np.array([0, 1, 1, 3]), np.array([0, 1, 2])
    for values, width, message in (
        (np.array([1.0, np.inf, 1.0]), 3, r"'words' is infinite, or too large for float64, in row 2"),
        (np.array([1.0, 1.0, np.nan]), 3, r"has no value for 'words' in row 2"),
        (np.ones(3), 2, r"'words' has an index outside 0 to 1 in row 2"),
    ):
        with pytest.raises(UserError, match=message):
            pack(MemorySource({"words": CsrRows(offsets, indices, values, width)}), tmp_path / "out", held_out=0)
    lacking = MemorySource({"words": CsrRows(offsets, indices, np.array([1.0, 1.0, np.nan]), 3)})
    index, _ = pack(lacking, tmp_path / "out", held_out=0, missing="drop")
    assert index.num_rows == 2
    assert index.meta["dropped"] == 1
    assert contents(ShardFolder(tmp_path / "out" / "train").read_block(0, "words")) in (
        [[[0], [1.0]], [[], []]],
        [[[], []], [[0], [1.0]]],
    )


def test_new_rows_of_a_sparse_column_have_its_width(tmp_path: Path) -> None:
    table = sparse_table(100)
    index, _ = pack(MemorySource(table), tmp_path / "out", held_out=0)
    (batch,) = rows_like(index, MemorySource(table), ["words", "marks"], 1000)
    assert contents(batch["words"]) == contents(table["words"])
    assert contents(batch["marks"]) == contents(table["marks"])
    with pytest.raises(UserError, match=r"'words' has 50 columns where the packed table has 70,000"):
        list(rows_like(index, MemorySource({"words": csr(100)}), ["words"], 1000))
