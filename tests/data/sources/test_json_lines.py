"""The kind of a JSON column, whichever of its lines come first, and its values as Python's json module reads them."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from trainer.data.fields import Field
from trainer.data.sources import text
from trainer.data.sources.json_lines import inspect_json, join_json, read_json
from trainer.errors import UserError


def written(path: Path, rows: list[Any], end: str = "\n") -> Path:
    path.write_text(end.join(map(json.dumps, rows)) + end)
    return path


def kind_of(path: Path) -> str:
    return inspect_json(path, ["x"])[0]["x"].kind


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([None, None], "null"),
        ([1, None], "int"),
        ([2**63 - 1, -(2**63)], "int"),
        ([1, 2.5], "float"),
        ([2**63, 1], "float"),
        ([True, None, False], "bool"),
        (["a", ""], "text"),
        (["2024-01-31", "2024-02-01"], "timestamp[s]"),
        (["2024-01-31", "later"], "text"),
        ([[1], [2.5]], "lists"),
        ([{"a": 1}, {"b": 2}], "objects"),
    ],
    ids=str,
)
@pytest.mark.parametrize("piece", [1, 1 << 24])
def test_the_kind_of_a_column_is_that_of_all_its_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[Any], kind: str, piece: int
) -> None:
    """Read line by line or at once, in any order."""
    monkeypatch.setattr(text, "_PIECE", piece)
    for order in itertools.permutations(values):
        assert kind_of(written(tmp_path / "t.jsonl", [{"x": value} for value in order])) == kind


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, "a"], "numbers and text ('a' in row 1, counted from 0)"),
        (["a", None, 1.5], "text and numbers ('1.5' in row 2, counted from 0)"),
        ([True, 1], "truth values and numbers ('1' in row 1, counted from 0)"),
        ([None, [1], {"a": 1}], "lists and objects ('{\"a\": 1}' in row 2, counted from 0)"),
        ([1, "a" * 30, True], f"numbers and text ('{'a' * 20}' in row 1, counted from 0)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("piece", [1, 1 << 24])
def test_a_column_of_several_kinds_says_where_the_second_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[Any], kind: str, piece: int
) -> None:
    monkeypatch.setattr(text, "_PIECE", piece)
    assert kind_of(written(tmp_path / "t.jsonl", [{"x": value} for value in values])) == kind


def random_rows(seed: int) -> list[dict[str, Any]]:
    generator = random.Random(seed)
    makers: dict[str, Any] = {
        "i": lambda: generator.randrange(-(2**63), 2**63),
        "f": lambda: generator.choice([generator.random(), 1e-300, -2.5e100]),
        "t": lambda: "".join(generator.choices('aé"\\\n\u2028 ,{', k=4)),
        "b": lambda: generator.random() < 0.5,
    }
    return [
        {
            name: generator.choice([make, make, lambda: None])()
            for name, make in makers.items()
            if generator.random() < 0.8
        }
        for _ in range(20)
    ]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_values_are_those_of_the_json_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, end: str
) -> None:
    """A key that a line lacks is a missing value; pieces have at most the rows that are asked for."""
    monkeypatch.setattr(text, "_PIECE", 64)
    rows = random_rows(seed)
    path = written(tmp_path / "t.jsonl", rows, end)
    fields, pieces = inspect_json(path, list("tfib"))
    assert {name: field.kind for name, field in fields.items()} == {"t": "text", "f": "float", "i": "int", "b": "bool"}
    assert list(fields) == list("tfib")
    batches = [batch for piece in pieces for batch in read_json(path, fields, 3, piece)]
    assert all(len(batch["i"]) <= 3 for batch in batches)
    assert sum(piece.rows for piece in pieces) == len(rows)
    for name in fields:
        assert [v for batch in batches for v in batch[name].to_pylist()] == [row.get(name) for row in rows]


def test_a_column_that_no_line_has_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", [{"price": 1}, {"size": 2}])
    assert list(inspect_json(path, None)[0]) == ["price", "size"]
    with pytest.raises(UserError, match="has no column 'prize': do you mean price"):
        inspect_json(path, ["prize"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1]", "is no JSON object"),
        ("3", "is no JSON object"),
        ("null", r"is no JSON object \(null\)"),
        (" null ", r"is no JSON object \(null\)"),
        ("null null", r"is no JSON object \(null\)"),
        ('{"x": 1} {"x": 2}', r"is no JSON object \(of several\)"),
        ('{"x": 1', "is no JSON object"),
        ("{'x': 1}", "is no JSON object"),
        ('{"x": NaN}', None),
        ('{"x": 1, "x": 2}', "is no JSON object"),
    ],
)
@pytest.mark.parametrize("first", [0, 2])
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: str, said: str | None, first: int) -> None:
    """Also null, which would be a row without values, and in front of all objects crashes Arrow."""
    path = tmp_path / "t.jsonl"
    path.write_text('{"x": 1}\n' * first + line + '\n{"x": 3}\n')
    if said is None:
        assert kind_of(path) == "float"
        return
    with pytest.raises(ValueError, match=rf"row {first} \(counted from 0\) {said}"):
        inspect_json(path, None)


def joined(*kinds: str) -> str:
    field: Field | None = None
    for kind in kinds:
        field = join_json(field, Field(kind), "x", "t.jsonl")
    assert field is not None
    return field.kind


MIXED = "numbers and text ('a' in row 1, counted from 0)"


@pytest.mark.parametrize(
    ("kinds", "kind"),
    [
        (("null", "int"), "int"),
        (("int", "float"), "float"),
        (("timestamp[s]", "text"), "text"),
        (("timestamp[s]", "timestamp[s]"), "timestamp[s]"),
        (("text", MIXED), MIXED),
        (("null", "null"), "null"),
    ],
)
def test_files_are_joined_in_either_order(kinds: tuple[str, str], kind: str) -> None:
    assert joined(*kinds) == joined(*kinds[::-1]) == kind


def test_files_that_differ_are_named() -> None:
    with pytest.raises(UserError, match=r"column 'x' of 't\.jsonl' is text, and int before it"):
        joined("int", "text")
