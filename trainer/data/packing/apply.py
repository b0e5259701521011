"""New rows in the columns of a packed table: the same names, stacking, codes and standardizing."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from trainer.data.fields import NUMERIC, VARYING, CsrRows, Rows, choose
from trainer.data.packing.columns import Recipe, check_usable, vocabularies
from trainer.data.shards.index import ROW_ID, Column, Index
from trainer.data.sources.mixed import as_words, first_word
from trainer.data.sources.source import Source
from trainer.errors import UserError


def available(index: Index, source: Source) -> list[str]:
    """The columns of a packed table that can be made of ``source``: those all of whose source columns it has."""
    columns = [column for column in index.columns if column.name != ROW_ID]
    return [column.name for column in columns if set(_recipe(index, column).parts) <= set(source.fields)]


def check_columns(index: Index, source: Source, names: Iterable[str]) -> None:
    """Raises UserError, with close names, for a source column that ``names`` are made of and ``source`` lacks, and for
    a table where rows were packed in groups.
    """
    if index.meta.get("group_by"):
        raise UserError("the table was packed with group_by=: pack the new rows so too, and give their shard folder.")
    for name in names:
        choose(_recipe(index, index.column(name)).parts, list(source.fields), source.name)


def rows_like(index: Index, source: Source, names: Iterable[str], rows: int) -> Iterator[dict[str, Any]]:
    """The columns ``names`` of ``source``, at most ``rows`` a batch, as `pack` would have stored them, and "row_id".

    Where integers were packed, a batch with a fraction comes as float64. Raises UserError for a missing source column,
    one of another kind or shape, a missing value, and text that the packed table had not.
    """
    packed = [_recipe(index, index.column(name)) for name in names]
    needed = list(dict.fromkeys(part for recipe in packed for part in recipe.parts))
    choose(needed, list(source.fields), source.name)
    source = words_like(index, source)
    made = [_carrying(recipe, source) for recipe in packed]
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
            found[recipe.name] = _stored(recipe, values, index.column(recipe.name).dtype, first)
        yield {**found, ROW_ID: np.arange(first, first + count)}
        first += count


def words_like(index: Index, source: Source) -> Source:
    """``source``, its columns that are text in a packed table as text, also where a CSV file holds digits alone."""
    coded = [_recipe(index, each).parts[0] for each in index.columns if each.vocabulary and each.kind == "dense"]
    return as_words(source, set(coded) & set(source.fields))


def check_packed(index: Index, other: Index, names: Iterable[str]) -> None:
    """Raises UserError where a column of ``names`` of the packed rows ``other`` means something else than in ``index``:
    another kind or shape, other codes, other source columns, another shift.
    """
    for name in names:
        ours, theirs = index.column(name), other.column(name)
        same = [
            ((ours.kind, ours.shape) == (theirs.kind, theirs.shape), "shape"),
            (all(a == b for a, b in zip(ours.vocabulary or (), theirs.vocabulary or ())), "codes"),
            ((ours.vocabulary is None) == (theirs.vocabulary is None), "kind"),
            *(
                (index.meta.get(key, {}).get(name) == other.meta.get(key, {}).get(name), what)
                for key, what in (("columns", "source columns"), ("standardised", "mean and sd that were taken off"))
            ),
        ]
        for alike, what in same:
            if not alike:
                raise UserError(
                    f"column '{name}' of the new shards has another {what} than in the data that were trained on: pack "
                    "the new table with svi shard like=FOLDER, the folder of these."
                )


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
        made.append(_following(recipe, source))
    words = vocabularies(source, [each.parts[0] for each in made if each.is_dense and each.vocabulary is not None])
    for i, recipe in enumerate(made):
        if recipe.is_dense and recipe.vocabulary is not None:
            known = set(recipe.vocabulary)
            new = [word for word in words[recipe.parts[0]] if word not in known]
            made[i] = replace(recipe, vocabulary=[*recipe.vocabulary, *new])
    return made


def _following(recipe: Recipe, source: Source) -> Recipe:
    """``recipe``, carried as float64 where its float32 may round what ``source`` has."""
    wide = any(source.fields[part].dtype != "float32" and source.fields[part].kind != "bool" for part in recipe.parts)
    follows = recipe.dtype == "float32" and wide
    return replace(recipe, dtype="float64", follows=True) if follows else recipe


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


def _check_kind(recipe: Recipe, part: str, source: Source, also: tuple[str, ...] = ()) -> None:
    """Raises UserError where a source column, if it is none of ``also``, cannot become what a packed one is."""
    field, shape = source.fields[part], () if recipe.stacked else recipe.shape
    if not recipe.is_dense:
        kinds: tuple[str, ...] = (recipe.kind,)
    elif recipe.vocabulary is not None:
        kinds = ("text",) if isinstance(next(iter(recipe.vocabulary), ""), str) else ("text", "int", "float")
    else:
        kinds = {"b": ("bool",), "i": ("int", "bool")}.get(np.dtype(recipe.dtype).kind, NUMERIC)
    if field.kind not in kinds + also or field.shape != shape:
        if field.kind not in VARYING:
            check_usable(part, field, source)
        was, now = (f"{kind} of shape {list(s)}" if s else kind for kind, s in ((kinds[0], shape), field[:2]))
        stray = first_word(source, part) if field.kind == "text" else None
        where = f" ('{stray[1]}' in row {stray[0]}, counted from 0)" if stray else ""
        remedy = "fix it" if stray else "cast it"
        raise UserError(f"column '{part}' of '{source.name}' is {now}{where}, and {was} in the packed table: {remedy}.")
    if recipe.kind == "csr" and list(field.names) != list(recipe.vocabulary or []):
        raise UserError(
            f"column '{part}' of '{source.name}' names its columns differently from the packed table: give them in the "
            "same order, with the same names."
        )
    if not recipe.is_dense and not (recipe.dtype.startswith("float") or np.can_cast(field.dtype, recipe.dtype)):
        raise UserError(
            f"column '{part}' of '{source.name}' holds {field.dtype}, and {recipe.dtype} in the packed table: cast it."
        )


def _carrying(recipe: Recipe, source: Source) -> Recipe:
    """``recipe`` for ``source``, whose numbers may be of a wider kind: carried as float64 then."""
    words = recipe.vocabulary is not None
    if not recipe.is_dense and source.fields[recipe.parts[0]].kind == recipe.kind:
        return recipe
    for part in recipe.parts:
        _check_kind(recipe, part, source, ("int", "float") if words and recipe.is_dense else NUMERIC)
    kinds = {source.fields[part].kind for part in recipe.parts}
    narrow = (recipe.dtype == "bool" and kinds != {"bool"}) or (recipe.dtype == "int64" and "float" in kinds)
    return replace(recipe, dtype="float64") if recipe.is_dense and not words and narrow else recipe


def _stored(recipe: Recipe, values: np.ndarray, dtype: str, first: int) -> np.ndarray:
    """``values`` [B, ...] as ``dtype``; as they are where integers were packed and these have a fraction."""
    if recipe.vocabulary is None and recipe.dtype == "float64" and not dtype.startswith("float"):
        with np.errstate(invalid="ignore"):  # what no integer is differs
            kept = values.astype(dtype)
        differs = (kept != values).reshape(len(values), -1).any(axis=1)
        if differs.any() and dtype != "bool":
            return values
        if differs.any():
            row = int(differs.argmax())
            raise UserError(
                f"column '{recipe.parts[0]}' holds {values[row]} in row {first + row} (counted from 0), and truth "
                "values in the packed table: give 0 and 1, or false and true."
            )
    return values.astype(dtype, copy=False)


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
