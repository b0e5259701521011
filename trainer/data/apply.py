"""New rows in the columns of a packed table: the same names, stacking, codes and standardising."""

from collections.abc import Iterable, Iterator

import numpy as np

from trainer.data.columns import Recipe
from trainer.data.fields import choose
from trainer.data.index import ROW_ID, Column, Index
from trainer.data.sources import Source
from trainer.errors import UserError


def available(index: Index, source: Source) -> list[str]:
    """The columns of a packed table that can be made of ``source``: those all of whose source columns it has."""
    columns = [column for column in index.columns if column.name != ROW_ID]
    return [column.name for column in columns if set(_recipe(index, column).parts) <= set(source.fields)]


def rows_like(index: Index, source: Source, names: Iterable[str], rows: int) -> Iterator[dict[str, np.ndarray]]:
    """The columns ``names`` of ``source``, at most ``rows`` a batch, as `pack` would have stored them, and "row_id".

    Raises UserError for a missing source column, a missing value, and text that the packed table had not.
    """
    if index.meta.get("group_by"):
        raise UserError("the table was packed with group_by=: pack the new rows so too, and give their shard folder.")
    made = [_recipe(index, index.column(name)) for name in names]
    needed = list(dict.fromkeys(part for recipe in made for part in recipe.parts))
    choose(needed, list(source.fields), source.name)
    shifts = index.meta.get("standardised", {})
    first = 0
    for batch in source.batches(rows, needed):
        count = len(batch[needed[0]]) if needed else 0
        found = {}
        for recipe in made:
            values = np.empty((count, *recipe.shape), recipe.dtype)
            for part, absent in recipe.fill(values, batch, first).items():
                row = first + int(absent.argmax())
                raise UserError(
                    f"column '{part}' has no value in row {row} (counted from 0): fill it in, or drop the row."
                )
            shift = shifts.get(recipe.name)
            if shift is not None:
                values = (values - np.array(shift["mean"])) / np.array(shift["sd"])
            found[recipe.name] = values.astype(index.column(recipe.name).dtype, copy=False)
        yield {**found, ROW_ID: np.arange(first, first + count)}
        first += count


def _recipe(index: Index, column: Column) -> Recipe:
    parts = index.meta.get("columns", {}).get(column.name, column.name)
    stacked = isinstance(parts, list)
    dtype = "float64" if column.name in index.meta.get("standardised", {}) else column.dtype
    return Recipe(column.name, tuple(parts) if stacked else (parts,), stacked, column.shape, dtype, column.vocabulary)
