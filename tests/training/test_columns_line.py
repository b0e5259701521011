"""The line of the columns of packed data."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from trainer.data.fields import CsrRows
from trainer.data.packing.pack import pack
from trainer.data.shards.index import ROW_ID, Column, Index
from trainer.data.sources.memory import MemorySource
from trainer.training.columns_line import columns_line


def test_the_line_of_columns_tells_their_types(tmp_path: Path) -> None:
    table = {
        "x": np.ones((2, 3)), "w": CsrRows(np.array([0, 1, 1]), np.array([4]), np.array([2], np.uint8), 5),
        "g": ["a", "b"], "one": ["a", "a"], "year": pd.Categorical([2011, 2010]), "t": [True, False],
    }  # fmt: skip
    index, _ = pack(MemorySource(table), tmp_path / "out", held_out=0)
    assert columns_line(index) == (
        "columns: x float32[3] · w uint8 sparse[5] · g 2 categories · one 1 category · "
        "year 2 categories (0 stands for 2010) · t bool"
    )
    many, _ = pack(MemorySource({f"c{i}": [1.0] for i in range(25)}), tmp_path / "many", held_out=0)
    assert columns_line(many).endswith(" · c19 float32 · 5 more")


def line(*columns: Column, **meta: object) -> str:
    return columns_line(Index((*columns, Column(ROW_ID, "int64")), (), 0, "train", dict(meta)))


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (Column("x", "float64"), "x float64"),
        (Column("x", "int64", (2, 3)), "x int64[2, 3]"),
        (Column("x", "uint8", (1000,), kind="csr"), "x uint8 sparse[1000]"),
        (Column("x", "float32", kind="ragged"), "x float32 lists"),
        (Column("x", "float32", (2,), kind="ragged"), "x float32 lists[2]"),
        (Column("x", "int64", (), ["a"]), "x 1 category"),
        (Column("x", "int64", (4,), [str(k) + "a" for k in range(2000)]), "x 2,000 categories[4]"),
        (Column("x", "int64", (), ["007", "a"]), "x 2 categories (0 stands for 007)"),
        (Column("x", "int64", (), [1.5, 2.5]), "x 2 categories (0 stands for 1.5)"),
        (Column("x", "uint8", (3,), ["the", "a", "of"], kind="csr"), "x uint8 sparse[3]"),
    ],
    ids=str,
)
def test_a_column_is_told_by_its_type(column: Column, said: str) -> None:
    assert line(column) == f"columns: {said}"


def test_rows_numbers_are_not_told_and_what_was_left_out_is() -> None:
    spared = {f"c{k}": "why" for k in range(22)}
    said = line(Column("x", "bool"), spared=spared)
    assert said.startswith("columns: x bool · left out: c0 · c1 · ")
    assert said.endswith(" · c19 · 2 more")
    assert line(Column("x", "bool"), spared={}) == "columns: x bool"
    assert line(*(Column(f"c{k}", "bool") for k in range(20))).endswith(" · c19 bool")
