"""Sources: tables read in rows, in order, as often as asked: Parquet, CSV and `.npz` files, alone or by a glob.

A source hands out its columns as they are stored, pyarrow arrays or numpy arrays; `columns` turns them into what the
shards hold. Shapes: B rows of a batch.
"""

import contextlib
import difflib
import glob
import io
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from trainer.errors import UserError

Raw: TypeAlias = pa.Array | np.ndarray
NUMERIC = ("float", "int", "bool")
_CSV_BYTES = 1 << 24  # one piece of a CSV file, cut at a line's end


class Field(NamedTuple):
    """What a source column holds: "float", "int", "bool", "text" or, when it is none of them, its type in words."""

    kind: str
    shape: tuple[int, ...] = ()  # of one row


class Source(Protocol):
    """A table: ``name`` for messages, ``num_rows``, ``fields`` by column, and ``batches`` in the order of the rows."""

    @property
    def name(self) -> str: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def fields(self) -> Mapping[str, Field]: ...

    def batches(self, rows: int, names: Sequence[str] | None = None) -> Iterator[dict[str, Raw]]:
        """Every row once, in order, at most ``rows`` a batch: the columns ``names`` (all when None), each [B, ...]."""
        ...


@dataclass(frozen=True)
class FileSource:
    """The rows of ``files``, one after another; made by `open_source`."""

    name: str
    files: tuple[Path, ...]
    fields: Mapping[str, Field]
    num_rows: int
    read: "_Read"

    def batches(self, rows: int, names: Sequence[str] | None = None) -> Iterator[dict[str, Raw]]:
        fields = {name: self.fields[name] for name in (self.fields if names is None else names)}
        for file in self.files:
            with _reading(file):
                yield from self.read(file, fields, rows)


def open_source(pattern: str | Path, names: Iterable[str] | None = None) -> FileSource:
    """The table in the file ``pattern``, or in every file that the glob ``pattern`` matches, sorted by path.

    ``names`` limits it to these columns (all when None). Raises UserError for no file, a format that is none of
    .parquet, .csv and .npz, an unknown column (with close names), files whose columns differ, an unreadable file.
    A CSV is read through once here: its types come from all of its rows, not from the first ones.
    """
    files = _files(str(pattern))
    inspect, read = _FORMATS[files[0].suffix.lower()]
    names = None if names is None else tuple(dict.fromkeys(names))
    fields: dict[str, Field] = {}
    num_rows = 0
    for file in files:
        with _reading(file):
            found, count = inspect(file, names)
        if fields and found.keys() != fields.keys():
            differ = ", ".join(sorted(found.keys() ^ fields.keys()))
            raise UserError(f"'{file}' and '{files[0]}' differ in the columns {differ}: name the columns they share.")
        fields = {name: _merge(fields.get(name), field, name, file) for name, field in found.items()}
        num_rows += count
    if not num_rows:
        raise UserError(f"'{pattern}' has no rows: check that it is the file you meant.")
    return FileSource(str(pattern), files, fields, num_rows, read)


def choose(wanted: Iterable[str] | None, available: Sequence[str], where: object) -> list[str]:
    """``wanted`` (all ``available`` when None); raises UserError with close names for one that ``where`` lacks."""
    chosen = list(available if wanted is None else wanted)
    for name in chosen:
        if available.count(name) > 1:
            raise UserError(f"'{where}' has two columns named '{name}': rename one of them.")
        if name not in available:
            close = difflib.get_close_matches(name, available, n=3, cutoff=0.5)
            shown = ", ".join(available[:20]) + (", …" if len(available) > 20 else "")
            hint = f"did you mean {' or '.join(close)}?" if close else f"it has {shown}."
            raise UserError(f"'{where}' has no column '{name}': {hint}")
    return chosen


def _files(pattern: str) -> tuple[Path, ...]:
    matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
    files = tuple(Path(match) for match in matches if Path(match).is_file())
    known = ", ".join(_FORMATS)
    if not files:
        raise UserError(f"no file at '{pattern}': give the path of a {known} file, or a glob that matches some.")
    for file in files:
        if file.suffix.lower() not in _FORMATS:
            raise UserError(f"'{file}' is of no known format: give one of {known}.")
        if file.suffix.lower() != files[0].suffix.lower():
            raise UserError(f"'{files[0]}' and '{file}' are of two formats: give files of one.")
    return files


def _merge(known: Field | None, found: Field, name: str, file: Path) -> Field:
    """The field that holds both: integers and floats are floats; anything else must agree."""
    if known is None or known.kind == "null" or known == found:
        return found
    if found.kind == "null":
        return known
    if known.shape == found.shape and {known.kind, found.kind} == {"int", "float"}:
        return known._replace(kind="float")
    raise UserError(
        f"column '{name}' of '{file}' is {_words(found)}, and {_words(known)} in the files before it: make them one."
    )


def _words(field: Field) -> str:
    return f"{field.kind} of shape {list(field.shape)}" if field.shape else field.kind


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns what a library says about a broken file into a UserError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(f"cannot read '{file}': {reason}.") from error


def arrow_field(kind: pa.DataType) -> Field:
    """The field of an Arrow type."""
    types = pa.types
    if types.is_fixed_size_list(kind):
        inner = arrow_field(kind.value_type)
        return Field(inner.kind, (kind.list_size, *inner.shape)) if inner.kind in NUMERIC else Field(str(kind))
    if types.is_dictionary(kind):
        coded = arrow_field(kind.value_type).kind in ("text", "int")
        return Field("text" if coded else str(kind))
    if types.is_floating(kind) or types.is_decimal(kind):
        return Field("float")
    if types.is_integer(kind):
        return Field("int")
    if types.is_boolean(kind):
        return Field("bool")
    return Field("text" if types.is_string(kind) or types.is_large_string(kind) else str(kind))


def _inspect_parquet(file: Path, names: Sequence[str] | None) -> tuple[dict[str, Field], int]:
    with pq.ParquetFile(file) as table:
        schema = table.schema_arrow
        chosen = choose(names, schema.names, file)
        return {name: arrow_field(schema.field(name).type) for name in chosen}, table.metadata.num_rows


def _read_parquet(file: Path, fields: Mapping[str, Field], rows: int) -> Iterator[dict[str, Raw]]:
    with pq.ParquetFile(file) as table:
        for batch in table.iter_batches(rows, columns=list(fields)):
            yield {name: batch.column(name) for name in fields}


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
        while piece := stream.read(_CSV_BYTES):
            piece += stream.readline()
            if piece.strip():
                yield pa_csv.read_csv(io.BytesIO(piece), read_options=reading, convert_options=converting)


def _inspect_csv(file: Path, names: Sequence[str] | None) -> tuple[dict[str, Field], int]:
    """Types over all rows: a column of integers with a fraction somewhere is float, with a word somewhere text."""
    fields: dict[str, Field] = {}
    rows = 0
    for table in _csv_tables(file, names, {}):
        rows += len(table)
        for name, kind in zip(table.column_names, table.schema.types):
            found = arrow_field(kind)
            try:
                fields[name] = _merge(fields.get(name), found, name, file)
            except UserError:
                fields[name] = Field("text")
    return fields, rows


def _read_csv(file: Path, fields: Mapping[str, Field], rows: int) -> Iterator[dict[str, Raw]]:
    arrow = {"float": pa.float64(), "int": pa.int64(), "bool": pa.bool_(), "text": pa.string()}
    types = {name: arrow[field.kind] for name, field in fields.items() if field.kind in arrow}
    for table in _csv_tables(file, list(fields), types):
        for batch in table.combine_chunks().to_batches(max_chunksize=rows):
            yield {name: batch.column(name) for name in fields}


def _npz_header(member: io.BufferedIOBase) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of an `.npy` stream, which is left at its first value."""
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    return np.lib.format.read_array_header_2_0(member)


_NUMPY_KINDS = {"f": "float", "i": "int", "u": "int", "b": "bool", "U": "text", "S": "text"}


def numpy_field(dtype: np.dtype, shape: tuple[int, ...]) -> Field:
    """The field of rows of ``shape`` and ``dtype``."""
    kind = _NUMPY_KINDS.get(dtype.kind, str(dtype))
    return Field(f"text of shape {list(shape)}" if kind == "text" and shape else kind, shape)


def _inspect_npz(file: Path, names: Sequence[str] | None) -> tuple[dict[str, Field], int]:
    fields: dict[str, Field] = {}
    rows: dict[str, int] = {}
    with zipfile.ZipFile(file) as archive:
        for name in choose(names, [member.removesuffix(".npy") for member in archive.namelist()], file):
            with archive.open(name + ".npy") as member:
                shape, _, dtype = _npz_header(member)  # type: ignore[arg-type]
            if not shape:
                raise UserError(
                    f"array '{name}' of '{file}' is a single number, not a column: name the columns to use."
                )
            fields[name], rows[name] = numpy_field(dtype, shape[1:]), shape[0]
    if len(set(rows.values())) > 1:
        lengths = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise UserError(f"the arrays of '{file}' differ in length ({lengths}): name the columns that belong together.")
    return fields, next(iter(rows.values()), 0)


def _read_npz(file: Path, fields: Mapping[str, Field], rows: int) -> Iterator[dict[str, Raw]]:
    streams = [_npz_rows(file, name, rows) for name in fields]
    for arrays in zip(*streams):
        yield dict(zip(fields, arrays))


def _npz_rows(file: Path, name: str, rows: int) -> Iterator[np.ndarray]:
    """The array ``name`` in pieces of ``rows`` rows, never held whole unless it is stored in Fortran order."""
    with zipfile.ZipFile(file) as archive, archive.open(name + ".npy") as member:
        shape, fortran, dtype = _npz_header(member)  # type: ignore[arg-type]
        if dtype.hasobject:
            raise ValueError(f"array '{name}' holds Python objects")
        row_shape, row_bytes = shape[1:], dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        whole = None
        if fortran and row_shape:
            whole = np.frombuffer(member.read(), dtype).reshape(shape, order="F")
        for first in range(0, shape[0], rows):
            count = min(rows, shape[0] - first)
            if whole is not None:
                yield whole[first : first + count]
            else:
                yield np.frombuffer(member.read(count * row_bytes), dtype).reshape(count, *row_shape)


_Inspect = Callable[[Path, Sequence[str] | None], tuple[dict[str, Field], int]]
_Read = Callable[[Path, Mapping[str, Field], int], Iterator[dict[str, Raw]]]
_FORMATS: dict[str, tuple[_Inspect, _Read]] = {
    ".parquet": (_inspect_parquet, _read_parquet),
    ".csv": (_inspect_csv, _read_csv),
    ".npz": (_inspect_npz, _read_npz),
}
