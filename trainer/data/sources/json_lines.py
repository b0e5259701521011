"""JSON lines: one object a line, and a column is what all of its values are, by one rule for any number of pieces.

As in `trainer.data.sources.formats`. Arrow is given one block at a time to find its kinds: of several whose kinds
differ, it makes words of numbers, or it crashes.
"""

import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pa_json

from trainer.data.address import Place
from trainer.data.fields import Field, Piece, Raw, arrow_field, choose, merge
from trainer.data.sources.place import opened
from trainer.data.sources.text import arrow_type, blocks, in_blocks, piece_text, texts
from trainer.errors import first_line

_MIXED = "mixed"
_NULL = re.compile(rb"\n[ \t\r]*null")
_WIDER = ({"int", "float"}, "float"), ({"timestamp[s]", "text"}, "text")
_WORDS = {
    **dict.fromkeys(("int", "float"), "numbers"),
    **dict.fromkeys(("timestamp[s]", "text"), "text"),
    **{"bool": "truth values", "lists": "lists", "objects": "objects"},
}


def inspect_json(file: Place, names: Sequence[str] | None) -> tuple[dict[str, Field], list[Piece]]:
    """Types over all rows; a key that a line lacks is a missing value. A column of several kinds has none: its kind
    says which, and in which row the second begins.
    """
    kinds: dict[str, str] = {}
    pieces: list[Piece] = []
    rows = 0
    with opened(file) as stream, ThreadPoolExecutor(pa.cpu_count()) as pool:
        for at, text in texts(stream):
            first, cut = rows, list(blocks(text))
            for block, quick in zip(cut, pool.map(_block_kinds, cut)):
                count, found = quick or _careful_kinds(block, rows)
                for name, kind in found.items():
                    known = kinds.get(name, "null")
                    kinds[name] = _joined(known, kind) or _mixture(block, rows, name, _WORDS.get(known))
                rows += count
            pieces.append(Piece(rows - first, at, at + len(text)))
    return {name: Field(kinds[name]) for name in choose(names, list(kinds), file)}, pieces


def _joined(known: str, found: str) -> str | None:
    """The kind of both; None where there is none."""
    if " and " in known or (found in ("null", known) and known != _MIXED):
        return known
    if known == "null" and found != _MIXED:
        return found
    return next((wide for both, wide in _WIDER if {known, found} == both), None)


def join_json(known: Field | None, found: Field, name: str, file: Place) -> Field:
    """As `merge`, of the columns of two files: words are words also where all words of one file are times, and a column
    that is of several kinds in one file has none.
    """
    if known is None or " and " in found.kind:
        return found
    joined = _joined(known.kind, found.kind)
    return Field(joined) if joined else merge(known, found, name, file)


def _read(text: bytes, block: int, options: pa_json.ParseOptions | None = None) -> pa.Table:
    threads = block <= len(text)
    return pa_json.read_json(io.BytesIO(text), pa_json.ReadOptions(use_threads=threads, block_size=block), options)


def _has_null(block: bytes) -> bool:
    """Whether a line is null: in front of all objects it crashes Arrow, and behind one it is a row without values."""
    return _NULL.search(b"\n" + block.removeprefix(b"\xef\xbb\xbf")) is not None


def _lines(block: bytes) -> list[bytes]:
    return [line for line in block.splitlines() if line.strip()]


def _block_kinds(block: bytes) -> tuple[int, dict[str, str]] | None:
    """The rows of lines of objects, and the kinds of their keys; None where Arrow cannot say."""
    if _has_null(block):
        return None
    try:
        table = _read(block, len(block) + 1)
    except pa.ArrowInvalid:
        return None
    ends = np.count_nonzero(np.frombuffer(block, np.uint8) == ord("\n"))
    if len(table) != ends and len(table) != len(_lines(block)):
        return None
    return len(table), {name: _kind(kind) for name, kind in zip(table.column_names, table.schema.types)}


def _kind(kind: pa.DataType) -> str:
    return "lists" if pa.types.is_list(kind) else "objects" if pa.types.is_struct(kind) else arrow_field(kind).kind


def _word(value: Any) -> str:
    """What a JSON value is."""
    kind = {bool: "bool", str: "text", list: "lists", dict: "objects"}.get(type(value), "int")
    return _WORDS[kind]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key occurs twice")
    return made


def _float(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise ValueError("beyond a float of 64 bits")
    return value


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float)
"""As strict as Arrow."""


def _row(line: bytes) -> Any:
    return _STRICT.decode(line.decode("utf-8-sig", "replace"))


def _careful_kinds(block: bytes, first_row: int) -> tuple[int, dict[str, str]]:
    """As `_block_kinds`, where keys of several kinds are `_MIXED`. Raises ValueError for a row that is no object."""
    lines = _lines(block)
    try:
        rows = [_row(line) for line in lines]
    except ValueError:
        rows = [None]
    if not all(isinstance(row, dict) for row in rows):
        raise _unreadable(lines, first_row)
    words: dict[str, set[str]] = {name: set() for row in rows for name in row}
    for row in rows:
        for name, value in row.items():
            if value is not None:
                words[name].add(_word(value))
    kinds = {name: _MIXED if len(found) > 1 else next(iter(found), "null") for name, found in words.items()}
    plain = {name for name, kind in kinds.items() if kind in ("numbers", "text", "truth values")}
    rest = [json.dumps({name: value for name, value in row.items() if name in plain}) for row in rows]
    quick = _block_kinds("\n".join(rest).encode()) if plain else (0, {})
    if quick is None:
        raise _unreadable(lines, first_row)
    return len(rows), {**kinds, **quick[1]}


def _unreadable(lines: Sequence[bytes], first_row: int) -> ValueError:
    """Names the first of ``lines`` that is not one object."""
    for row, line in enumerate(lines, first_row):
        try:
            count, reason = (0, "null") if _has_null(line) else (len(_read(line, len(line) + 1)), "of several")
        except pa.ArrowInvalid as error:
            count, reason = 0, first_line(error).removeprefix("JSON parse error: ").removesuffix(" in row 0")
        if count != 1:
            return ValueError(f"row {row} (counted from 0) is no JSON object ({reason}): write one object a line")
    return ValueError(f"it has no JSON object on each line from row {first_row} on (counted from 0)")


def _mixture(block: bytes, first_row: int, name: str, before: str | None) -> str:
    """The kinds of a column, and where it is not what it is ``before`` ``block``, or before in it."""
    for row, line in enumerate(_lines(block), first_row):
        value = _row(line).get(name)
        word = None if value is None else _word(value)
        before = before or word
        if word not in (None, before):
            shown = value if isinstance(value, str) else json.dumps(value)
            return f"{before} and {word} ({shown[:20]!r} in row {row}, counted from 0)"
    raise ValueError(f"column '{name}' changes from row {first_row} on (counted from 0): make it one kind")


def read_json(file: Place, fields: Mapping[str, Field], rows: int, piece: Piece) -> Iterator[dict[str, Raw]]:
    types = {name: arrow_type(field.kind) for name, field in fields.items()}
    schema = pa.schema([(name, kind) for name, kind in types.items() if kind is not None])
    options = pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    text = piece_text(file, piece)
    table = in_blocks(text, lambda block: _read(text, block, options))
    for batch in table.combine_chunks().to_batches(max_chunksize=rows):
        yield {name: batch.column(name) for name in schema.names}
