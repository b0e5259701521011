"""The text formats: CSV, JSON lines and SVMLight, read in pieces of whole lines; types are those of all rows.

As in `trainer.data.sources.formats`. Shapes: B rows of a piece, D features.
"""

import io
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json

from trainer.data.address import Place
from trainer.data.fields import (
    NOT_UTF8,
    TWICE,
    Field,
    Piece,
    Raw,
    arrow_field,
    choose,
    merge,
    merge_words,
    object_field,
)
from trainer.data.sources.place import is_compressed, opened, stamp
from trainer.errors import UserError

_PIECE = 1 << 24  # bytes that are read at a time, then to the end of the line
_ARROW = {"float": pa.float64(), "int": pa.int64(), "bool": pa.bool_(), "text": pa.string()}
_BLOCK = 1 << 20  # bytes that Arrow takes at a time; no row may be longer
_LONGEST_CELL = 1 << 24  # bytes
_LONGEST_LINE = 1 << 29  # bytes
_OTHER_MARKS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_MOST_FEATURES = 10_000  # SVMLight rows are packed dense
_CLOSED = re.compile(rb'(?:[^"]++|"(?<![^,\r\n]")(?:[^"]++|"")*+"|"(?<=[^,\r\n]"))*+')
"""What of a CSV text is no open cell. A quote opens one where a cell begins, and is a quote elsewhere."""
_held = threading.local()

Whole = Callable[[bytes, IO[bytes]], bytes]
"""A text of whole lines to one of whole rows, with what it needs of the rest of the file."""


def texts(stream: IO[bytes], stop: int | None = None, whole: Whole | None = None) -> Iterator[tuple[int, bytes]]:
    """The rest of a file (to ``stop``) in texts of whole lines, none of them blank, each with its place."""
    at = stream.tell()
    while text := stream.read(_PIECE if stop is None else min(_PIECE, stop - at)):
        text += _rest_of_line(stream, at + len(text)) if not text.endswith(b"\n") else b""
        text = whole(text, stream) if whole else text
        if text.strip():
            yield at, text
        at += len(text)


def _rest_of_line(stream: IO[bytes], at: int) -> bytes:
    """To the end of the line. Raises ValueError for one that never ends."""
    rest = stream.readline(_LONGEST_LINE)
    if len(rest) == _LONGEST_LINE:
        raise ValueError(f"the line at byte {at:,} is longer than {_LONGEST_LINE >> 20} MB: give a table of short ones")
    return rest


def piece_text(file: Place, piece: Piece) -> bytes:
    """The bytes of a piece.

    A compressed file stays open for the thread's next piece: to go back to one costs all that lies before it.
    """
    if not is_compressed(file):
        with opened(file) as stream:
            stream.seek(piece.at)
            return stream.read(piece.stop - piece.at)
    key = file, stamp(file)
    if getattr(_held, "key", None) != key:
        if hasattr(_held, "stream"):
            _held.stream.close()
        _held.stream, _held.key = opened(file), key
    _held.stream.seek(piece.at)
    content: bytes = _held.stream.read(piece.stop - piece.at)
    return content


def _open_cell(text: bytes, first: int = 0) -> int:
    """Where in CSV lines, from ``first`` on, the quoted cell begins that does not end in them; or their length."""
    found = _CLOSED.match(text, first)
    assert found is not None
    return found.end()


def _whole_rows(text: bytes, stream: IO[bytes]) -> bytes:
    """CSV lines to the end of the last cell that holds a line break. Raises ValueError for a quote that never ends."""
    at = 0
    while (at := _open_cell(text, at)) < len(text):
        more = stream.read(len(text) - at) if len(text) - at < _LONGEST_CELL else b""
        if not more:
            begin = text[at : at + 40].decode(errors="replace").partition("\n")[0]
            raise ValueError(f"the cell that begins with {begin} is never closed by another quote")
        text += more + (stream.readline() if not more.endswith(b"\n") else b"")
    return text


def _in_blocks(text: bytes, read: Callable[[int], pa.Table]) -> pa.Table:
    """``read(bytes of a block)`` of ``text``: in blocks of 1 MB, on several threads; in one where a row is longer."""
    try:
        return read(min(len(text) + 1, _BLOCK))
    except pa.ArrowInvalid as error:
        if "straddling" not in str(error):
            raise
    return read(len(text) + 1)


def _csv_header(stream: IO[bytes]) -> list[str]:
    first = stream.readline()
    if _open_cell(first) < len(first):
        raise ValueError("its header has a line break within a name")
    names: list[str] = pa_csv.read_csv(io.BytesIO(first), pa_csv.ReadOptions(block_size=len(first) + 1)).column_names
    other = next((word for mark, word in _OTHER_MARKS.items() if len(names) == 1 and mark in names[0]), None)
    if other is not None:
        raise ValueError(f"{other} separate its columns: save it with commas, or as Parquet")
    return names


def _csv_table(text: bytes, header: Sequence[str], types: Mapping[str, pa.DataType | None]) -> pa.Table:
    """The columns of ``types`` of lines of a file; a type that is None is that of all their values."""
    parsing = pa_csv.ParseOptions(newlines_in_values=b'"' in text)
    converting = pa_csv.ConvertOptions(
        include_columns=list(types),
        column_types={name: kind for name, kind in types.items() if kind is not None},
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )

    def read(block: int) -> pa.Table:
        reading = pa_csv.ReadOptions(column_names=header, block_size=block)
        return pa_csv.read_csv(io.BytesIO(text), reading, parsing, converting)

    return _in_blocks(text, read)


def _codes(text: bytes, header: Sequence[str], table: pa.Table) -> set[str]:
    """The columns of ``table``, read from ``text``, whose numbers are not what is written: 007, and integers beyond 64
    bits. Those are names, not numbers.
    """
    zeros = _has_leading_zeros(text)
    doubtful = [
        name
        for name, column in zip(table.column_names, table.columns)
        if (zeros and pa.types.is_integer(column.type)) or (pa.types.is_floating(column.type) and _is_beyond(column))
    ]
    if not doubtful:
        return set()
    import pyarrow.compute as pc

    words = _csv_table(text, header, dict.fromkeys(doubtful, pa.string()))
    found = set()
    for name in doubtful:
        beyond = pa.types.is_floating(table.column(name).type)
        matched = pc.match_substring_regex(words.column(name), r"^[+-]?\d+$" if beyond else r"^0\d")
        if (pc.all if beyond else pc.any)(matched).as_py():
            found.add(name)
    return found


def _has_leading_zeros(text: bytes) -> bool:
    """Whether any cell of CSV lines may begin with a zero and another digit."""
    marks = np.frombuffer(b"\n" + text + b"\n", np.uint8)
    zeros = np.flatnonzero(marks == ord("0"))
    before, after = marks[zeros - 1], marks[zeros + 1]
    return bool((np.isin(before, list(b',"\r\n')) & (after >= ord("0")) & (after <= ord("9"))).any())


def _is_beyond(column: pa.ChunkedArray) -> bool:
    """Whether a column of floats has one that no integer of 64 bits is."""
    values = np.abs(column.to_numpy())
    return bool(((values >= 2.0**63) & np.isfinite(values)).any())


def _csv_texts(file: Place) -> Iterator[tuple[list[str], int, bytes]]:
    """The header of a file with each of its texts of whole rows and its place."""
    with opened(file) as stream:
        header = _csv_header(stream)
        for at, text in texts(stream, whole=_whole_rows):
            yield header, at, text


def inspect_csv(file: Place, names: Sequence[str] | None) -> tuple[dict[str, Field], list[Piece]]:
    """Types over all rows: a column of integers with a fraction somewhere is float, with a word somewhere text.

    Numbers that are not written as such (007, and integers beyond 64 bits) are text.
    """
    with opened(file) as stream:
        times = Counter(_csv_header(stream))
    chosen = choose(names, [name for name, count in times.items() for _ in range(min(count, 2))], file)
    fields = {name: Field("null" if times[name] == 1 else TWICE) for name in chosen}
    pieces = []
    once = dict.fromkeys(name for name in chosen if times[name] == 1)
    for header, at, text in _csv_texts(file):
        table = _csv_table(text, header, once)
        codes = _codes(text, header, table)
        if len(table):
            pieces.append(Piece(len(table), at, at + len(text)))
        for name, kind in zip(table.column_names, table.schema.types):
            found = Field("text") if name in codes else arrow_field(kind)
            found = Field(NOT_UTF8) if pa.types.is_binary(kind) else found
            fields[name] = merge_words(fields[name], found, name, file)
    return fields, pieces


def read_csv(file: Place, fields: Mapping[str, Field], rows: int, piece: Piece) -> Iterator[dict[str, Raw]]:
    with opened(file) as stream:
        header = _csv_header(stream)
    types = {name: _ARROW.get(field.kind) for name, field in fields.items()}
    table = _csv_table(piece_text(file, piece), header, types)
    for batch in table.combine_chunks().to_batches(max_chunksize=rows):
        yield {name: batch.column(name) for name in fields}


def inspect_json(file: Place, names: Sequence[str] | None) -> tuple[dict[str, Field], list[Piece]]:
    """One object a line; a key that a line lacks is a missing value. A column of several kinds has none."""
    fields: dict[str, Field] = {}
    pieces: list[Piece] = []
    with opened(file) as stream:
        for at, text in texts(stream):
            first = sum(piece.rows for piece in pieces)
            rows, found = _json_fields(text, first)
            pieces.append(Piece(rows, at, at + len(text)))
            for name, field in found.items():
                try:
                    fields[name] = merge(fields.get(name), field, name, file)
                except UserError:
                    fields[name] = Field(f"{fields[name].kind} and, from row {first} on, {field.kind}")
    return {name: fields[name] for name in choose(names, list(fields), file)}, pieces


def _json_table(text: bytes, options: pa_json.ParseOptions | None = None) -> pa.Table:
    return _in_blocks(
        text, lambda block: pa_json.read_json(io.BytesIO(text), pa_json.ReadOptions(block_size=block), options)
    )


def _json_fields(text: bytes, first_row: int) -> tuple[int, dict[str, Field]]:
    """The rows of lines of objects, and the fields of their keys."""
    try:
        table = _json_table(text)
        return len(table), {name: arrow_field(kind) for name, kind in zip(table.column_names, table.schema.types)}
    except pa.ArrowInvalid:  # a key of two kinds, or no JSON: Python says which, and where
        rows: list[dict[str, Any]] = []
        for line in filter(None, map(bytes.strip, text.splitlines())):
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                raise ValueError(f"row {first_row + len(rows)} (counted from 0) is no JSON object") from None
        names = dict.fromkeys(name for row in rows for name in row)
        return len(rows), {name: object_field([row.get(name) for row in rows], first_row) for name in names}


def read_json(file: Place, fields: Mapping[str, Field], rows: int, piece: Piece) -> Iterator[dict[str, Raw]]:
    types = {name: _ARROW.get(field.kind) or _time(field.kind) for name, field in fields.items()}
    schema = pa.schema([(name, kind) for name, kind in types.items() if kind is not None])
    options = pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    table = _json_table(piece_text(file, piece), options)
    for batch in table.combine_chunks().to_batches(max_chunksize=rows):
        yield {name: batch.column(name) for name in schema.names}


def _time(kind: str) -> pa.DataType | None:
    """The Arrow type of a field of ISO dates."""
    return pa.type_for_alias(kind) if kind.startswith("timestamp") else None


def inspect_svmlight(file: Place, names: Sequence[str] | None) -> tuple[dict[str, Field], list[Piece]]:
    """Lines of "y index:value ...", as columns y and x [D], zero where a line names no value."""
    features, _, whole, pieces = _svmlight_shape(file, stamp(file))
    fields = {"y": Field("int" if whole else "float"), "x": Field("float", (features,))}
    return {name: fields[name] for name in choose(names, list(fields), file)}, pieces


def read_svmlight(file: Place, fields: Mapping[str, Field], rows: int, piece: Piece) -> Iterator[dict[str, Raw]]:
    features, base, whole, _ = _svmlight_shape(file, stamp(file))
    labels, counts, index, value = svmlight_rows(piece_text(file, piece))
    ends = np.concatenate([[0], counts.cumsum()])
    for first in range(0, len(labels), rows):
        here = slice(first, first + rows)
        start, stop = ends[first], ends[min(first + rows, len(labels))]
        x = np.zeros((len(labels[here]), features))
        x[np.arange(len(x)).repeat(counts[here]), index[start:stop] - base] = value[start:stop]
        columns: dict[str, Raw] = {"y": labels[here].astype(np.int64) if whole else labels[here], "x": x}
        yield {name: columns[name] for name in fields}


@lru_cache(maxsize=64)
def _svmlight_shape(file: Place, _changed: object) -> tuple[int, int, bool, list[Piece]]:
    """D, the lowest index (1, or 0 where one is used), whether the labels are whole numbers, and the pieces."""
    pieces, highest, base, whole = [], 0, 1, True
    with opened(file) as stream:
        for at, text in texts(stream):
            labels, _, index, _ = svmlight_rows(text)
            pieces.append(Piece(len(labels), at, at + len(text)))
            whole = whole and bool((labels % 1 == 0).all())
            if len(index):
                highest, base = max(highest, int(index.max())), min(base, int(index.min()))
    features = highest + 1 - base
    if base < 0 or features > _MOST_FEATURES:
        raise UserError(
            f"'{file}' has features numbered from {base} to {highest}: from 0 or 1 on, at most {_MOST_FEATURES:,} can "
            "be packed, as dense columns."
        )
    return features, base, whole, [piece for piece in pieces if piece.rows]


def svmlight_rows(text: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels [B], values a row [B], their indexes and the values [all of them]."""
    lines = [line for each in text.split(b"\n") if (line := each.partition(b"#")[0].strip())]
    counts = np.array([line.count(b":") for line in lines], dtype=np.int64)
    numbers = np.array(b" ".join(lines).replace(b":", b" ").split(), dtype=np.float64)
    if len(numbers) != len(lines) + 2 * counts.sum():
        raise ValueError("a line is not 'label index:value ...'")
    starts = np.cumsum(1 + 2 * counts) - (1 + 2 * counts)
    pairs = np.delete(numbers, starts).reshape(-1, 2)
    return numbers[starts], counts, pairs[:, 0].astype(np.int64), pairs[:, 1]
