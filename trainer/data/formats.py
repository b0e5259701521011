"""The file formats: of each, what a file holds, and its rows in batches.

`inspect(file, names)` gives the fields of the columns ``names`` (all for None) and the number of rows; `read(file,
fields, rows)` the rows in order, at most ``rows`` a batch. Shapes: B rows of a batch, D features.
"""

import io
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as fs
import pyarrow.ipc as pa_ipc
import pyarrow.parquet as pq

from trainer.data.fields import Field, Raw, arrow_field, choose, numpy_field
from trainer.data.text import inspect_csv, inspect_json, inspect_svmlight, read_csv, read_json, read_svmlight
from trainer.errors import UserError


def _inspect_parquet(file: Path, names: Sequence[str] | None) -> tuple[dict[str, Field], int]:
    with pq.ParquetFile(file) as table:
        schema = table.schema_arrow
        chosen = choose(names, schema.names, file)
        return {name: arrow_field(schema.field(name).type) for name in chosen}, table.metadata.num_rows


def _read_parquet(file: Path, fields: Mapping[str, Field], rows: int) -> Iterator[dict[str, Raw]]:
    with pq.ParquetFile(file) as table:
        for batch in table.iter_batches(rows, columns=list(fields)):
            yield {name: batch.column(name) for name in fields}


def _inspect_ipc(file: Path, names: Sequence[str] | None) -> tuple[dict[str, Field], int]:
    with pa.memory_map(str(file)) as stream, pa_ipc.open_file(stream) as table:
        chosen = choose(names, table.schema.names, file)
        rows = sum(table.get_batch(i).num_rows for i in range(table.num_record_batches))
        return {name: arrow_field(table.schema.field(name).type) for name in chosen}, rows


def _read_ipc(file: Path, fields: Mapping[str, Field], rows: int) -> Iterator[dict[str, Raw]]:
    with pa.memory_map(str(file)) as stream, pa_ipc.open_file(stream) as table:
        for i in range(table.num_record_batches):
            batch = table.get_batch(i)
            for first in range(0, batch.num_rows, rows):
                yield {name: batch.column(name).slice(first, rows) for name in fields}


def _dataset(place: str) -> ds.Dataset:
    """The Parquet files below a folder, or at an address of pyarrow's filesystems."""
    if "://" not in place:
        return ds.dataset(place, format="parquet", partitioning="hive")
    system, path = fs.FileSystem.from_uri(place)
    return ds.dataset(path, filesystem=system, format="parquet", partitioning="hive")


def inspect_folder(place: str, names: Sequence[str] | None) -> tuple[dict[str, Field], int]:
    """Fields and rows of the Parquet files below a folder or an address; partitions are columns."""
    dataset = _dataset(place)
    chosen = choose(names, dataset.schema.names, place)
    return {name: arrow_field(dataset.schema.field(name).type) for name in chosen}, dataset.count_rows()


def read_folder(place: str, names: list[str], rows: int) -> Iterator[dict[str, Raw]]:
    dataset = _dataset(place)
    for part in sorted(dataset.get_fragments(), key=lambda fragment: fragment.path):
        for batch in part.to_batches(dataset.schema, columns=names, batch_size=rows):
            if batch.num_rows:
                yield {name: batch.column(name) for name in names}


def _npz_header(member: io.BufferedIOBase) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of an `.npy` stream, which is left at its first value."""
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    return np.lib.format.read_array_header_2_0(member)


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


Inspect = Callable[[Path, Sequence[str] | None], tuple[dict[str, Field], int]]
Read = Callable[[Path, Mapping[str, Field], int], Iterator[dict[str, Raw]]]
FORMATS: dict[str, tuple[Inspect, Read]] = {
    ".parquet": (_inspect_parquet, _read_parquet),
    ".csv": (inspect_csv, read_csv),
    ".npz": (_inspect_npz, _read_npz),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), (_inspect_ipc, _read_ipc)),
    **dict.fromkeys((".jsonl", ".ndjson"), (inspect_json, read_json)),
    **dict.fromkeys((".svm", ".svmlight", ".libsvm"), (inspect_svmlight, read_svmlight)),
}
