"""Sources: every format gives its rows back exactly, in order, and says what is wrong with a file."""

import csv
import gzip
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from trainer.data.fields import TWICE, Field
from trainer.data.packing.pack import pack
from trainer.data.sources import csv_text, text
from trainer.data.sources.source import Source, open_source
from trainer.errors import UserError

ROWS = 1000


def table() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "a": generator.normal(size=ROWS),
        "n": generator.integers(-9, 9, ROWS),
        "flag": generator.random(ROWS) < 0.5,
        "word": generator.choice(["red", "green", "blue"], ROWS),
    }


def write(folder: Path, form: str, columns: dict[str, np.ndarray], name: str = "t") -> Path:
    path = folder / f"{name}.{form}"
    if form == "npz":
        np.savez(path, **columns)  # type: ignore[arg-type]
    elif form == "parquet":
        pq.write_table(pa.table(columns), path, row_group_size=300)
    elif form == "arrow":
        with pa.ipc.new_file(path, pa.table(columns).schema) as file:
            file.write_table(pa.table(columns), max_chunksize=300)
    elif form == "feather":
        pa.feather.write_feather(pa.table(columns), path)
    elif form == "jsonl":
        rows = (dict(zip(columns, (value.item() for value in row))) for row in zip(*columns.values()))
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    else:
        lines = [",".join(columns)]
        lines += [",".join(str(value.item()) for value in row) for row in zip(*columns.values())]
        path.write_text("\n".join(lines) + "\n")
    return path


def read(source: Source, rows: int = 64, names: list[str] | None = None) -> dict[str, list]:
    read: dict[str, list] = {name: [] for name in names or source.fields}
    for batch in source.batches(rows, names):
        assert batch.keys() == read.keys()
        assert all(len(values) <= rows for values in batch.values())
        for name, values in batch.items():
            read[name] += values.tolist()
    return read


@pytest.mark.parametrize("form", ["parquet", "csv", "npz", "arrow", "feather", "jsonl"])
def test_round_trip(tmp_path: Path, form: str) -> None:
    columns = table()
    source = open_source(write(tmp_path, form, columns))
    assert source.num_rows == ROWS
    assert source.fields == {"a": Field("float"), "n": Field("int"), "flag": Field("bool"), "word": Field("text")}
    for _ in range(2):
        assert read(source) == {name: values.tolist() for name, values in columns.items()}
    assert read(source, 7, ["n", "a"]) == {name: columns[name].tolist() for name in ("n", "a")}


@pytest.mark.parametrize("form", ["parquet", "csv", "npz"])
def test_glob_reads_files_in_order(tmp_path: Path, form: str) -> None:
    columns = table()
    for part in range(3):
        write(tmp_path, form, {name: values[part::3] for name, values in columns.items()}, f"part-{part}")
    source = open_source(tmp_path / f"part-*.{form}", ["n"])
    assert source.num_rows == ROWS
    assert read(source)["n"] == [n for part in range(3) for n in columns["n"][part::3].tolist()]


def test_path_with_glob_characters_is_a_path(tmp_path: Path) -> None:
    assert open_source(write(tmp_path, "npz", table(), "run[1]")).num_rows == ROWS


@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_arrays_of_any_shape(tmp_path: Path, order: str) -> None:
    x = np.arange(60.0).reshape(5, 3, 4)
    np.savez_compressed(tmp_path / "t.npz", x=np.asarray(x, order=order), big=np.arange(5, dtype=">i4"))  # type: ignore[call-overload]
    source = open_source(tmp_path / "t.npz")
    assert source.fields == {"x": Field("float", (3, 4)), "big": Field("int")}
    assert read(source, 2) == {"x": x.tolist(), "big": [0, 1, 2, 3, 4]}


def test_npz_arrays_that_are_not_asked_for_may_differ(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", x=np.zeros(4), test=np.zeros(2), n=np.array(7))
    assert open_source(tmp_path / "t.npz", ["x"]).num_rows == 4
    with pytest.raises(UserError, match=r"differ in length \(x 4, test 2\)"):
        open_source(tmp_path / "t.npz", ["x", "test"])
    with pytest.raises(UserError, match=r"array 'n' .* single number"):
        open_source(tmp_path / "t.npz")


def test_npz_never_unpickles(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", x=np.array([{}, {}], dtype=object))
    source = open_source(tmp_path / "t.npz")
    assert source.fields["x"].kind == "object"
    with pytest.raises(UserError, match="holds Python objects"):
        read(source)


def test_parquet_types(tmp_path: Path) -> None:
    columns = {
        "dictionary": pa.array(["b", "a", "b"]).dictionary_encode(),
        "codes": pa.array([5, 9, 5]).dictionary_encode(),
        "decimal": pa.array([Decimal("1.5")] * 3),
        "vector": pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float32(), 2)),
        "list": pa.array([[1.0], [], [2.0]]),
        "day": pa.array([0, 1, 2], pa.date32()),
        "nothing": pa.nulls(3),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    kinds = {name: field.kind for name, field in open_source(tmp_path / "t.parquet").fields.items()}
    assert kinds["dictionary"] == "text"
    assert kinds["codes"] == "int"
    assert kinds["decimal"] == "float"
    assert kinds["list"].startswith("list<")
    assert kinds["day"] == "date32[day]"
    assert kinds["nothing"] == "null"
    assert open_source(tmp_path / "t.parquet").fields["vector"] == Field("float", (2,), "float32")


def test_csv_types_come_from_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_PIECE", 16)
    lines = ["a,b,c,d", *["1,2,,4"] * 20, "1,0.5,x,", *["1,2,3,4"] * 3]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    source = open_source(tmp_path / "t.csv")
    assert {name: field.kind for name, field in source.fields.items()} == {
        "a": "int",
        "b": "float",
        "c": "text",
        "d": "int",
    }
    rows = read(source)
    assert rows["b"] == [2.0] * 20 + [0.5] + [2.0] * 3
    assert rows["c"] == [None] * 20 + ["x"] + ["3"] * 3
    assert rows["d"] == [4] * 20 + [None] + [4] * 3


def test_csv_missing_and_quoted_words(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('country\nNA\n"NA"\n\nDE\n')
    assert read(open_source(tmp_path / "t.csv"))["country"] == [None, "NA", "DE"]


def test_files_must_agree(tmp_path: Path) -> None:
    write(tmp_path, "npz", {"x": np.zeros(3, np.int64)}, "a")
    write(tmp_path, "npz", {"x": np.full(3, 0.5)}, "b")
    assert open_source(tmp_path / "*.npz").fields == {"x": Field("float")}
    write(tmp_path, "npz", {"x": np.zeros((3, 2))}, "c")
    with pytest.raises(UserError, match=r"column 'x' of '.*c.npz' is float of shape \[2\], and float before it"):
        open_source(tmp_path / "*.npz")
    write(tmp_path, "npz", {"y": np.zeros(3)}, "c")
    with pytest.raises(UserError, match="differ in the columns x, y"):
        open_source(tmp_path / "*.npz")


def test_unknown_columns_suggest(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", {"temperature": np.zeros(3), "place": np.zeros(3)})
    with pytest.raises(UserError, match=r"no column 'temprature': do you mean temperature?"):
        open_source(path, ["temprature"])
    with pytest.raises(UserError, match=r"no column 'zz': it has temperature, place."):
        open_source(path, ["zz"])


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,a,b\n1,2,3\n")
    assert open_source(tmp_path / "t.csv", ["b"]).num_rows == 1
    assert open_source(tmp_path / "t.csv").fields == {"a": Field(TWICE), "b": Field("int")}
    for names in (["a"], ["b", "a"]):
        with pytest.raises(UserError, match="two columns named 'a'"):
            open_source(tmp_path / "t.csv", names)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.xyz", b"1", "no known format: save it as Parquet or CSV, or give one of .parquet, .csv"),
        ("t.parquet", b"not parquet at all", "cannot read"),
        ("t.npz", b"not a zip at all", "cannot read"),
        ("t.csv", b"", "cannot read"),
        ("t.csv", b"a;b\n1;2\n", "semicolons separate its columns: save it with commas, or as Parquet"),
        ("t.csv", b"a;b\n1,5;2,5\n", "semicolons separate"),
        ("t.csv", b"a\tb\n1\t2\n", "tabs separate"),
        ("t.csv", "ort,gr\u00f6\u00dfe\nk,1\n".encode("latin-1"), "not UTF-8: save it as UTF-8"),
        ("t.csv", b"a,b\n1,2\n3\n", "cannot read .*Expected 2 columns"),
        ("t.csv", b"a,b\n", "has no rows"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / name)


def test_no_files_and_mixed_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file at"):
        open_source(tmp_path / "*.parquet")
    write(tmp_path, "npz", table())
    write(tmp_path, "csv", table())
    with pytest.raises(UserError, match="two formats"):
        open_source(tmp_path / "t.*")


def partitioned(folder: Path) -> dict[str, list]:
    """Parquet files by year and site, and the rows as they should be read."""
    columns = table()
    expected: dict[str, list] = {name: [] for name in (*columns, "year", "site")}
    for number, (year, site) in enumerate([(2019, "north"), (2019, "south"), (2020, "north")]):
        part = {name: values[number * 100 : number * 100 + 100] for name, values in columns.items()}
        below = folder / f"year={year}" / f"site={site}"
        below.mkdir(parents=True)
        write(below, "parquet", part)
        for name, values in part.items():
            expected[name] += values.tolist()
        expected["year"] += [year] * 100
        expected["site"] += [site] * 100
    return expected


@pytest.mark.parametrize("address", [False, True])
def test_a_folder_of_parquet_files_has_its_partitions_as_columns(tmp_path: Path, address: bool) -> None:
    """Given by its path or as an address of a file system."""
    expected = partitioned(tmp_path / "table")
    source = open_source((tmp_path / "table").as_uri() if address else tmp_path / "table")
    assert source.num_rows == 300
    assert source.fields["year"].kind == "int"
    assert source.fields["site"].kind == "text"
    for _ in range(2):
        assert read(source, 64) == expected
    assert read(source, 64, ["site", "n"]) == {name: expected[name] for name in ("site", "n")}


def test_a_folder_that_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no rows in Parquet files"):
        open_source(tmp_path)
    pack(write(tmp_path, "csv", table()), tmp_path / "packed")
    for folder in (tmp_path / "packed", tmp_path / "packed" / "train"):
        with pytest.raises(UserError, match="is a shard folder, which is packed already"):
            open_source(folder)
    with pytest.raises(UserError, match="nowhere://bucket/table is not a readable address"):
        open_source("nowhere://bucket/table")


@pytest.mark.parametrize("piece", [1, 7, 64, 1000, 1 << 20])
def test_csv_cells_with_line_breaks_are_cells_wherever_the_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(text, "_PIECE", piece)
    generator = np.random.default_rng(piece)
    cells = ["a", "b,c", 'say ""', "two\nlines", '"', "7,\n8\n", "5 x 4", ",", "\r\n", 'quote "in" it']
    rows = [(number, str(word)) for number, word in enumerate(generator.choice(cells, 300))]
    file = tmp_path / "t.csv"
    with file.open("w", newline="") as stream:
        stream.write("n,word\n")
        csv.writer(stream, lineterminator="\n").writerows(rows)
        stream.write('300,5" pipe\n')
    source = open_source(file)
    assert source.num_rows == 301
    want = {"n": list(range(301)), "word": [*(word for _, word in rows), '5" pipe']}
    assert read(source, 64) == want
    assert read(source, 64, ["n"]) == {"n": want["n"]}


def test_a_quote_that_is_never_closed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_PIECE", 64)
    file = tmp_path / "t.csv"
    file.write_text("n,word\n" + "".join(f"{n},fine\n" for n in range(50)) + '50,"lost\n' + "51,fine\n" * 50)
    with pytest.raises(UserError, match=r"""t\.csv': the cell that begins with "lost is never closed"""):
        open_source(file)
    monkeypatch.setattr(csv_text, "_LONGEST_CELL", 100)
    with pytest.raises(UserError, match="is never closed"):
        open_source(file)
    file.write_text('n,"wo\nrd"\n1,2\n')
    with pytest.raises(UserError, match="its header has a line break within a name"):
        open_source(file)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_compressed_file_is_unpacked_once_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(text, "_PIECE", 64)
    columns = table()
    plain = write(tmp_path, form, columns)
    packed = tmp_path / f"z.{form}.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    source = open_source(packed)
    back: list[Any] = []
    inner = gzip._GzipReader._rewind  # type: ignore[attr-defined]
    monkeypatch.setattr(gzip._GzipReader, "_rewind", lambda self: back.append(self) or inner(self))  # type: ignore[attr-defined]
    for _ in range(2):
        assert read(source, 7) == {name: values.tolist() for name, values in columns.items()}
    assert len(back) <= 2, "a piece was looked for from the beginning of the file"


def test_iso_dates_in_json_lines_are_times(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text("".join(f'{{"day": "2024-01-{day:02d}", "y": {day}}}\n' for day in range(1, 31)))
    train, held_out = pack(open_source(file), tmp_path / "out", columns={"y": "y"}, split_time="day",
                           split_after="2024-01-25")  # fmt: skip
    assert held_out is not None
    assert (train.num_rows, held_out.num_rows) == (24, 6)


def test_numbers_as_categories_are_groups(tmp_path: Path) -> None:
    frame = pd.DataFrame({"site": pd.Categorical(np.arange(100) // 5 + 7), "y": np.arange(100.0)})
    frame.to_feather(tmp_path / "t.feather")
    train, held_out = pack(open_source(tmp_path / "t.feather"), tmp_path / "out", columns={"y": "y"}, split_by="site",
                           held_out=0.5)  # fmt: skip
    assert held_out is not None
    assert train.num_rows % 5 == 0 < held_out.num_rows


def test_json_lines_take_their_types_from_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_PIECE", 16)
    file = tmp_path / "t.jsonl"
    file.write_text('{"a": 1, "b": "x"}\n{"a": 2.5}\n\n{"b": null, "a": 3, "c": true}\n')
    source = open_source(file)
    assert source.fields == {"a": Field("float"), "b": Field("text"), "c": Field("bool")}
    assert read(source) == {"a": [1.0, 2.5, 3.0], "b": ["x", None, None], "c": [None, None, True]}
    file.write_text('{"a": 1, "b": 0}\n{"a": "one"}\n')
    assert open_source(file).fields["a"].kind == "numbers and text ('one' in row 1, counted from 0)"
    file.write_text('{"a": 1\n')
    with pytest.raises(UserError, match="cannot read"):
        open_source(file)


@pytest.mark.parametrize("base", [0, 1])
def test_svmlight_rows_are_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: int) -> None:
    monkeypatch.setattr(text, "_PIECE", 40)
    generator = np.random.default_rng(2)
    x = generator.normal(size=(50, 6)) * (generator.random((50, 6)) < 0.4)
    x[0, [0, 5]] = 1.5, -2.0  # the first and the last are used
    x[7] = 0.0
    y = generator.integers(-1, 2, 50)
    lines = [
        f"{label} " + " ".join(f"{i + base}:{value!r}" for i, value in enumerate(row.tolist()) if value) + "  # a word"
        for label, row in zip(y.tolist(), x)
    ]
    (tmp_path / "t.svm").write_text("# a comment\n" + "\n".join(lines) + "\n")
    source = open_source(tmp_path / "t.svm")
    assert source.fields == {"y": Field("int"), "x": Field("float", (6,))}
    for rows in (3, 64):
        assert read(source, rows) == {"y": y.tolist(), "x": x.tolist()}
    (tmp_path / "u.svm").write_text("0.5 3:1\n")
    assert open_source(tmp_path / "u.svm").fields["y"] == Field("float")


@pytest.mark.parametrize(
    ("content", "message"),
    [("1 2:x\n", "cannot read"), ("1 2\n", "cannot read"), ("1 20000:1\n", "at most 10,000 can be packed"),
     ("1 -3:1\n", "numbered from -3")],
)  # fmt: skip
def test_svmlight_that_cannot_be_read(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.svm").write_text(content)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "t.svm")
