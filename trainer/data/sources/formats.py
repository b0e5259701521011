"""The file formats: of each, what a file holds, and its rows in batches.

`inspect(file, names)` gives the fields of the columns ``names`` (all for None) and the pieces of which the file is
made, in order; `read(file, fields, rows, piece)` the rows of one in order, at most ``rows`` a batch. A file is a path
or an address. Shapes: B rows of a batch, D features.
"""

import io
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.ipc as pa_ipc
import pyarrow.parquet as pq

from trainer.data.address import Place, filesystem, is_address
from trainer.data.fields import Field, Piece, Raw, choose, numpy_field, pieces_of, schema_fields
from trainer.data.sources.bag_of_words import inspect_docword, inspect_ldac, read_docword, read_ldac
from trainer.data.sources.csv_text import inspect_csv, join_csv, read_csv
from trainer.data.sources.h5ad import inspect_h5ad, read_h5ad
from trainer.data.sources.json_lines import inspect_json, join_json, read_json
from trainer.data.sources.place import opened
from trainer.data.sources.svmlight import inspect_svmlight, read_svmlight
from trainer.errors import UserError

if TYPE_CHECKING:
    import pyarrow.dataset as ds

_PIECE_ROWS = 1 << 18


def _parquet(file: Place) -> pq.ParquetFile:
    return pq.ParquetFile(opened(file) if is_address(file) else file, pre_buffer=is_address(file))


def _inspect_parquet(file: Place, names: Sequence[str] | None) -> tuple[dict[str, Field], list[Piece]]:
    with _parquet(file) as table:
        schema, about = table.schema_arrow, table.metadata
        chosen = choose(names, schema.names, file)
        counts = (about.row_group(i).num_rows for i in range(about.num_row_groups))
        return schema_fields(schema, chosen), pieces_of(counts)


def _read_parquet(file: Place, fields: Mapping[str, Field], rows: int, piece: Piece) -> Iterator[dict[str, Raw]]:
    with _parquet(file) as table:
        for batch in table.iter_batches(rows, range(piece.at, piece.stop), columns=list(fields)):
            yield {name: batch.column(name) for name in fields}


def _ipc(file: Place) -> pa.NativeFile:
    return pa.PythonFile(opened(file)) if is_address(file) else pa.memory_map(str(file))


def _inspect_ipc(file: Place, names: Sequence[str] | None) -> tuple[dict[str, Field], list[Piece]]:
    with _ipc(file) as stream, pa_ipc.open_file(stream) as table:
        chosen = choose(names, table.schema.names, file)
        pieces = pieces_of(table.get_batch(i).num_rows for i in range(table.num_record_batches))
        return schema_fields(table.schema, chosen), pieces


def _read_ipc(file: Place, fields: Mapping[str, Field], rows: int, piece: Piece) -> Iterator[dict[str, Raw]]:
    with _ipc(file) as stream, pa_ipc.open_file(stream) as table:
        for i in range(piece.at, piece.stop):
            batch = table.get_batch(i)
            for first in range(0, batch.num_rows, rows):
                yield {name: batch.column(name).slice(first, rows) for name in fields}


def open_dataset(place: str) -> "ds.Dataset":
    """The Parquet files below a folder, or at an address of pyarrow's file systems or of fsspec's; partitions are
    columns.
    """
    import pyarrow.dataset as ds  # loads pandas
    import pyarrow.fs as fs

    if not is_address(place):
        return ds.dataset(place, format="parquet", partitioning="hive")
    try:
        system, path = fs.FileSystem.from_uri(place)
    except pa.ArrowInvalid:
        system, path = filesystem(place)
    return ds.dataset(path, filesystem=system, format="parquet", partitioning="hive")


def _npz_header(member: io.BufferedIOBase) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of an `.npy` stream, which is left at its first value."""
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    return np.lib.format.read_array_header_2_0(member)


def _inspect_npz(file: Place, names: Sequence[str] | None) -> tuple[dict[str, Field], list[Piece]]:
    fields: dict[str, Field] = {}
    rows: dict[str, int] = {}
    seekable = True
    with opened(file) as stream, zipfile.ZipFile(stream) as archive:
        for name in choose(names, [member.removesuffix(".npy") for member in archive.namelist()], file):
            with archive.open(name + ".npy") as member:
                shape, fortran, dtype = _npz_header(member)  # type: ignore[arg-type]
            if not shape:
                raise UserError(
                    f"array '{name}' of '{file}' is a single number, not a column: name the columns to use."
                )
            fields[name], rows[name] = numpy_field(dtype, shape[1:]), shape[0]
            stored = archive.getinfo(name + ".npy").compress_type == zipfile.ZIP_STORED
            seekable = seekable and stored and not (fortran and len(shape) > 1)
    if len(set(rows.values())) > 1:
        lengths = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise UserError(f"the arrays of '{file}' differ in length ({lengths}): name the columns that belong together.")
    total = next(iter(rows.values()), 0)
    starts = range(0, total, _PIECE_ROWS if seekable else max(total, 1))
    return fields, [Piece(min(starts.step, total - first), first, min(first + starts.step, total)) for first in starts]


def _read_npz(file: Place, fields: Mapping[str, Field], rows: int, piece: Piece) -> Iterator[dict[str, Raw]]:
    streams = [_npz_rows(file, name, rows, piece) for name in fields]
    for arrays in zip(*streams):
        yield dict(zip(fields, arrays))


def _npz_rows(file: Place, name: str, rows: int, piece: Piece) -> Iterator[np.ndarray]:
    """The array ``name`` in batches of ``rows`` rows, never held whole unless it is stored in Fortran order."""
    with opened(file) as stream, zipfile.ZipFile(stream) as archive, archive.open(name + ".npy") as member:
        shape, fortran, dtype = _npz_header(member)  # type: ignore[arg-type]
        if dtype.hasobject:
            raise ValueError(f"array '{name}' holds Python objects")
        row_shape, row_bytes = shape[1:], dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        whole = None
        if fortran and row_shape:
            whole = np.frombuffer(member.read(), dtype).reshape(shape, order="F")
        elif piece.at:
            member.seek(piece.at * row_bytes, io.SEEK_CUR)
        for first in range(piece.at, piece.stop, rows):
            count = min(rows, piece.stop - first)
            if whole is not None:
                yield whole[first : first + count]
            else:
                yield np.frombuffer(member.read(count * row_bytes), dtype).reshape(count, *row_shape)


Inspect = Callable[[Place, Sequence[str] | None], tuple[dict[str, Field], list[Piece]]]
Read = Callable[[Place, Mapping[str, Field], int, Piece], Iterator[dict[str, Raw]]]
FORMATS: dict[str, tuple[Inspect, Read]] = {
    ".parquet": (_inspect_parquet, _read_parquet),
    ".csv": (inspect_csv, read_csv),
    ".npz": (_inspect_npz, _read_npz),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), (_inspect_ipc, _read_ipc)),
    **dict.fromkeys((".jsonl", ".ndjson"), (inspect_json, read_json)),
    ".txt": (inspect_docword, read_docword),
    ".h5ad": (inspect_h5ad, read_h5ad),
    **dict.fromkeys((".ldac", ".dat"), (inspect_ldac, read_ldac)),
    **dict.fromkeys((".svm", ".svmlight", ".libsvm"), (inspect_svmlight, read_svmlight)),
}
Join = Callable[[Field | None, Field, str, Place], Field]
JOINS: dict[str, Join] = {".csv": join_csv, **dict.fromkeys((".jsonl", ".ndjson"), join_json)}
"""The field of a column of several files, where it is not `merge`'s."""
