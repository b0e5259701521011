"""Fractions in new rows where whole numbers were packed: a slope takes them, a look-up by them does not."""

from collections.abc import Iterator
from contextlib import contextmanager

from trainer.data.shards.index import Index
from trainer.errors import UserError, first_line
from trainer.inference.model.plates import Batch


@contextmanager
def refusing_fractions(index: Index, batch: Batch) -> Iterator[None]:
    """Raises UserError, with the row and its value, where the model fails on a column of ``batch`` that has a fraction
    and was packed as integers.
    """
    try:
        yield
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        for name, values in batch.columns.items():
            packed = index.column(name)
            if packed.dtype != "int64" or packed.kind != "dense" or not values.is_floating_point():
                continue
            broken = (values != values.floor()).reshape(len(values), -1).any(1)
            if not broken.any():
                continue
            row = int(broken.int().argmax())
            number = row if batch.row_id is None else int(batch.row_id[row])
            raise UserError(
                f"column '{name}' holds {values[row].tolist()} in row {number} (counted from 0), whole numbers were "
                f"packed, and the model cannot take a fraction ({first_line(error)}): give whole numbers."
            ) from error
        raise
