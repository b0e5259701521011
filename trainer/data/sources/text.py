"""The text formats: CSV, JSON lines and SVMLight, read in pieces of whole lines; types are those of all rows.

As in `trainer.data.sources.formats`. Shapes: B rows of a piece, D features.
"""

import io
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json

from trainer.data.address import Place
from trainer.data.fields import Field, Piece, Raw, arrow_field, choose, merge
from trainer.data.sources.place import is_compressed, opened, stamp
from trainer.errors import UserError

_PIECE = 1 << 24  # bytes that are read at a time, then to the end of the line
_ARROW = {"float": pa.float64(), "int": pa.int64(), "bool": pa.bool_(), "text": pa.string()}
_LONGEST_CELL = 1 << 24  # bytes
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
        text += stream.readline() if not text.endswith(b"\n") else b""
        text = whole(text, stream) if whole else text
        if text.strip():
            yield at, text
        at += len(text)


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
    return _held.stream.read(piece.stop - piece.at)


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


def _csv_tables(
    file: Place, names: Sequence[str] | None, types: dict[str, pa.DataType], piece: Piece | None = None
) -> Iterator[tuple[pa.Table, int, int]]:
    """The file, or its header and a piece, in tables of whole lines, with their places in bytes; the first has no rows.

    Types that are not given are those of each table.
    """
    with opened(file) as stream:
        first = stream.readline()
        if _open_cell(first) < len(first):
            raise ValueError("its header has a line break within a name")
        header = pa_csv.read_csv(io.BytesIO(first))
        chosen = choose(names, header.column_names, file)
        yield header.select(chosen), 0, stream.tell()
        reading = pa_csv.ReadOptions(column_names=header.column_names)
        converting = pa_csv.ConvertOptions(
            include_columns=chosen, column_types=types, strings_can_be_null=True, quoted_strings_can_be_null=False
        )
        for at, text in texts(stream, whole=_whole_rows) if piece is None else [(piece.at, piece_text(file, piece))]:
            parsing = pa_csv.ParseOptions(newlines_in_values=b'"' in text)
            table = pa_csv.read_csv(io.BytesIO(text), reading, parsing, converting)
            yield table, at, at + len(text)


def inspect_csv(file: Place, names: Sequence[str] | None) -> tuple[dict[str, Field], list[Piece]]:
    """Types over all rows: a column of integers with a fraction somewhere is float, with a word somewhere text."""
    fields: dict[str, Field] = {}
    pieces = []
    for table, at, stop in _csv_tables(file, names, {}):
        if len(table):
            pieces.append(Piece(len(table), at, stop))
        for name, kind in zip(table.column_names, table.schema.types):
            found = arrow_field(kind)
            try:
                fields[name] = merge(fields.get(name), found, name, file)
            except UserError:
                fields[name] = Field("text")
    return fields, pieces


def read_csv(file: Place, fields: Mapping[str, Field], rows: int, piece: Piece) -> Iterator[dict[str, Raw]]:
    types = {name: _ARROW[field.kind] for name, field in fields.items() if field.kind in _ARROW}
    for table, _, _ in _csv_tables(file, list(fields), types, piece):
        for batch in table.combine_chunks().to_batches(max_chunksize=rows):
            yield {name: batch.column(name) for name in fields}


def inspect_json(file: Place, names: Sequence[str] | None) -> tuple[dict[str, Field], list[Piece]]:
    """One object a line; a key that a line lacks is a missing value."""
    fields: dict[str, Field] = {}
    pieces = []
    with opened(file) as stream:
        for at, text in texts(stream):
            table = pa_json.read_json(io.BytesIO(text))
            pieces.append(Piece(len(table), at, at + len(text)))
            for name, kind in zip(table.column_names, table.schema.types):
                found = Field("null") if pa.types.is_null(kind) else arrow_field(kind)
                fields[name] = merge(fields.get(name), found, name, file)
    return {name: fields[name] for name in choose(names, list(fields), file)}, pieces


def read_json(file: Place, fields: Mapping[str, Field], rows: int, piece: Piece) -> Iterator[dict[str, Raw]]:
    types = {name: _ARROW.get(field.kind) or _time(field.kind) for name, field in fields.items()}
    schema = pa.schema([(name, kind) for name, kind in types.items() if kind is not None])
    options = pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    table = pa_json.read_json(io.BytesIO(piece_text(file, piece)), parse_options=options)
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
def _svmlight_shape(file: Place, changed: object) -> tuple[int, int, bool, list[Piece]]:
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
