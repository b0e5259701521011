"""Digits that are names: as numbers they would not be what is written, so they stay text."""

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from trainer.data.packing.apply import rows_like
from trainer.data.packing.pack import pack
from trainer.data.sources import text
from trainer.data.sources.memory import MemorySource
from trainer.data.sources.mixed import refuse_mixed
from trainer.data.sources.source import open_source
from trainer.errors import UserError
from trainer.training.columns_line import columns_line

BEYOND = "12345678901234567890"


def csv(path: Path, cells: list[str], name: str = "x") -> Path:
    content = f"{name},y\n" + "".join(f"{cell},1\n" for cell in cells)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


@pytest.mark.parametrize(
    ("cells", "words", "said"),
    [
        (["007", "12", "007"], ["007", "12"], "with leading zeros ('007' in row 0"),
        (["1", "01", "2"], ["01", "1", "2"], "with leading zeros ('01' in row 1"),
        (['"00123"', "99999"], ["00123", "99999"], "with leading zeros ('00123' in row 0"),
        (["5", "", "05"], ["05", "5"], "with leading zeros ('05' in row 2"),
        ([BEYOND, "1"], ["1", BEYOND], f"with more digits than an integer of 64 bits has ('{BEYOND}' in row 0"),
        (["-9223372036854775809"], ["-9223372036854775809"], "with more digits than"),
    ],
)
@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_digits_that_are_no_number_as_written_are_categories_and_said(
    tmp_path: Path, cells: list[str], words: list[str], said: str, name: str
) -> None:
    path = csv(tmp_path / name, cells)
    index, _ = pack(path, tmp_path / "out", held_out=0, missing="drop")
    assert index.column("x").vocabulary == words
    assert said in index.meta["mixed"]["x"]  # what a run says where its model calculates with the codes
    refuse_mixed(open_source(path), ["x", "y"], [])
    assert "mixed" not in pack(path, tmp_path / "named", held_out=0, categories=["x"], missing="drop")[0].meta
    if words[0].isdigit():
        assert f"(0 stands for {words[0]})" in columns_line(index)


@pytest.mark.parametrize(
    ("cells", "dtype"),
    [
        (["0", "10", "200"], "int64"),
        (["0.5", "00.5", "1.0"], "float32"),
        (["1e30", "2.5"], "float64"),
        (["9223372036854775807", "0"], "int64"),
        (["7", "-0", "1"], "int64"),
    ],
)
def test_numbers_are_numbers(tmp_path: Path, cells: list[str], dtype: str) -> None:
    index, _ = pack(csv(tmp_path / "t.csv", cells), tmp_path / "out", held_out=0)
    assert (index.column("x").vocabulary, index.column("x").dtype[:5]) == (None, dtype[:5])


def test_codes_of_one_piece_or_file_are_codes_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_PIECE", 16)
    cells = ["12", "34", "56", "78", "90", "07"]
    assert open_source(csv(tmp_path / "t.csv", cells)).fields["x"].kind == "text"
    csv(tmp_path / "a1.csv", cells[:5])
    csv(tmp_path / "a2.csv", cells[5:])
    for order in ("a[12].csv", "a*.csv"):
        index, _ = pack(tmp_path / order, tmp_path / f"out{order[1]}", held_out=0)
        assert index.column("x").vocabulary == sorted(cells)


def test_new_rows_match_the_codes_and_codes_are_no_numbers(tmp_path: Path) -> None:
    named, _ = pack(csv(tmp_path / "t.csv", ["007", "12"]), tmp_path / "named", held_out=0)
    (rows,) = rows_like(named, open_source(csv(tmp_path / "new.csv", ["12", "12"])), ["x"], 10)
    np.testing.assert_array_equal(rows["x"], [1, 1])
    numbers, _ = pack(csv(tmp_path / "n.csv", ["7", "12"]), tmp_path / "numbers", held_out=0)
    with pytest.raises(UserError, match=r"is text \('007' in row 1, counted from 0\), and int in the packed table"):
        next(rows_like(numbers, open_source(csv(tmp_path / "new.csv", ["12", "007"])), ["x"], 10))


@pytest.mark.parametrize(("values", "first"), [([10, 20, 10], "10"), ([1.5, 0.5], "0.5"), ([3, 1, 2], "1")])
@pytest.mark.parametrize("ordered", [False, True])
def test_categories_of_numbers_are_codes_and_said(tmp_path: Path, values: list, first: str, ordered: bool) -> None:
    table = pd.DataFrame({"g": pd.Categorical(values, ordered=ordered)})
    index, _ = pack(MemorySource(table), tmp_path / "out", held_out=0)
    assert f"gets their codes (0 stands for {first})" in index.meta["mixed"]["g"]
    assert "mixed" not in pack(MemorySource(table), tmp_path / "named", held_out=0, categories=["g"])[0].meta


def test_categories_that_are_their_codes_need_no_word(tmp_path: Path) -> None:
    table = pd.DataFrame({"g": pd.Categorical([2, 0, 1])})
    assert "mixed" not in pack(MemorySource(table), tmp_path / "out", held_out=0)[0].meta


@pytest.mark.parametrize(
    ("categories", "columns", "said"),
    [
        (["zipp"], None, r"categories=\[zipp\] names no column that is packed: do you mean zip\?"),
        (["other"], None, r"categories=\[other\] names no column that is packed: there are zip, y\."),
        (["w"], {"x": "zip"}, r"categories=\[w\] names no column that is packed: there are x, zip"),
        (["zip"], {"x": ["zip", "y"]}, r"categories=\[zip\] is one of the numbers of columns\.x"),
    ],
)
def test_categories_name_columns(tmp_path: Path, categories: list[str], columns: dict | None, said: str) -> None:
    path = csv(tmp_path / "t.csv", ["1", "2"], "zip")
    with pytest.raises(UserError, match=said):
        pack(path, tmp_path / "out", columns=columns, categories=categories)
    assert pack(path, tmp_path / "out", held_out=0, columns={"x": "zip"}, categories=["zip"])[0].column("x").vocabulary


@pytest.mark.parametrize("cells", [["café", "b"], ["b", "é", "3"]])
def test_text_in_another_encoding_is_named(tmp_path: Path, cells: list[str]) -> None:
    (tmp_path / "t.csv").write_bytes(("x,y\n" + "".join(f"{cell},1\n" for cell in cells)).encode("latin-1"))
    assert pack(tmp_path / "t.csv", tmp_path / "out", columns={"y": "y"}, held_out=0)[0].num_rows == len(cells)
    with pytest.raises(UserError, match=r"column 'x' of '.*t\.csv' holds text that is not UTF-8 .*save the file as"):
        pack(tmp_path / "t.csv", tmp_path / "no")
