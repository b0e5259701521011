"""Sources: every format gives its rows back exactly, in order, and says what is wrong with a file."""

from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.data import sources
from trainer.data.sources import Field, open_source
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
    else:
        lines = [",".join(columns)]
        lines += [",".join(str(value.item()) for value in row) for row in zip(*columns.values())]
        path.write_text("\n".join(lines) + "\n")
    return path


def read(source: sources.Source, rows: int = 64, names: list[str] | None = None) -> dict[str, list]:
    read: dict[str, list] = {name: [] for name in names or source.fields}
    for batch in source.batches(rows, names):
        assert batch.keys() == read.keys()
        assert all(len(values) <= rows for values in batch.values())
        for name, values in batch.items():
            read[name] += values.tolist()
    return read


@pytest.mark.parametrize("form", ["parquet", "csv", "npz"])
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
    assert open_source(tmp_path / "t.parquet").fields["vector"] == Field("float", (2,))


def test_csv_types_come_from_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_CSV_BYTES", 16)
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
    with pytest.raises(UserError, match=r"column 'x' of '.*c.npz' is float of shape \[2\], and float in the files"):
        open_source(tmp_path / "*.npz")
    write(tmp_path, "npz", {"y": np.zeros(3)}, "c")
    with pytest.raises(UserError, match="differ in the columns x, y"):
        open_source(tmp_path / "*.npz")


def test_unknown_columns_suggest(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", {"temperature": np.zeros(3), "place": np.zeros(3)})
    with pytest.raises(UserError, match=r"no column 'temprature': did you mean temperature?"):
        open_source(path, ["temprature"])
    with pytest.raises(UserError, match=r"no column 'zz': it has temperature, place."):
        open_source(path, ["zz"])


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,a,b\n1,2,3\n")
    assert open_source(tmp_path / "t.csv", ["b"]).num_rows == 1
    for names in (None, ["a"]):
        with pytest.raises(UserError, match="two columns named 'a'"):
            open_source(tmp_path / "t.csv", names)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"1", "no known format: give one of .parquet, .csv, .npz"),
        ("t.parquet", b"not parquet at all", "cannot read"),
        ("t.npz", b"not a zip at all", "cannot read"),
        ("t.csv", b"", "cannot read"),
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
    with pytest.raises(UserError, match="no file at"):
        open_source(tmp_path)
    write(tmp_path, "npz", table())
    write(tmp_path, "csv", table())
    with pytest.raises(UserError, match="two formats"):
        open_source(tmp_path / "t.*")
