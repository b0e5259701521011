"""A table that is in memory as a source: a dict of arrays, an Arrow table, a pandas or polars data frame."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from trainer.data.fields import Field, Raw, arrow_field, choose, numpy_field
from trainer.errors import UserError

MemoryTable: TypeAlias = Any
"""pandas.DataFrame | polars.DataFrame | pyarrow.Table | Mapping[str, array]"""


class MemorySource:
    """The rows of a table in memory. Raises UserError for what is no table, has no rows or columns of several lengths.

    Arrays are [N, ...], NumPy's or anything that `numpy.asarray` takes (torch tensors on the CPU among them).
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
        self.fields: dict[str, Field] = {
            name: numpy_field(column.dtype, column.shape[1:])
            if isinstance(column, np.ndarray)
            else arrow_field(column.type)
            for name, column in columns.items()
        }

    def batches(self, rows: int, names: Sequence[str] | None = None) -> Iterator[dict[str, Raw]]:
        """The rows in order, at most ``rows`` a batch."""
        for first in range(0, self.num_rows, rows):
            yield {name: _part(self._columns[name], first, rows) for name in names or self.fields}


def _part(column: Any, first: int, rows: int) -> Raw:
    if isinstance(column, np.ndarray):
        return column[first : first + rows]
    return pa.concat_arrays(column.slice(first, rows).chunks)


def _array(name: str, column: Any) -> np.ndarray:
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
