"""What a column of CSV or JSON lines is depends on its cells alone: not on where the file is cut to be read."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data.packing.pack import pack
from trainer.data.sources import text
from trainer.data.sources.source import open_source
from trainer.data.sources.text import arrow_type
from trainer.errors import UserError

CUTS = [(1, 1 << 20), (64, 64), (700, 256), (3000, 1 << 20), (1 << 24, 300), (1 << 24, 2000)]
"""Bytes of a piece of the file, and of a block within it."""
CELLS = {
    "null": ["", "NA"],
    "bits": ["0", "1"],
    "int": ["5", "-3"],
    "minus_zero": ["-0", "0"],
    "spaced": [" 7", "8 "],
    "plus": ["+5", "6"],
    "padded": ["007", "08"],
    "quoted_padded": ['"012"', "7"],
    "hex": ["0x1F", "0xa"],
    "beyond": ["9223372036854775808", "-99999999999999999999"],
    "uint": ["18446744073709551615", "3"],
    "float": ["0.5", "1e3"],
    "padded_float": ["05.5", "1.5"],
    "nonfinite": ["inf", "nan"],
    "bool": ["true", "false"],
    "date": ["2024-01-01", "1999-12-31"],
    "far_date": ["3024-01-01", "0001-01-01"],
    "time_of_day": ["10:00", "08:30:00"],
    "time": ["2024-01-01 10:00", "2024-01-02T08:00:00"],
    "fine_time": ["2024-01-01 10:00:00.5", "2024-01-01T10:00:00.000000001"],
    "zoned": ["2024-01-01T10:00:00Z", "2024-01-01T10:00:00+0100"],
    "fine_zoned": ["2024-01-01T10:00:00.5Z", "2024-01-01T10:00:00Z"],
    "words": ["red", "?"],
    "empty_words": ['""', '"NA"'],
}
VALUES: dict[str, list[Any]] = {
    "null": [None, None],
    "int": [5, -3],
    "beyond": [2**63, -(10**20)],
    "float": [0.5, 1e300],
    "whole_float": [1.0, 2.0],
    "not_a_number": [float("nan"), 1.5],
    "bool": [True, False],
    "date": ["2024-01-01", "1999-12-31"],
    "time": ["2024-01-01T10:00:00", "2024-01-02 08:00:00"],
    "fine_time": ["2024-01-01T10:00:00.5", "2024-01-01"],
    "words": ["red", "1"],
    "empty_words": ["", ""],
    "no_numbers": [[], []],
    "numbers": [[1, 2], [3.5]],
    "lists_of_words": [["a"], ["b"]],
    "nested": [[[1]], [[2], []]],
    "no_keys": [{}, {}],
    "object": [{"b": 1}, {"c": "x"}],
    "other_object": [{"b": "one"}, {"c": [1]}],
}
LACKING = object()  # a key that a row does not have
TRIPLES = [
    *(("bits", "null", "bool"), ("bits", "bool", "int"), ("int", "float", "beyond"), ("padded", "float", "words")),
    *(("date", "time", "fine_time"), ("far_date", "time", "fine_time"), ("null", "date", "words")),
    *(("bits", "bool", "padded"), ("beyond", "int", "null"), ("null", "null", "null")),
]


def columns_of(kinds: dict[str, list[Any]], empty: Any) -> dict[str, list[Any]]:
    """Columns of which the cells are of one kind, then of a second, or of a third."""
    chosen = [(first, second) for first in kinds for second in kinds]
    chosen += [each for triple in TRIPLES for each in itertools.permutations(triple) if set(each) <= set(kinds)]
    made = {"__".join(names): [cell for name in names for cell in kinds[name] * 3] for names in dict.fromkeys(chosen)}
    rows = max(map(len, made.values()))
    return {name: cells + [empty] * (rows - len(cells)) for name, cells in made.items()}


def write_csv(path: Path, columns: dict[str, list[str]]) -> Path:
    path.write_text("\n".join([",".join(columns), *map(",".join, zip(*columns.values()))]) + "\n")
    return path


def write_json(path: Path, columns: dict[str, list[Any]]) -> Path:
    rows = ({name: cell for name, cell in zip(columns, row) if cell is not LACKING} for row in zip(*columns.values()))
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def content(path: Path) -> dict[str, Any]:
    """Of each column its field, and its type and values or why they cannot be read."""
    source = open_source(path)
    found: dict[str, Any] = {"rows": source.num_rows, "order": list(source.fields)}
    usable = [name for name, field in source.fields.items() if arrow_type(field.kind)]
    batches = list(source.batches(5, usable))
    for name, field in source.fields.items():
        types = {str(batch[name].type) for batch in batches if name in batch}
        found[name] = (
            field,
            types,
            repr([value for batch in batches if name in batch for value in batch[name].tolist()]),
        )
    return found


def cut(monkeypatch: pytest.MonkeyPatch, piece: int, block: int) -> None:
    monkeypatch.setattr(text, "_PIECE", piece)
    monkeypatch.setattr(text, "_BLOCK", block)


def differing(whole: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What differs, with both."""
    names = [name for name in {**whole, **other} if whole.get(name) != other.get(name)]
    return [f"{name}: {whole.get(name)} is {other.get(name)}" for name in names]


@pytest.mark.parametrize(("piece", "block"), CUTS)
def test_a_csv_column_is_the_same_wherever_the_file_is_cut(tmp_path, monkeypatch, piece, block):
    path = write_csv(tmp_path / "t.csv", columns_of(CELLS, ""))
    whole = content(path)
    assert whole["rows"] == 18
    cut(monkeypatch, piece, block)
    assert differing(whole, content(path)) == []


@pytest.mark.parametrize(("piece", "block"), CUTS)
def test_a_json_column_is_the_same_wherever_the_file_is_cut(tmp_path, monkeypatch, piece, block):
    path = write_json(tmp_path / "t.jsonl", columns_of({**VALUES, "lacking": [LACKING]}, None))
    whole = content(path)
    assert whole["rows"] == 18
    cut(monkeypatch, piece, block)
    assert differing(whole, content(path)) == []


def test_columns_that_json_lines_can_hold_stay_the_same(tmp_path, monkeypatch):
    """No column of several kinds among them, which would have each block looked at row by row."""
    kinds = {name: VALUES[name] for name in ("null", "int", "beyond", "float", "whole_float")}
    words = {name: VALUES[name] for name in ("null", "date", "time", "fine_time", "words", "empty_words")}
    for number, chosen in enumerate((kinds, words)):
        path = write_json(tmp_path / f"{number}.jsonl", columns_of({**chosen, "lacking": [LACKING]}, None))
        monkeypatch.undo()
        whole = content(path)
        for piece, block in CUTS:
            cut(monkeypatch, piece, block)
            assert differing(whole, content(path)) == []


@pytest.mark.parametrize("rows", [1, 6, 7, 13])
def test_a_csv_table_in_several_files_is_that_of_one(tmp_path, rows):
    columns = columns_of(CELLS, "")
    whole = content(write_csv(tmp_path / "whole.csv", columns))
    for number, first in enumerate(range(0, 18, rows)):
        part = {name: cells[first : first + rows] for name, cells in columns.items()}
        write_csv(tmp_path / f"part-{number:02d}.csv", part)
    assert differing(whole, content(tmp_path / "part-*.csv")) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_packing_gives_the_same_bytes(tmp_path, monkeypatch, form):
    generator = np.random.default_rng(0)
    rows = 400
    columns: dict[str, list[Any]] = {
        "y": [*range(300), *(0.5 + value for value in range(rows - 300))],
        "treated": [*("0", "1") * 150, *("true", "false") * 50] if form == "csv" else [True, False] * (rows // 2),
        "code": [*range(10, 10 + rows - 1), "007"] if form == "csv" else ["2024-01-01"] * (rows - 1) + ["later"],
        "gap": [None] * 250 + generator.normal(size=rows - 250).tolist(),
    }
    if form == "csv":
        text_columns = {name: ["" if cell is None else str(cell) for cell in cells] for name, cells in columns.items()}
        path = write_csv(tmp_path / "t.csv", text_columns)
    else:
        path = write_json(tmp_path / "t.jsonl", columns)
    packed = []
    for number, (piece, block) in enumerate([(1 << 24, 1 << 20), *CUTS]):
        cut(monkeypatch, piece, block)
        out = tmp_path / str(number)
        index, _ = pack(path, out, held_out=0.25, missing="drop", workers=1 + number % 2)
        assert {column.name: column.dtype for column in index.columns} == {
            "y": "float32", "treated": "bool", "code": "int64", "gap": "float32", "row_id": "int64"
        }  # fmt: skip
        packed.append({str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*.tar"))})
    assert len(packed[0]) >= 2
    assert all(each == packed[0] for each in packed)


@pytest.mark.parametrize(
    ("name", "content_", "message"),
    [
        ("t.jsonl", '{"a": 1}\n{"a": 2} {"a": 3}\n{"a": 4}\n', r"row 1 \(counted from 0\) is no JSON object"),
        ("t.jsonl", '{"a": 1}\n{"a": "x"} {"a": 3}\n', r"row 1 \(counted from 0\) is no JSON object"),
        ("t.jsonl", '{"a": 1}\n{\n"a": 2\n}\n{"a": 3}\n', r"row 1 \(counted from 0\) is no JSON object"),
        ("t.jsonl", '{"a": 1}\n{"a": 2}\n[["a", 3]]\n', r"row 2 \(counted from 0\) is no JSON object"),
        ("t.jsonl", '{"a": 1}\n{"a": "x"}\n{"a": 2, "a": 3}\n', r"row 2 \(counted from 0\).* twice"),
        ("t.jsonl", '{"a": 1}\n{"a": 1e400}\n', r"row 1 \(counted from 0\).* too big"),
        ("t.csv", "a,b\n1,2\n3,4\n5\n6,7\n", "Expected 2 columns, got 1: 5"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_alike(tmp_path, monkeypatch, name, content_, message):
    (tmp_path / name).write_text(content_)
    said = set()
    for piece, block in [(1 << 24, 1 << 20), *CUTS]:
        cut(monkeypatch, piece, block)
        with pytest.raises(UserError, match=message) as caught:
            open_source(tmp_path / name)
        said.add(str(caught.value))
    assert len(said) == 1


def test_a_json_column_of_two_kinds_is_named_with_its_first_row(tmp_path, monkeypatch):
    rows = [{"a": None}, {"b": 1}, {"a": [1], "b": 2}, {"a": [2]}, *[{"b": 3}] * 50, {"a": True}, {"a": "x"}]
    (tmp_path / "t.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, rows)) + "\n")
    for piece, block in [(1 << 24, 1 << 20), *CUTS]:
        cut(monkeypatch, piece, block)
        source = open_source(tmp_path / "t.jsonl")
        assert source.fields["a"].kind == "lists and truth values ('true' in row 54, counted from 0)"
        assert [value for batch in source.batches(9, ["b"]) for value in batch["b"].to_pylist()] == [
            row.get("b") for row in rows
        ]


def test_rows_without_keys_are_rows(tmp_path, monkeypatch):
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n' + "{}\n" * 40 + '{"a": 2}\n\n{}\n')
    for piece, block in [(1 << 24, 1 << 20), *CUTS]:
        cut(monkeypatch, piece, block)
        source = open_source(tmp_path / "t.jsonl")
        assert source.num_rows == 43
        values = [value for batch in source.batches(9) for value in batch["a"].to_pylist()]
        assert values == [1, *[None] * 40, 2, None]


def test_json_columns_of_several_files(tmp_path):
    """Words are words also where all words of one file are times; a column of two kinds stops only itself."""
    for number, (a, b) in enumerate([("2024-01-01", 1), ("later", 2), (None, 2.5)]):
        write_json(tmp_path / f"{number}.jsonl", {"a": [a], "b": [b], "c": [0]})
    write_json(tmp_path / "3.jsonl", {"a": ["z", "z"], "b": [3, 4], "c": [0, "?"]})
    write_json(tmp_path / "4.jsonl", {"a": ["z"], "b": [5], "c": ["x"]})
    fields = open_source(tmp_path / "*.jsonl").fields
    assert (fields["a"].kind, fields["b"].kind) == ("text", "float")
    assert fields["c"].kind == "numbers and text ('?' in row 1, counted from 0)"
