"""The kind of a CSV column, joined in any order; cells and rows as Python's own csv module has them."""

import csv
import io
import itertools
import random
import re
from pathlib import Path
from typing import Any

import pytest

from trainer.data.fields import LONG, NOT_UTF8, TWICE, Field
from trainer.data.sources import text
from trainer.data.sources.csv_text import (
    _count_padded,
    _open_cell,
    inspect_csv,
    join_csv,
    read_csv,
    settle_csv,
)
from trainer.errors import UserError

KINDS = ["null", "int", "float", "bool", "text", LONG, "date32[day]", "timestamp[s]", "timestamp[ns]",
         "timestamp[s, tz=UTC]", "timestamp[ns, tz=UTC]", NOT_UTF8, TWICE]  # fmt: skip


def joined(kinds: tuple[str, ...]) -> str:
    field: Field | None = None
    for kind in kinds:
        field = join_csv(field, Field(kind), "x", "t.csv")
    assert field is not None
    return field.kind


@pytest.mark.parametrize("size", [2, 3])
def test_the_order_of_pieces_makes_no_difference(size: int) -> None:
    for kinds in itertools.combinations_with_replacement(KINDS, size):
        assert len({joined(order) for order in itertools.permutations(kinds)}) == 1, kinds


@pytest.mark.parametrize(
    ("kinds", "kind"),
    [
        (("null",), "null"),
        (("null", "int"), "int"),
        (("int", "float"), "float"),
        (("int", LONG), LONG),
        (("float", LONG), "float"),
        (("int", "bool"), "bool?"),
        (("float", "bool"), "text"),
        (("int", "text"), "text"),
        (("date32[day]", "timestamp[s]"), "timestamp[s]"),
        (("date32[day]", "timestamp[ns]"), "timestamp[ns]?"),
        (("timestamp[s]", "timestamp[s, tz=UTC]"), "text"),
        (("timestamp[s, tz=UTC]", "timestamp[ns, tz=UTC]"), "timestamp[ns, tz=UTC]?"),
        (("int", NOT_UTF8), NOT_UTF8),
        ((NOT_UTF8, TWICE), TWICE),
    ],
)
def test_the_kind_of_the_cells_of_both(kinds: tuple[str, ...], kind: str) -> None:
    assert joined(kinds) == kind


def fields_of(path: Path, names: list[str] | None = None) -> dict[str, Field]:
    fields, pieces = inspect_csv(path, names)
    return settle_csv([path], fields, [(0, piece) for piece in pieces])


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["1", "-2", ""], "int"),
        (["9223372036854775807", "-9223372036854775808"], "int"),
        (["9223372036854775808", "1"], "text"),
        (["9223372036854775808", "1.5"], "float"),
        (["1", "2.5", "1e3"], "float"),
        (["nan", "inf"], "float"),
        (["true", "False", ""], "bool"),
        (["1", "0", "true"], "bool"),
        (["1", "2", "true"], "text"),
        (["007", "1"], "text"),
        (["0x1F", "1"], "text"),
        (["0", "10", "100"], "int"),
        (["0.5", "00.5"], "float"),
        (["", ""], "null"),
        (["2024-01-31", "2024-02-01"], "date32[day]"),
        (["2024-01-31", "2024-02-01 10:00:00"], "timestamp[s]"),
        (["2024-01-31", "2024-02-01 10:00:00.5"], "timestamp[ns]"),
        (["1000-01-31", "2024-02-01 10:00:00.5"], "text"),
        (["2024-01-31", "1"], "text"),
        (['"1"', "2"], "int"),
        (['""', "a"], "text"),
    ],
    ids=str,
)
@pytest.mark.parametrize("piece", [1, 1 << 24])
def test_the_kind_of_a_column_is_that_of_all_its_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cells: list[str], kind: str, piece: int
) -> None:
    """Read line by line or at once, from either end."""
    monkeypatch.setattr(text, "_PIECE", piece)
    for order in (cells, cells[::-1]):
        path = written(tmp_path / "t.csv", "x,y\n" + "".join(f"{cell},1\n" for cell in order))
        assert fields_of(path) == {"x": Field(kind), "y": Field("int")}


def test_text_in_another_encoding_is_told_for_its_column_alone(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "x,y\né,1\nb,2\n".encode("latin-1"))
    assert fields_of(path) == {"x": Field(NOT_UTF8), "y": Field("int")}


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "a,b,a\n1,2,3\n")
    assert fields_of(path) == {"a": Field(TWICE), "b": Field("int")}
    assert list(fields_of(path, ["b"])) == ["b"]
    for name, said in (("a", "two columns named 'a'"), ("bb", "no column 'bb': do you mean b")):
        with pytest.raises(UserError, match=said):
            inspect_csv(path, [name])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a;b\n1;2\n", "semicolons separate its columns"),
        ("a\tb\n1\t2\n", "tabs separate"),
        ("a|b\n1|2\n", "vertical bars separate"),
        ('"a\nb",c\n1,2\n', "its header has a line break"),
        ('a,b\n1,"2\n3,4\n', "the cell that begins with .* is never closed"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        inspect_csv(written(tmp_path / "t.csv", content), None)


def nested(generator: random.Random) -> list[list[str]]:
    """Rows of cells with marks, quotes and line breaks in them."""
    return [["".join(generator.choices('ab",\n\r 0', k=generator.randrange(6))) for _ in range(3)] for _ in range(12)]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_cells_of_any_characters_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, end: str
) -> None:
    """As Python's csv module wrote them, wherever the file is cut."""
    monkeypatch.setattr(text, "_PIECE", 8)
    rows, stream = nested(random.Random(seed)), io.StringIO(newline="")
    csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator=end).writerows([["a", "b", "c"], *rows])
    path = written(tmp_path / "t.csv", stream.getvalue())
    fields, pieces = inspect_csv(path, None)
    batches = [batch for piece in pieces for batch in read_csv(path, dict.fromkeys(fields, Field("text")), 4, piece)]
    assert all(len(batch["a"]) <= 4 for batch in batches)
    found: list[list[Any]] = [list(row) for batch in batches for row in zip(*(batch[n].to_pylist() for n in "abc"))]
    assert found == rows


def test_an_open_cell_is_where_a_quote_has_no_end() -> None:
    """After each line break of a file: open exactly where no row ends there."""
    for seed in range(200):
        generator, stream = random.Random(seed), io.StringIO(newline="")
        csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(nested(generator))
        content = stream.getvalue()
        ends = set(itertools.accumulate(len(line) for line in lines_of_rows(content)))
        for at in (match.end() for match in re.finditer("\n", content)):
            head = content[:at].encode()
            assert (_open_cell(head) == len(head)) == (at in ends)


def lines_of_rows(content: str) -> list[str]:
    """The text of each row: lines until their quotes are paired (each cell is quoted)."""
    lines = content.split("\n")[:-1]
    rows, held = [], ""
    for line in lines:
        held += line + "\n"
        if held.count('"') % 2 == 0:
            rows.append(held)
            held = ""
    return rows


def test_digits_after_a_zero_are_counted() -> None:
    """Every cell such as 007 or 0x1F is; what only looks like one within a word may be."""
    generator = random.Random(0)
    for _ in range(200):
        cells = ["".join(generator.choices("01 x7F.a", k=generator.randrange(5))) for _ in range(8)]
        content = ",".join(cells)
        padded = sum(bool(re.fullmatch(r"[ \t]*0(\d+|[xX][0-9a-fA-F]+)[ \t]*", cell)) for cell in cells)
        words = len(re.findall(r'(?:^|(?<=[,"\r\n \t]))0[0-9a-fA-FxX]+(?=[,"\r\n \t]|$)', content))
        assert padded <= _count_padded(content.encode()) == words
