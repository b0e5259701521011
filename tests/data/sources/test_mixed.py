"""Text that is numbers in part is told apart from words; rows of any length are read."""

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from trainer.data.packing.pack import pack
from trainer.data.sources import text
from trainer.data.sources.memory import MemorySource
from trainer.data.sources.mixed import mixed_columns, number_like, refuse_mixed
from trainer.data.sources.source import open_source
from trainer.errors import UserError

NUMBERS = [f"{v / 7:.2f}" for v in range(30)]


def csv(tmp_path: Path, cells: list[str]) -> Path:
    (tmp_path / "t.csv").write_text(
        "x,y\n" + "".join(f'"{cell}",1\n' if "," in cell else f"{cell},1\n" for cell in cells)
    )
    return tmp_path / "t.csv"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("?", "holds text and numbers ('?' in row 20, '0.00' in row 0, counted from 0)"),
        ("unknown", "holds text and numbers ('unknown' in row 20"),
        ("-", "holds text and numbers ('-' in row 20"),
        ("1,234.5", "holds numbers written with separators or signs ('1,234.5' in row 20"),
        ("$5", "holds numbers written with separators or signs ('$5' in row 20"),
        ("5%", "holds numbers written with separators or signs ('5%' in row 20"),
        ("0,5", "holds numbers written with separators or signs ('0,5' in row 20"),
    ],
)
def test_one_cell_that_is_no_plain_number_is_named(tmp_path: Path, word: str, said: str) -> None:
    source = open_source(csv(tmp_path, [*NUMBERS[:20], word, *NUMBERS[20:]]))
    assert said in mixed_columns(source, ["x"])["x"]
    refuse_mixed(source, ["x", "y"], ["x"])
    with pytest.raises(UserError, match="pack it with categories="):
        refuse_mixed(source, ["x"], [])
    index, _ = pack(source, tmp_path / "out", held_out=0)
    assert said in index.meta["mixed"]["x"]
    assert "mixed" not in pack(source, tmp_path / "named", held_out=0, categories=["x"])[0].meta


def test_numbers_with_separators_throughout_are_named(tmp_path: Path) -> None:
    source = open_source(csv(tmp_path, [f"{1000 + v:,.2f}" for v in range(20)]))
    assert "('1,000.00' in row 0" in mixed_columns(source, ["x"])["x"]


@pytest.mark.parametrize("cells", [["red", "blue"], ["A1", "B2"], ["1-2", "3-4"], ["v1.0", "v2.0"], ["7 days", "day"]])
def test_words_are_words(tmp_path: Path, cells: list[str]) -> None:
    assert not number_like(cells)
    assert not mixed_columns(open_source(csv(tmp_path, cells)), ["x"])
    assert "mixed" not in pack(csv(tmp_path, cells), tmp_path / "out", held_out=0)[0].meta


def test_text_of_a_data_frame_counts_as_that_of_a_file_and_categories_are_what_they_say(tmp_path: Path) -> None:
    table = pd.DataFrame({"x": [*NUMBERS, "?"], "z": NUMBERS + NUMBERS[:1], "c": pd.Categorical([*NUMBERS, "?"])})
    index, _ = pack(MemorySource(table), tmp_path / "out", held_out=0)
    assert set(index.meta["mixed"]) == {"x", "z"}
    assert "holds numbers written as text ('0.00' in row 0" in index.meta["mixed"]["z"]


def test_rows_longer_than_a_block_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_BLOCK", 256)
    names = [f"c{i}" for i in range(200)]
    values = np.arange(600.0).reshape(3, 200)
    (tmp_path / "w.csv").write_text("\n".join([",".join(names), *(",".join(map(str, row)) for row in values)]))
    source = open_source(tmp_path / "w.csv")
    assert source.num_rows == 3
    (batch,) = source.batches(10, ["c0", "c199"])
    assert batch["c199"].to_pylist() == [199.0, 399.0, 599.0]
    note = "z" * 5000
    rows = [{"y": k, "note": note if k == 1 else "-"} for k in range(4)]
    lines = "\n".join(map(json.dumps, rows)).encode()
    (tmp_path / "n.jsonl").write_bytes(lines)
    (tmp_path / "n.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "n.csv").write_text('y,note\n0,a\n1,"' + note + "\n" + note + '"\n2,b\n')
    for name, ids in (("n.jsonl", [0, 1, 2, 3]), ("n.jsonl.gz", [0, 1, 2, 3]), ("n.csv", [0, 1, 2])):
        (batch,) = open_source(tmp_path / name, ["y"]).batches(10)
        assert batch["y"].to_pylist() == ids


def test_a_line_without_end_is_refused_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_PIECE", 64)
    monkeypatch.setattr(text, "_LONGEST_LINE", 1 << 20)
    (tmp_path / "t.jsonl").write_text('{"x": 1}\n{"x": "' + "a" * (1 << 21) + '"}\n')
    with pytest.raises(UserError, match="the line at byte 64 is longer than 1 MB"):
        open_source(tmp_path / "t.jsonl")


def test_json_lines_of_two_kinds_stop_nothing_but_their_column(tmp_path: Path) -> None:
    rows = [{"y": k * 0.5, "x": "?" if k == 5 else k, "z": [k] if k else {}} for k in range(8)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, _ = pack(tmp_path / "t.jsonl", tmp_path / "out", columns={"y": "y"}, held_out=0)
    assert train.num_rows == 8
    with pytest.raises(UserError, match=r"column 'x' of '.*' holds numbers and text \('\?' in row 5, counted from 0\)"):
        pack(tmp_path / "t.jsonl", tmp_path / "no", columns={"x": "x"})
    (tmp_path / "t.jsonl").write_text('{"x": 1}\n{"x": 2}\n{"x": \n')
    with pytest.raises(UserError, match=r"row 2 \(counted from 0\) is no JSON object"):
        open_source(tmp_path / "t.jsonl")
