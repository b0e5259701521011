"""A table that is in memory as a source: a dict of arrays, an Arrow table, a pandas or polars data frame."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from trainer.data.fields import TWICE, CsrRows, Field, Raw, Rows, VaryingRows, arrow_field, numpy_field, object_field
from trainer.errors import UserError, first_line

_PIECE_ROWS = 1 << 18
MemoryTable: TypeAlias = Any
"""pandas.DataFrame | polars.DataFrame | pyarrow.Table | Mapping[str, array]"""


class MemorySource:
    """The rows of a table in memory. Raises UserError for what is no table, has no rows or columns of several lengths.

    Arrays are [N, ...], NumPy's (what is masked is missing) or anything that `numpy.asarray` takes (torch tensors on
    the CPU among them), columns of Arrow, pandas and polars, sparse matrices of SciPy [N, width], `CsrRows` or
    `RaggedRows`.
    """

    name = "the data"

    def __init__(self, table: MemoryTable):
        named = [(str(name), _column(str(name), column)) for name, column in _named(table)]
        columns = dict(named)
        if not columns:
            raise UserError("the data have no columns: give a dict of arrays, a data frame or an Arrow table.")
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{name} {count:,}" for name, count in lengths.items())
            raise UserError(f"the columns of the data differ in length ({shown}): give one value per row in each.")
        self._columns, self.num_rows = columns, next(iter(lengths.values()))
        if not self.num_rows:
            raise UserError("the data have no rows.")
        times = Counter(name for name, _ in named)
        self.fields: dict[str, Field] = {
            name: Field(TWICE) if times[name] > 1 else _field(column) for name, column in columns.items()
        }

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
        whole = column.dtype.kind == "O" and column.ndim == 1
        return object_field(column.tolist()) if whole else numpy_field(column.dtype, column.shape[1:])
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


def _named(table: MemoryTable) -> Iterable[tuple[str, Any]]:
    """The columns of a table with their names, of which two may be one; the index of a data frame is left out."""
    if isinstance(table, Mapping):
        return table.items()
    if isinstance(table, pa.Table):
        return zip(table.column_names, table.columns)
    if _of_pandas(table) and hasattr(table, "columns"):
        return ((name, table.iloc[:, i]) for i, name in enumerate(table.columns))
    if hasattr(table, "to_arrow") and hasattr(table, "get_columns"):
        return ((column.name, column) for column in table.get_columns())
    if hasattr(table, "to_arrow"):
        return _named(table.to_arrow())
    raise UserError(
        f"data of type {type(table).__name__} are no table: give a dict of arrays, a pandas or polars data frame, "
        "an Arrow table, or the path of a shard folder or of a file."
    )


def _of_pandas(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "pandas"


def _column(name: str, column: Any) -> Rows | pa.ChunkedArray:
    """``column`` with its missing values; an array of objects where they are no numbers, truth values or text."""
    if isinstance(column, VaryingRows | pa.ChunkedArray):
        return column
    if isinstance(column, np.ma.MaskedArray):
        return _masked(column) if np.ma.is_masked(column) else column.data
    if isinstance(column, pa.Array):
        return pa.chunked_array([column])
    if _of_pandas(column) or hasattr(column, "to_arrow"):
        column = _with_plain_categories(column)
        try:
            found = column.to_arrow() if hasattr(column, "to_arrow") else pa.array(column, from_pandas=True)
            return found if isinstance(found, pa.ChunkedArray) else pa.chunked_array([found])
        except (pa.ArrowException, NotImplementedError, OverflowError):
            return np.asarray(column)
    if hasattr(column, "tocsr") or all(hasattr(column, part) for part in ("indptr", "indices", "data", "shape")):
        return _sparse(name, column)
    return _array(name, column)


def _array(name: str, column: Any) -> np.ndarray | pa.ChunkedArray:
    """What NumPy makes of it, with its missing values."""
    try:
        array = np.asarray(column)
    except Exception as error:
        lists = isinstance(column, Sequence) and all(isinstance(each, Sequence | np.ndarray) for each in column)
        remedy = (
            "; give each entry of a list a row of its own, beside a column that says whose it is, and pack with "
            "group_by= that column"
        )
        told = f"column '{name}' of the data is no array ({first_line(error).rstrip('.')}){remedy if lists else ''}."
        raise UserError(told) from error
    if not array.ndim:
        raise UserError(f"column '{name}' of the data is a single value: give one value per row.")
    if array.dtype.kind != "O" or array.ndim > 1:
        return array
    try:
        return pa.chunked_array([pa.array(array, from_pandas=True)])
    except (pa.ArrowException, NotImplementedError, OverflowError):
        return array


def _with_plain_categories(column: Any) -> Any:
    """``column``, where it is one of pandas' categories that are neither text nor numbers, with their text for them."""
    categorical = getattr(column, "cat", column)
    categories = getattr(categorical, "categories", None)
    plain = ("string", "integer", "floating", "empty")
    if categories is None or not _of_pandas(categories) or categories.inferred_type in plain:
        return column
    return categorical.rename_categories(list(map(str, categories)))


def _masked(column: np.ma.MaskedArray) -> pa.ChunkedArray:
    """A masked array [N, ...], with a null where it is masked."""
    values, mask = np.ascontiguousarray(column.data), np.ma.getmaskarray(column)
    array = pa.array(values.ravel(), mask=mask.ravel())
    for size in reversed(column.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return pa.chunked_array([array])
