"""New rows in the columns of a packed table: the same names, stacking, codes and standardising."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from trainer.data.fields import NUMERIC, CsrRows, Rows, choose
from trainer.data.packing.columns import Recipe, vocabularies
from trainer.data.shards.index import ROW_ID, Column, Index
from trainer.data.sources.source import Source
from trainer.errors import UserError


def available(index: Index, source: Source) -> list[str]:
    """The columns of a packed table that can be made of ``source``: those all of whose source columns it has."""
    columns = [column for column in index.columns if column.name != ROW_ID]
    return [column.name for column in columns if set(_recipe(index, column).parts) <= set(source.fields)]


def rows_like(index: Index, source: Source, names: Iterable[str], rows: int) -> Iterator[dict[str, Any]]:
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
        found: dict[str, Any] = {}
        for recipe in made:
            if recipe.is_dense:
                values: Any = np.empty((count, *recipe.shape), recipe.dtype)
                absences = recipe.fill(values, batch, first)
            else:
                values, absences = recipe.varying(batch, first)
                _check_width(recipe, values)
            for part, absent in absences.items():
                row = first + int(absent.argmax())
                raise UserError(
                    f"column '{part}' has no value in row {row} (counted from 0): fill it in, or drop the row."
                )
            shift = shifts.get(recipe.name)
            if not isinstance(values, np.ndarray):
                found[recipe.name] = values
                continue
            if shift is not None:
                values = (values - np.array(shift["mean"])) / np.array(shift["sd"])
            found[recipe.name] = values.astype(index.column(recipe.name).dtype, copy=False)
        yield {**found, ROW_ID: np.arange(first, first + count)}
        first += count


def recipes_like(index: Index, source: Source) -> list[Recipe]:
    """How ``source`` becomes the columns of a packed table; words that are new get the codes after the known ones.

    Raises UserError for a missing source column, and for one of another kind or shape.
    """
    made = []
    for column in index.columns:
        if column.name == ROW_ID or (column.name == "length" and index.meta.get("group_by")):
            continue
        recipe = _recipe(index, column)
        recipe = replace(recipe, shape=recipe.shape[1:]) if index.meta.get("group_by") else recipe
        choose(recipe.parts, list(source.fields), source.name)
        for part in recipe.parts:
            _check_kind(recipe, part, source)
        made.append(recipe)
    words = vocabularies(source, [each.parts[0] for each in made if each.is_dense and each.vocabulary is not None])
    for i, recipe in enumerate(made):
        if recipe.is_dense and recipe.vocabulary is not None:
            known = set(recipe.vocabulary)
            new = [word for word in words[recipe.parts[0]] if word not in known]
            made[i] = replace(recipe, vocabulary=[*recipe.vocabulary, *new])
    return made


def options_like(index: Index) -> dict[str, Any]:
    """The other options that a table was packed with and that say what its rows are: groups, split and its seed."""
    time, after = index.meta.get("split_time") or (None, None)
    with contextlib.suppress(ValueError):  # a date
        after = after and json.loads(after)
    share = index.meta.get("held_out")
    return {
        "held_out": 0.0 if share is None else share,
        "seed": index.seed,
        "group_by": index.meta.get("group_by"),
        "split_by": index.meta.get("split_by"),
        "split_time": time,
        "split_after": after,
    }


def _check_kind(recipe: Recipe, part: str, source: Source) -> None:
    """Raises UserError where a source column cannot become what a packed one is."""
    field, shape = source.fields[part], () if recipe.stacked else recipe.shape
    if not recipe.is_dense:
        kinds: tuple[str, ...] = (recipe.kind,)
    elif recipe.vocabulary is not None:
        kinds = ("text",)
    else:
        kinds = NUMERIC if recipe.dtype.startswith("float") else ("int", "bool")
    if field.kind not in kinds or field.shape != shape:
        was, now = (f"{kind} of shape {list(s)}" if s else kind for kind, s in ((kinds[0], shape), field[:2]))
        raise UserError(f"column '{part}' of '{source.name}' is {now}, and {was} in the packed table: cast it.")
    if recipe.kind == "csr" and list(field.names) != list(recipe.vocabulary or []):
        raise UserError(
            f"column '{part}' of '{source.name}' names its columns otherwise than the packed table: give them in the "
            "same order, with the same names."
        )
    if not recipe.is_dense and not (recipe.dtype.startswith("float") or np.can_cast(field.dtype, recipe.dtype)):
        raise UserError(
            f"column '{part}' of '{source.name}' holds {field.dtype}, and {recipe.dtype} in the packed table: cast it."
        )


def _recipe(index: Index, column: Column) -> Recipe:
    parts = index.meta.get("columns", {}).get(column.name, column.name)
    stacked = isinstance(parts, list)
    dtype = "float64" if column.name in index.meta.get("standardised", {}) else column.dtype
    names = tuple(parts) if stacked else (parts,)
    return Recipe(column.name, names, stacked, column.shape, dtype, column.vocabulary, column.kind)


def _check_width(recipe: Recipe, rows: Rows) -> None:
    if isinstance(rows, CsrRows) and rows.width != recipe.shape[0]:
        raise UserError(
            f"column '{recipe.parts[0]}' has {rows.width:,} columns where the packed table has {recipe.shape[0]:,}: "
            "give rows of the same ones."
        )
