"""Sources: tables read in rows, in order, as often as asked: files, alone or by a glob, folders, and addresses.

A source hands out its columns as they are stored, pyarrow arrays or numpy arrays; `columns` turns them into what the
shards hold. Shapes: B rows of a batch.
"""

import contextlib
import glob
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from trainer.data.fields import Field, Raw, merge
from trainer.data.formats import FORMATS, Read, inspect_folder, read_folder
from trainer.data.index import INDEX_NAME
from trainer.errors import UserError


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
    read: Read

    def batches(self, rows: int, names: Sequence[str] | None = None) -> Iterator[dict[str, Raw]]:
        fields = {name: self.fields[name] for name in (self.fields if names is None else names)}
        for file in self.files:
            with _reading(file):
                yield from self.read(file, fields, rows)


@dataclass(frozen=True)
class FolderSource:
    """The Parquet files below a folder or an address, by their paths; made by `open_source`."""

    name: str
    fields: Mapping[str, Field]
    num_rows: int

    def batches(self, rows: int, names: Sequence[str] | None = None) -> Iterator[dict[str, Raw]]:
        with _reading(self.name):
            yield from read_folder(self.name, list(self.fields if names is None else names), rows)


def open_source(pattern: str | Path, names: Iterable[str] | None = None) -> FileSource | FolderSource:
    """The table in the file ``pattern``, or in every file that the glob ``pattern`` matches, sorted by path.

    A folder is one table of the Parquet files in it, whose partitions ("year=2020/") are columns; so is an address that
    pyarrow's filesystems reach ("s3://bucket/table"). ``names`` limits it to these columns (all when None). Raises
    UserError for no file, an unknown format (`FORMATS` has the others), an unknown column (with close names), files
    whose columns differ, an unreadable file. Text formats are read through once here: their types come from all rows,
    not from the first ones.
    """
    names = None if names is None else tuple(dict.fromkeys(names))
    if "://" in str(pattern) or Path(pattern).is_dir():
        return _open_folder(str(pattern), names)
    files = _files(str(pattern))
    inspect, read = FORMATS[files[0].suffix.lower()]
    fields: dict[str, Field] = {}
    num_rows = 0
    for file in files:
        with _reading(file):
            found, count = inspect(file, names)
        if fields and found.keys() != fields.keys():
            differ = ", ".join(sorted(found.keys() ^ fields.keys()))
            raise UserError(f"'{file}' and '{files[0]}' differ in the columns {differ}: name the columns they share.")
        fields = {name: merge(fields.get(name), field, name, file) for name, field in found.items()}
        num_rows += count
    if not num_rows:
        raise UserError(f"'{pattern}' has no rows: check that it is the file you meant.")
    return FileSource(str(pattern), files, fields, num_rows, read)


def _open_folder(place: str, names: Sequence[str] | None) -> FolderSource:
    if any((Path(place) / part / INDEX_NAME).is_file() for part in ("", "train")):
        raise UserError(f"'{place}' is a shard folder, which is packed already: train on it.")
    with _reading(place):
        fields, num_rows = inspect_folder(place, names)
    if not num_rows:
        raise UserError(f"'{place}' has no rows in Parquet files: check that it is the folder you meant.")
    return FolderSource(place, fields, num_rows)


def _files(pattern: str) -> tuple[Path, ...]:
    matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
    files = tuple(Path(match) for match in matches if Path(match).is_file())
    known = ", ".join(FORMATS)
    if not files:
        raise UserError(f"no file at '{pattern}': give the path of a {known} file, or a glob that matches some.")
    for file in files:
        if file.suffix.lower() not in FORMATS:
            raise UserError(f"'{file}' is of no known format: give one of {known}.")
        if file.suffix.lower() != files[0].suffix.lower():
            raise UserError(f"'{files[0]}' and '{file}' are of two formats: give files of one.")
    return files


@contextlib.contextmanager
def _reading(file: Path | str) -> Iterator[None]:
    """Turns what a library says about a broken file into a UserError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(f"cannot read '{file}': {reason}.") from error
