"""A table that is in memory as a source: a dict of arrays, an Arrow table, a pandas or polars data frame."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from trainer.data.fields import CsrRows, Field, Raw, Rows, VaryingRows, arrow_field, choose, numpy_field
from trainer.errors import UserError

_PIECE_ROWS = 1 << 18
MemoryTable: TypeAlias = Any
"""pandas.DataFrame | polars.DataFrame | pyarrow.Table | Mapping[str, array]"""


class MemorySource:
    """The rows of a table in memory. Raises UserError for what is no table, has no rows or columns of several lengths.

    Arrays are [N, ...], NumPy's or anything that `numpy.asarray` takes (torch tensors on the CPU among them), sparse
    matrices of SciPy [N, width], `CsrRows` or `RaggedRows`.
    """

    name = "the data"

    def __init__(self, table: MemoryTable):
        if isinstance(table, Mapping):
            columns: dict[str, Any] = {str(name): _array(str(name), column) for name, column in table.items()}
        else:
            arrow = _arrow(table)
            choose(None, arrow.column_names, self.name)
            columns = {name: arrow.column(name) for name in arrow.column_names}
        if not columns:
            raise UserError("the data have no columns: give a dict of arrays, a data frame or an Arrow table.")
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{name} {count:,}" for name, count in lengths.items())
            raise UserError(f"the columns of the data differ in length ({shown}): give one value per row in each.")
        self._columns, self.num_rows = columns, next(iter(lengths.values()))
        if not self.num_rows:
            raise UserError("the data have no rows.")
        self.fields: dict[str, Field] = {name: _field(column) for name, column in columns.items()}

    @property
    def piece_rows(self) -> Sequence[int]:
        """Rows of each piece."""
        return [min(_PIECE_ROWS, self.num_rows - first) for first in range(0, self.num_rows, _PIECE_ROWS)]

    def batches(
        self, rows: int, names: Sequence[str] | None = None, piece: int | None = None
    ) -> Iterator[dict[str, Raw]]:
        """The rows (of a piece) in order, at most ``rows`` a batch."""
        start = (piece or 0) * _PIECE_ROWS
        stop = self.num_rows if piece is None else min(start + _PIECE_ROWS, self.num_rows)
        for first in range(start, stop, rows):
            count = min(rows, stop - first)
            yield {name: _part(self._columns[name], first, count) for name in names or self.fields}


def _part(column: Any, first: int, rows: int) -> Raw:
    if not isinstance(column, pa.ChunkedArray):
        return column[first : first + rows]
    return pa.concat_arrays(column.slice(first, rows).chunks)


def _field(column: Any) -> Field:
    if isinstance(column, pa.ChunkedArray):
        return arrow_field(column.type)
    if isinstance(column, np.ndarray):
        return numpy_field(column.dtype, column.shape[1:])
    entries = int(column.offsets[-1])
    if isinstance(column, CsrRows):
        return Field("csr", (column.width,), column.values.dtype.name, entries)
    return Field("ragged", column.values.shape[1:], column.values.dtype.name, entries)


def _sparse(name: str, column: Any) -> CsrRows:
    """The rows of a sparse matrix of SciPy, or of another that has its attributes."""
    column = column.tocsr() if hasattr(column, "tocsr") else column
    if len(column.shape) != 2:
        raise UserError(f"column '{name}' of the data is a sparse array of {len(column.shape)} dimensions: give two.")
    offsets = np.asarray(column.indptr, np.int64)
    indices, values = np.asarray(column.indices), np.asarray(column.data)
    return CsrRows(offsets, indices[: offsets[-1]], values[: offsets[-1]], int(column.shape[1]))


def _array(name: str, column: Any) -> Rows:
    if isinstance(column, VaryingRows):
        return column
    if hasattr(column, "tocsr") or all(hasattr(column, part) for part in ("indptr", "indices", "data", "shape")):
        return _sparse(name, column)
    try:
        array = np.asarray(column)
    except Exception as error:
        raise UserError(f"column '{name}' of the data is no array ({str(error).splitlines()[0]}).") from error
    if not array.ndim:
        raise UserError(f"column '{name}' of the data is a single value: give one value per row.")
    return array.astype(str) if array.dtype.kind == "O" and all(isinstance(each, str) for each in array.flat) else array


def _arrow(table: Any) -> pa.Table:
    """An Arrow table of a data frame; its index is left out."""
    if isinstance(table, pa.Table):
        return table
    module = type(table).__module__.partition(".")[0]
    if module == "pandas" and hasattr(table, "columns"):
        return pa.Table.from_pandas(table, preserve_index=False)
    if hasattr(table, "to_arrow"):
        return table.to_arrow()
    raise UserError(
        f"data of type {type(table).__name__} are no table: give a dict of arrays, a pandas or polars data frame, "
        "an Arrow table, or the path of a shard folder or of a file."
    )
