"""Which column says how many observations a row stands for: one that is asked for, not one that happens to be there.

Asked for is `weight=NAME` (`fit(weight="NAME")`), a column that packing was told to make (`columns.weight=NAME`), and
in a dict of arrays the key "weight", which the model does not take and which has no other use.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from trainer.data.fields import Field
from trainer.data.shards.index import Column, Index
from trainer.errors import UserError
from trainer.inference.model.arguments import arguments
from trainer.inference.model.plates import WEIGHT
from trainer.inference.rows.entries import LENGTH

_MOST = 1000.0  # that a weight is taken for one without a word of the user's


def shown_to_model(asked: str | None, index: Index, model: Callable[..., Any], columns: Iterable[str]) -> list[str]:
    """``columns`` without `weight` where nobody asked for it.

    Raises UserError where ``asked`` is not a column that can be one of weights.
    """
    columns, chosen = list(columns), index.meta.get("columns", {}).get(WEIGHT, WEIGHT) != WEIGHT
    if asked is not None and asked != WEIGHT:
        raise UserError(
            f'weight={asked}: packed data have their weights in a column "{WEIGHT}": pack the table with '
            f"columns.{WEIGHT}={asked}, and give weight={WEIGHT}."
        )
    if asked is not None and WEIGHT not in columns:
        raise UserError(f"weight={asked} is not a column of the data ({', '.join(columns)}).")
    own = WEIGHT in columns and WEIGHT in arguments(model, columns)
    if asked is not None and own:
        raise UserError(f'the model takes the column "{WEIGHT}" itself, so rows count once: leave weight= out.')
    if WEIGHT not in columns or own:
        return columns
    if asked is None and not chosen and not index.meta.get(WEIGHT):
        return [name for name in columns if name != WEIGHT]
    column = index.column(WEIGHT)
    if column.kind != "dense" or column.shape or column.vocabulary is not None:
        raise UserError(f'column "{WEIGHT}" holds {_kind(column)}: a row stands for one number of observations.')
    return columns


def told(index: Index, taken: Iterable[str], counts: bool) -> list[str]:
    """What is said of a column of weights before anything else; ``taken``: the columns that the model takes."""
    found = [column for column in index.columns if column.name == WEIGHT]
    if not found:
        return []
    if counts:
        statistics, rows = found[0].statistics, index.num_rows
        total = f": {rows:,} rows stand for {round(statistics['mean'] * rows):,} observations" if statistics else ""
        return [f'rows count by the column "{WEIGHT}"{total}']
    return [] if WEIGHT in taken else [unused(f"weight={WEIGHT}")]


def unused(remedy: str) -> str:
    """That a column of the name counts nothing."""
    return f'the column "{WEIGHT}" is not used, and each row counts once ({remedy} has rows count that many times)'


def packed_for(
    data: Any, fields: Mapping[str, Field], taken: set[str], weight: str | None, say: Callable[[str], None]
) -> dict[str, str]:
    """The columns {packed: source} of a table for a model that takes ``taken``; ``weight``: the column asked for.

    Beside columns of several entries a row goes the one that may be their number.
    """
    made = {name: name for name in fields if name in taken}
    if fields.get(LENGTH) == Field("int") and any(fields[name].shape for name in made):
        made[LENGTH] = LENGTH
    if weight is not None:
        if weight not in fields:
            raise UserError(f"weight={weight} is not a column of the data ({', '.join(fields)}).")
        if WEIGHT in made:
            raise UserError(f'the model takes the column "{WEIGHT}" itself, so rows count once: leave weight= out.')
        return {**made, WEIGHT: weight}
    if WEIGHT in fields and WEIGHT not in taken:
        if isinstance(data, Mapping):
            _refuse_beyond(np.asarray(data[WEIGHT]))
            return {**made, WEIGHT: WEIGHT}
        say(unused(f'weight="{WEIGHT}"'))
    return made


def _refuse_beyond(values: np.ndarray) -> None:
    """Raises UserError for numbers that are hardly meant as counts."""
    if values.ndim == 1 and values.dtype.kind in "iuf" and (values > _MOST).any():
        row = int((values > _MOST).argmax())
        raise UserError(
            f'the column "{WEIGHT}" would have row {row} count {values[row]:,g} times: give weight="{WEIGHT}" where '
            "that is meant, else leave the column out."
        )


def _kind(column: Column) -> str:
    return "categories" if column.vocabulary is not None and column.kind == "dense" else "several numbers a row"
