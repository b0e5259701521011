"""Tables that we write, a piece at a time: Parquet or CSV, there whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from trainer.data.store import atomic_write
from trainer.errors import UserError


class Writer(Protocol):
    def __call__(self, columns: dict[str, np.ndarray]) -> None:
        """Adds rows: arrays [B] or [B, n], the same columns at every call."""
        ...


@contextmanager
def table_writer(path: Path) -> Iterator[Writer]:
    """Writes the table ``path``, whose suffix is .parquet or .csv. Raises UserError for another one."""
    kind = path.suffix.lower()
    if kind not in (".parquet", ".csv"):
        raise UserError(f"{path} is of no known format: end it in .parquet or .csv.")
    if not path.parent.is_dir():
        raise UserError(f"the folder of {path} does not exist: make it first.")
    with atomic_write(path) as file:
        writer: pq.ParquetWriter | pa_csv.CSVWriter | None = None

        def write(columns: dict[str, np.ndarray]) -> None:
            nonlocal writer
            table = pa.table({name: _column(values, kind) for name, values in columns.items()})
            if writer is None:
                writer = (pq.ParquetWriter if kind == ".parquet" else pa_csv.CSVWriter)(file, table.schema)
            writer.write_table(table)

        def close() -> None:
            if writer is not None:
                writer.close()

        try:
            yield write
        except BaseException:
            with suppress(Exception):  # where it is left open, it ends later, in a file that is closed, and says so
                close()
            raise
        close()


def _column(values: np.ndarray, kind: str) -> pa.Array:
    """What is not a number is left blank."""
    if values.ndim == 1:
        return pa.array(values, from_pandas=True)
    if kind == ".csv":
        raise UserError("a CSV file holds one number per row and column: write .parquet for sites of several.")
    flat = values.reshape(len(values), -1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel(), from_pandas=True), flat.shape[1])
