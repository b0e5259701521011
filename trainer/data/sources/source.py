"""Sources: tables read in rows, in order, as often as asked: files, alone or by a glob, folders, and addresses.

A source hands out its columns as they are stored, pyarrow arrays or numpy arrays; `columns` turns them into what the
shards hold. Shapes: B rows of a batch.
"""

import contextlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

from trainer.data.address import Place, is_address
from trainer.data.fields import Field, Piece, Raw, choose, merge, pieces_of, schema_fields
from trainer.data.shards.index import INDEX_NAME
from trainer.data.sources.csv_text import join_csv, settle_csv
from trainer.data.sources.formats import FORMATS, JOINS, Read, open_dataset
from trainer.data.sources.place import files_at, suffix
from trainer.errors import UserError, first_line

if TYPE_CHECKING:
    import pyarrow.dataset as ds


class Source(Protocol):
    """A table: ``name`` for messages, ``num_rows``, ``fields`` by column, and ``batches`` in the order of the rows."""

    @property
    def name(self) -> str: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def fields(self) -> Mapping[str, Field]: ...

    @property
    def piece_rows(self) -> Sequence[int]:
        """The rows of each piece, in order; pieces can be read by themselves, several at the same time."""
        ...

    def batches(
        self, rows: int, names: Sequence[str] | None = None, piece: int | None = None
    ) -> Iterator[dict[str, Raw]]:
        """Every row once (of one ``piece``), in order, at most ``rows`` a batch: ``names`` (all when None) [B, ...]."""
        ...


@dataclass(frozen=True)
class FileSource:
    """The rows of ``files``, one after another; made by `open_source`. ``pieces``: of files, by their numbers."""

    name: str
    files: tuple[Place, ...]
    fields: Mapping[str, Field]
    pieces: Sequence[tuple[int, Piece]]
    read: Read

    @property
    def num_rows(self) -> int:
        return sum(self.piece_rows)

    @property
    def piece_rows(self) -> Sequence[int]:
        return [piece.rows for _, piece in self.pieces]

    def batches(
        self, rows: int, names: Sequence[str] | None = None, piece: int | None = None
    ) -> Iterator[dict[str, Raw]]:
        fields = {name: self.fields[name] for name in (self.fields if names is None else names)}
        for number, part in self.pieces if piece is None else [self.pieces[piece]]:
            with _reading(self.files[number]):
                yield from self.read(self.files[number], fields, rows, part)


@dataclass(frozen=True)
class FolderSource:
    """The Parquet files below a folder or an address, by their paths; made by `open_source`."""

    name: str
    fields: Mapping[str, Field]
    num_rows: int
    dataset: "ds.Dataset"

    @property
    def piece_rows(self) -> Sequence[int]:
        return [rows for _, rows in self._pieces]

    def batches(
        self, rows: int, names: Sequence[str] | None = None, piece: int | None = None
    ) -> Iterator[dict[str, Raw]]:
        chosen = list(self.fields if names is None else names)
        with _reading(self.name):
            for part, _ in self._pieces if piece is None else [self._pieces[piece]]:
                for batch in part.to_batches(self.dataset.schema, columns=chosen, batch_size=rows):
                    if batch.num_rows:
                        yield {name: batch.column(name) for name in chosen}

    @cached_property
    def _pieces(self) -> "list[tuple[ds.ParquetFileFragment, int]]":
        made = []
        with _reading(self.name):
            for part in sorted(self.dataset.get_fragments(), key=lambda fragment: fragment.path):
                for piece in pieces_of(group.num_rows for group in part.row_groups):
                    made.append((part.subset(row_group_ids=list(range(piece.at, piece.stop))), piece.rows))
        return made


def open_source(pattern: str | Path, names: Iterable[str] | None = None) -> FileSource | FolderSource:
    """The table in the file ``pattern``, or in every file that the glob ``pattern`` matches, sorted by path.

    Files may be at addresses ("s3://bucket/t.parquet", "https://host/t.csv"). A folder, here or at an address without
    the suffix of a file, is one table of its Parquet files, whose partitions ("year=2020/") are columns. ``names``
    limits it to these columns (all when None). Raises UserError for no file, an unknown format (`FORMATS` has the
    others), an unknown column (with close names), files whose columns differ, an unreadable file. Text formats are read
    through once here: their types come from all rows, not from the first ones.
    """
    names = None if names is None else tuple(dict.fromkeys(names))
    if (is_address(pattern) and suffix(pattern) not in FORMATS) or Path(pattern).is_dir():
        return _open_folder(str(pattern), names)
    files = _files(str(pattern))
    inspect, read = FORMATS[suffix(files[0])]
    join = JOINS.get(suffix(files[0]), merge)
    fields: dict[str, Field] = {}
    pieces: list[tuple[int, Piece]] = []
    for number, file in enumerate(files):
        with _reading(file):
            found, parts = inspect(file, names)
        if fields and found.keys() != fields.keys():
            differ = ", ".join(sorted(found.keys() ^ fields.keys()))
            raise UserError(f"'{file}' and '{files[0]}' differ in the columns {differ}: name the columns they share.")
        fields = {name: join(fields.get(name), field, name, file) for name, field in found.items()}
        pieces += [(number, part) for part in parts]
    if not pieces:
        raise UserError(f"'{pattern}' has no rows: check that it is the file you meant.")
    if join is join_csv:
        with _reading(pattern):
            fields = settle_csv(files, fields, pieces)
    return FileSource(str(pattern), files, fields, pieces, read)


def _open_folder(place: str, names: Sequence[str] | None) -> FolderSource:
    if any((Path(place) / part / INDEX_NAME).is_file() for part in ("", "train")):
        raise UserError(f"'{place}' is a shard folder, which is packed already: train on it.")
    with _reading(place):
        dataset = open_dataset(place)
        chosen = choose(names, dataset.schema.names, place)
        fields = schema_fields(dataset.schema, chosen)
        num_rows = dataset.count_rows()
    if not num_rows:
        raise UserError(f"'{place}' has no rows in Parquet files: check that it is the folder you meant.")
    return FolderSource(place, fields, num_rows, dataset)


def _files(pattern: str) -> tuple[Place, ...]:
    with _reading(pattern):
        files = files_at(pattern)
    known = ", ".join(FORMATS)
    if not files:
        raise UserError(f"no file at '{pattern}': give the path of a {known} file, or a glob that matches some.")
    for file in files:
        if suffix(file) not in FORMATS:
            raise UserError(f"'{file}' is of no known format: save it as Parquet or CSV, or give one of {known}.")
        if suffix(file) != suffix(files[0]):
            raise UserError(f"'{files[0]}' and '{file}' are of two formats: give files of one.")
    return files


@contextlib.contextmanager
def _reading(file: Place) -> Iterator[None]:
    """Turns what a library says about a broken file into a UserError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = first_line(error).rstrip(".")
        if isinstance(error, UnicodeDecodeError) or "invalid UTF8" in reason:
            reason = "its text is not UTF-8: save it as UTF-8"
        raise UserError(f"cannot read '{file}': {reason}.") from error
