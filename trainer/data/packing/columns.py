"""Shard columns from source columns: stacking, types, codes for text, and what is missing.

Truth values stay bool, integers become int64. Floats, decimals, and whatever is numeric in a stack become
``float_dtype``; where that is None, float32, or float64 where float32 would round a value by more than 1e-6 of the
column's sd (`Recipe.follows`). Text becomes int64 codes into its vocabulary: the sorted values of the whole source,
held in memory while packing. A dictionary column (pandas' Categorical) of text or numbers becomes codes into its
values: sorted, or, where it is ordered, all of them in their order. Of sparse and ragged columns floats become
``float_dtype`` likewise, and integers keep their type.

Shapes: B rows of a batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.data.fields import NOT_UTF8, NUMERIC, TWICE, VARYING, Field, Raw, VaryingRows, choose
from trainer.data.packing.values import as_codes, as_numbers, as_words, in_row
from trainer.data.shards.index import DTYPES
from trainer.data.sources.source import Source
from trainer.errors import UserError, meant, shortened

ColumnMap = Mapping[str, str | Sequence[str]]
_READ_ROWS = 1 << 16


@dataclass(frozen=True)
class Recipe:
    """How the shard column ``name`` is made of the source columns ``parts``: one, or several stacked to [B, len]."""

    name: str
    parts: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]  # of one row
    dtype: str  # as carried through the packer: float64 for a column that is to be standardized
    vocabulary: list[Any] | None = None
    kind: str = "dense"
    follows: bool = False
    """Whether it is stored as float32 unless that would round it, though carried as float64."""

    @property
    def is_dense(self) -> bool:
        """Whether every row has the same number of values."""
        return self.kind == "dense"

    def varying(self, batch: Mapping[str, Raw], first_row: int) -> tuple[VaryingRows, dict[str, np.ndarray]]:
        """The rows of a column that is not dense, and as `fill` those that miss a value.

        Raises UserError as `fill`, and for an index beyond the width.
        """
        (part,) = self.parts
        rows: Any = batch[part]
        with np.errstate(over="ignore"):
            values = rows.values.astype(self.dtype, copy=False)
        of_row = np.repeat(np.arange(len(rows)), np.diff(rows.offsets))
        if self.kind == "csr":
            bad = (rows.indices < 0) | (rows.indices >= rows.width)
            if bad.any():
                raise UserError(
                    f"column '{part}' has an index outside 0 to {rows.width - 1} in row "
                    f"{first_row + of_row[bad.argmax()]} (counted from 0): fix it in the source."
                )
        absent = np.zeros(len(rows), bool)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            infinite = in_row(np.isinf(values))
            if infinite.any():
                raise UserError(
                    f"column '{part}' is infinite, or too large for {self.dtype}, in row "
                    f"{first_row + of_row[infinite.argmax()]} (counted from 0): fix it in the source."
                )
            absent[of_row[in_row(np.isnan(values))]] = True
        return replace(rows, values=values), {part: absent} if absent.any() else {}

    def fill(self, out: np.ndarray, batch: Mapping[str, Raw], first_row: int) -> dict[str, np.ndarray]:
        """Writes ``out`` [B, *shape]; returns the rows that miss a value, bool [B], by source column that has any.

        ``first_row`` numbers the rows in messages. Raises UserError for an infinite number and for one too large.
        """
        missing: dict[str, np.ndarray] = {}
        for place, part in enumerate(self.parts):
            if self.vocabulary is None:
                values, absent = as_numbers(batch[part], part, self.dtype, first_row)
            else:
                values, absent = as_codes(batch[part], part, self.vocabulary, first_row)
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                infinite = in_row(np.isinf(values))
                if infinite.any():
                    row = first_row + int(infinite.argmax())
                    raise UserError(
                        f"column '{part}' is infinite, or too large for {self.dtype}, in row {row} (counted from 0): "
                        "mend it in the source."
                    )
                absent = absent | in_row(np.isnan(values))
            (out[:, place] if self.stacked else out)[...] = values
            if absent.any():
                missing[part] = absent
        return missing


def source_columns(columns: ColumnMap) -> list[str]:
    """The source columns that ``columns`` names. Raises UserError for a column of nothing."""
    for name, parts in columns.items():
        if not parts or not all(isinstance(part, str) for part in parts):
            raise UserError(f"columns.{name} names no source column: write columns.{name}=a or columns.{name}=[a,b].")
    return [part for parts in columns.values() for part in ([parts] if isinstance(parts, str) else parts)]


def recipes(
    source: Source,
    columns: ColumnMap | None,
    float_dtype: str | None,
    wide: Iterable[str] = (),
    spared: dict[str, str] | None = None,
    categories: Iterable[str] = (),
) -> list[Recipe]:
    """A recipe for each of ``columns`` (every source column by its own name when None); those in ``wide`` in float64.

    Those in ``categories`` become codes also where they are numbers. Reads the columns of text and categories once, for
    their vocabularies. Raises UserError for an unknown column, text in
    a list, a type that is not a number, truth value or text, and a name that a model's argument cannot have; with
    ``spared`` such a column is left out, and its sentence put there.
    """
    columns = {name: name for name in source.fields} if columns is None else columns
    choose(source_columns(columns), list(source.fields), source.name)
    made = []
    for name, parts in columns.items():
        try:
            if not (name.isidentifier() and name.isascii() and len(name) <= 64):
                raise UserError(f"'{name}' cannot name an argument of a model: rename it, as in columns.x='{name}'.")
            if isinstance(parts, str) and {name, parts} & set(categories):
                made.append(_category(name, parts, source))
            else:
                made.append(_recipe(name, parts, source, float_dtype, name in wide))
        except UserError as error:
            if spared is None:
                raise
            spared[name] = str(error)
    words = vocabularies(
        source, [recipe.parts[0] for recipe in made if recipe.vocabulary is not None and recipe.is_dense]
    )
    return [
        replace(recipe, vocabulary=words[recipe.parts[0]])
        if recipe.vocabulary is not None and recipe.is_dense
        else recipe
        for recipe in made
    ]


def check_categories(categories: Sequence[str], columns: ColumnMap | None, source: Source) -> None:
    """Raises UserError, with close names, for one of ``categories`` that is not a column."""
    listed = {part: name for name, parts in (columns or {}).items() if not isinstance(parts, str) for part in parts}
    known = list(dict.fromkeys([*(columns or {}), *source.fields]))
    for name in categories:
        if name in listed and name not in (columns or {}):
            raise UserError(
                f"categories=[{name}] is one of the numbers of columns.{listed[name]}: give it a column of its own "
                f"(columns.{name}={name})."
            )
        if name not in known:
            hint = meant(name, known, f"there are {shortened(known)}.")
            raise UserError(f"categories=[{name}] names no column that is packed: {hint}")


def _recipe(name: str, parts: str | Sequence[str], source: Source, float_dtype: str | None, wide: bool) -> Recipe:
    float_dtype = "float64" if wide else float_dtype
    if isinstance(parts, str):
        field = source.fields[parts]
        kind, shape = field.kind, field.shape
        if kind in VARYING:
            names, dtype = list(field.names) or None, _varying_dtype(field.dtype, float_dtype)
            return Recipe(name, (parts,), False, shape, dtype, names, kind, float_dtype is None and dtype == "float64")
        if kind == "text" and not shape:
            return _category(name, parts, source)
        check_usable(parts, source.fields[parts], source)
        if kind == "int" or (kind == "bool" and not wide):
            return Recipe(name, (parts,), False, shape, "int64" if kind == "int" else "bool")
        return _floats(Recipe(name, (parts,), False, shape, ""), [field], float_dtype)
    for part in parts:
        if source.fields[part].kind == "text":
            raise UserError(
                f"text in a numeric column: '{part}' in columns.{name} holds text; give it a column of its own "
                f"(columns.{name}_{part}={part}), where it becomes integer codes."
            )
        check_usable(part, source.fields[part], source)
        if source.fields[part].shape:
            raise UserError(
                f"'{part}' in columns.{name} has rows of shape {list(source.fields[part].shape)}, and only single "
                f"numbers can be stacked: give it a column of its own."
            )
    return _floats(
        Recipe(name, tuple(parts), True, (len(parts),), ""), [source.fields[part] for part in parts], float_dtype
    )


def _category(name: str, part: str, source: Source) -> Recipe:
    """Codes, of which the vocabulary is to be found. Raises UserError for what is neither text nor single numbers."""
    check_usable(part, source.fields[part], source)
    if source.fields[part].kind not in ("text", "int", "float") or source.fields[part].shape:
        raise UserError(f"categories=[{part}] names a column of neither text nor single numbers: leave it out there.")
    return Recipe(name, (part,), False, (), "int64", vocabulary=[])


def _floats(recipe: Recipe, fields: Sequence[Field], float_dtype: str | None) -> Recipe:
    """``recipe`` of ``fields`` as floats."""
    narrow = all(field.kind == "bool" or field.dtype == "float32" for field in fields)
    follows = float_dtype is None and not narrow
    return replace(recipe, dtype="float64" if follows else float_dtype or "float32", follows=follows)


def _varying_dtype(dtype: str, float_dtype: str | None) -> str:
    if np.dtype(dtype).kind == "f":
        return float_dtype or ("float64" if np.dtype(dtype).itemsize == 8 else "float32")
    return dtype if dtype in DTYPES else "int64"


def check_usable(part: str, field: Field, source: Source) -> None:
    """Raises UserError where a source column has neither numbers, truth values nor text."""
    if field.kind == TWICE:
        raise UserError(f"'{source.name}' has two columns named '{part}': rename one of them.")
    if field.kind not in (*NUMERIC, "text"):
        if field.kind == NOT_UTF8:
            raise UserError(
                f"column '{part}' of '{source.name}' holds {NOT_UTF8} (it may be Latin-1): save the file as UTF-8."
            )
        kind = "no value in any row" if field.kind == "null" else field.kind
        times = any(word in kind for word in ("timestamp", "date", "time", "duration"))
        if " and " in kind:
            raise UserError(f"column '{part}' of '{source.name}' holds {kind}: make them one, or do not use it.")
        remedy = "count the seconds or days from a day that you choose" if times else "cast it"
        if kind.startswith(("list", "large_list")):  # a series or a group in each row
            remedy = (
                "give each entry a row of its own, beside a column that says whose it is, and pack with group_by= that "
                "column"
            )
        raise UserError(
            f"column '{part}' of '{source.name}' holds {kind}, and neither numbers, truth values nor text: "
            f"{remedy}, or leave it out of columns."
        )
    if 0 in field.shape:
        raise UserError(f"column '{part}' of '{source.name}' has rows of no numbers: leave it out of columns.")


def vocabularies(source: Source, names: Sequence[str]) -> dict[str, list[Any]]:
    """The values of each column of text or categories, sorted, in one pass over these columns alone.

    Ordered categories come in their order, also those that no row has.
    """
    found: dict[str, dict[Any, None]] = {name: {} for name in names}
    ordered = set()
    for batch in source.batches(_READ_ROWS, list(found)) if found else ():
        for name, values in found.items():
            raw = batch[name]
            if isinstance(raw, pa.DictionaryArray) and raw.type.ordered:
                ordered.add(name)
                values.update(dict.fromkeys(raw.dictionary.drop_null().to_pylist()))
            else:
                values.update(dict.fromkeys(as_words(raw).unique().drop_null().to_pylist()))
    return {name: list(values) if name in ordered else sorted(values) for name, values in found.items()}
