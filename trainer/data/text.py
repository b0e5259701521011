"""The text formats: CSV, JSON lines and SVMLight, read in pieces of whole lines; types are those of all rows.

As in `trainer.data.formats`. Shapes: B rows of a piece, D features.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json

from trainer.data.fields import Field, Raw, arrow_field, choose, merge
from trainer.errors import UserError

_PIECE = 1 << 24  # bytes that are read at a time, then to the end of the line
_ARROW = {"float": pa.float64(), "int": pa.int64(), "bool": pa.bool_(), "text": pa.string()}
_MOST_FEATURES = 10_000  # SVMLight rows are packed dense


def _pieces(stream: IO[bytes]) -> Iterator[bytes]:
    """The rest of a file in pieces of whole lines, none of them blank."""
    while piece := stream.read(_PIECE):
        piece += stream.readline()
        if piece.strip():
            yield piece


def _csv_tables(file: Path, names: Sequence[str] | None, types: dict[str, pa.DataType]) -> Iterator[pa.Table]:
    """The file in pieces of whole lines, the first with no rows; types that are not given are those of the piece."""
    with open(file, "rb") as stream:
        header = pa_csv.read_csv(io.BytesIO(stream.readline()))
        chosen = choose(names, header.column_names, file)
        yield header.select(chosen)
        reading = pa_csv.ReadOptions(column_names=header.column_names)
        converting = pa_csv.ConvertOptions(
            include_columns=chosen, column_types=types, strings_can_be_null=True, quoted_strings_can_be_null=False
        )
        for piece in _pieces(stream):
            yield pa_csv.read_csv(io.BytesIO(piece), read_options=reading, convert_options=converting)


def inspect_csv(file: Path, names: Sequence[str] | None) -> tuple[dict[str, Field], int]:
    """Types over all rows: a column of integers with a fraction somewhere is float, with a word somewhere text."""
    fields: dict[str, Field] = {}
    rows = 0
    for table in _csv_tables(file, names, {}):
        rows += len(table)
        for name, kind in zip(table.column_names, table.schema.types):
            found = arrow_field(kind)
            try:
                fields[name] = merge(fields.get(name), found, name, file)
            except UserError:
                fields[name] = Field("text")
    return fields, rows


def read_csv(file: Path, fields: Mapping[str, Field], rows: int) -> Iterator[dict[str, Raw]]:
    types = {name: _ARROW[field.kind] for name, field in fields.items() if field.kind in _ARROW}
    for table in _csv_tables(file, list(fields), types):
        for batch in table.combine_chunks().to_batches(max_chunksize=rows):
            yield {name: batch.column(name) for name in fields}


def inspect_json(file: Path, names: Sequence[str] | None) -> tuple[dict[str, Field], int]:
    """One object a line; a key that a line lacks is a missing value."""
    fields: dict[str, Field] = {}
    rows = 0
    with file.open("rb") as stream:
        for piece in _pieces(stream):
            table = pa_json.read_json(io.BytesIO(piece))
            rows += len(table)
            for name, kind in zip(table.column_names, table.schema.types):
                found = Field("null") if pa.types.is_null(kind) else arrow_field(kind)
                fields[name] = merge(fields.get(name), found, name, file)
    return {name: fields[name] for name in choose(names, list(fields), file)}, rows


def read_json(file: Path, fields: Mapping[str, Field], rows: int) -> Iterator[dict[str, Raw]]:
    schema = pa.schema([(name, _ARROW[field.kind]) for name, field in fields.items() if field.kind in _ARROW])
    options = pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    with file.open("rb") as stream:
        for piece in _pieces(stream):
            table = pa_json.read_json(io.BytesIO(piece), parse_options=options)
            for batch in table.combine_chunks().to_batches(max_chunksize=rows):
                yield {name: batch.column(name) for name in schema.names}


def inspect_svmlight(file: Path, names: Sequence[str] | None) -> tuple[dict[str, Field], int]:
    """Lines of "y index:value ...", as columns y and x [D], zero where a line names no value."""
    features, _, whole, rows = _svmlight_shape(file, file.stat().st_mtime_ns)
    fields = {"y": Field("int" if whole else "float"), "x": Field("float", (features,))}
    return {name: fields[name] for name in choose(names, list(fields), file)}, rows


def read_svmlight(file: Path, fields: Mapping[str, Field], rows: int) -> Iterator[dict[str, Raw]]:
    features, base, whole, _ = _svmlight_shape(file, file.stat().st_mtime_ns)
    for labels, counts, index, value in _svmlight_pieces(file):
        for first in range(0, len(labels), rows):
            here = slice(first, first + rows)
            start, stop = counts[:first].sum(), counts[: first + rows].sum()
            x = np.zeros((len(labels[here]), features))
            x[np.arange(len(x)).repeat(counts[here]), index[start:stop] - base] = value[start:stop]
            columns: dict[str, Raw] = {"y": labels[here].astype(np.int64) if whole else labels[here], "x": x}
            yield {name: columns[name] for name in fields}


@lru_cache(maxsize=64)
def _svmlight_shape(file: Path, changed: int) -> tuple[int, int, bool, int]:
    """D, the lowest index (1, or 0 where one is used), whether the labels are whole numbers, and the rows."""
    rows, highest, base, whole = 0, 0, 1, True
    for labels, _, index, _ in _svmlight_pieces(file):
        rows, whole = rows + len(labels), whole and bool((labels % 1 == 0).all())
        if len(index):
            highest, base = max(highest, int(index.max())), min(base, int(index.min()))
    features = highest + 1 - base
    if base < 0 or features > _MOST_FEATURES:
        raise UserError(
            f"'{file}' has features numbered from {base} to {highest}: from 0 or 1 on, at most {_MOST_FEATURES:,} can "
            "be packed, as dense columns."
        )
    return features, base, whole, rows


def _svmlight_pieces(file: Path) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Of each piece: labels [B], values a row [B], their indexes and the values [all of them]."""
    with file.open("rb") as stream:
        for piece in _pieces(stream):
            lines = [line for each in piece.split(b"\n") if (line := each.partition(b"#")[0].strip())]
            counts = np.array([line.count(b":") for line in lines], dtype=np.int64)
            numbers = np.array(b" ".join(lines).replace(b":", b" ").split(), dtype=np.float64)
            if len(numbers) != len(lines) + 2 * counts.sum():
                raise ValueError("a line is not 'label index:value ...'")
            starts = np.cumsum(1 + 2 * counts) - (1 + 2 * counts)
            pairs = np.delete(numbers, starts).reshape(-1, 2)
            yield numbers[starts], counts, pairs[:, 0].astype(np.int64), pairs[:, 1]
