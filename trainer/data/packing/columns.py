"""Shard columns from source columns: stacking, types, codes for text, and what is missing.

Floats, decimals and truth values become ``float_dtype``: a truth value is a Bernoulli observation or an indicator, and
both want a float. Integers become int64; stacked, whatever is numeric becomes ``float_dtype``. Text becomes int64 codes
into its vocabulary: the sorted values of the whole source, held in memory while packing. A dictionary column is what
its values are. Of sparse and ragged columns floats become ``float_dtype``, and integers keep their type.

Shapes: B rows of a batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.data.fields import NUMERIC, VARYING, Field, Raw, VaryingRows, choose
from trainer.data.shards.index import DTYPES
from trainer.data.sources.source import Source
from trainer.errors import UserError

ColumnMap = Mapping[str, str | Sequence[str]]
_READ_ROWS = 1 << 16


@dataclass(frozen=True)
class Recipe:
    """How the shard column ``name`` is made of the source columns ``parts``: one, or several stacked to [B, len]."""

    name: str
    parts: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]  # of one row
    dtype: str  # as carried through the packer: float64 for a column that is to be standardised
    vocabulary: list[str] | None = None
    kind: str = "dense"

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
                    f"{first_row + of_row[bad.argmax()]} (counted from 0): mend it in the source."
                )
        absent = np.zeros(len(rows), bool)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            infinite = _in_row(np.isinf(values))
            if infinite.any():
                raise UserError(
                    f"column '{part}' is infinite, or too large for {self.dtype}, in row "
                    f"{first_row + of_row[infinite.argmax()]} (counted from 0): mend it in the source."
                )
            absent[of_row[_in_row(np.isnan(values))]] = True
        return replace(rows, values=values), {part: absent} if absent.any() else {}

    def fill(self, out: np.ndarray, batch: Mapping[str, Raw], first_row: int) -> dict[str, np.ndarray]:
        """Writes ``out`` [B, *shape]; returns the rows that miss a value, bool [B], by source column that has any.

        ``first_row`` numbers the rows in messages. Raises UserError for an infinite number and for one too large.
        """
        missing: dict[str, np.ndarray] = {}
        for place, part in enumerate(self.parts):
            if self.vocabulary is None:
                values, absent = _numbers(batch[part], part, self.dtype)
            else:
                values, absent = _codes(batch[part], part, self.vocabulary)
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                infinite = _in_row(np.isinf(values))
                if infinite.any():
                    row = first_row + int(infinite.argmax())
                    raise UserError(
                        f"column '{part}' is infinite, or too large for {self.dtype}, in row {row} (counted from 0): "
                        "mend it in the source."
                    )
                absent = absent | _in_row(np.isnan(values))
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


def recipes(source: Source, columns: ColumnMap | None, float_dtype: str, wide: Iterable[str] = ()) -> list[Recipe]:
    """A recipe for each of ``columns`` (every source column by its own name when None); those in ``wide`` in float64.

    Reads the text columns of ``source`` once, for their vocabularies. Raises UserError for an unknown column, text in
    a list, a type that is no number, truth value or text, and a name that a model's argument cannot have.
    """
    columns = {name: name for name in source.fields} if columns is None else columns
    choose(source_columns(columns), list(source.fields), source.name)
    made = [_recipe(name, parts, source, "float64" if name in wide else float_dtype) for name, parts in columns.items()]
    words = vocabularies(
        source, [recipe.parts[0] for recipe in made if recipe.vocabulary is not None and recipe.is_dense]
    )
    return [
        replace(recipe, vocabulary=words[recipe.parts[0]])
        if recipe.vocabulary is not None and recipe.is_dense
        else recipe
        for recipe in made
    ]


def _recipe(name: str, parts: str | Sequence[str], source: Source, float_dtype: str) -> Recipe:
    if not (name.isidentifier() and name.isascii() and len(name) <= 64):
        raise UserError(f"'{name}' cannot name an argument of a model: rename it, as in columns.x='{name}'.")
    if isinstance(parts, str):
        field = source.fields[parts]
        kind, shape = field.kind, field.shape
        if kind in VARYING:
            names, dtype = list(field.names) or None, _varying_dtype(field.dtype, float_dtype)
            return Recipe(name, (parts,), False, shape, dtype, names, kind)
        if kind == "text" and not shape:
            return Recipe(name, (parts,), False, (), "int64", vocabulary=[])
        _check_numeric(parts, source.fields[parts], source)
        return Recipe(name, (parts,), False, shape, "int64" if kind == "int" else float_dtype)
    for part in parts:
        if source.fields[part].kind == "text":
            raise UserError(
                f"text in a numeric column: '{part}' in columns.{name} holds text; give it a column of its own "
                f"(columns.{name}_{part}={part}), where it becomes integer codes."
            )
        _check_numeric(part, source.fields[part], source)
        if source.fields[part].shape:
            raise UserError(
                f"'{part}' in columns.{name} has rows of shape {list(source.fields[part].shape)}, and only single "
                f"numbers can be stacked: give it a column of its own."
            )
    return Recipe(name, tuple(parts), True, (len(parts),), float_dtype)


def _varying_dtype(dtype: str, float_dtype: str) -> str:
    if np.dtype(dtype).kind == "f":
        return float_dtype
    return dtype if dtype in DTYPES else "int64"


def _check_numeric(part: str, field: Field, source: Source) -> None:
    if field.kind not in NUMERIC:
        kind = "no value in any row" if field.kind == "null" else field.kind
        raise UserError(
            f"column '{part}' of '{source.name}' holds {kind}, and neither numbers, truth values nor text: "
            "cast it, or leave it out of columns."
        )
    if 0 in field.shape:
        raise UserError(f"column '{part}' of '{source.name}' has rows of no numbers: leave it out of columns.")


def vocabularies(source: Source, names: Sequence[str]) -> dict[str, list[str]]:
    """The sorted values of each text column, in one pass over these columns alone."""
    found: dict[str, set] = {name: set() for name in names}
    for batch in source.batches(_READ_ROWS, list(found)) if found else ():
        for name, values in found.items():
            values.update(pc.unique(_text(batch[name])).drop_null().to_pylist())
    return {name: sorted(values) for name, values in found.items()}


def _in_row(flags: np.ndarray) -> np.ndarray:
    """Whether any of ``flags`` [B, ...] is set, [B]."""
    return np.any(flags.reshape(len(flags), -1), axis=1)


def _text(raw: Raw) -> pa.Array:
    assert not isinstance(raw, VaryingRows)
    if isinstance(raw, np.ndarray):
        return pa.array(np.char.decode(raw, "utf-8") if raw.dtype.kind == "S" else raw)
    return raw.dictionary_decode() if pa.types.is_dictionary(raw.type) else raw


def _codes(raw: Raw, part: str, vocabulary: list[str]) -> tuple[np.ndarray, np.ndarray]:
    text = _text(raw)
    codes = pc.index_in(text, value_set=pa.array(vocabulary, text.type))
    if codes.null_count != text.null_count:
        new = pc.unique(text.filter(pc.and_(codes.is_null(), text.is_valid()))).to_pylist()
        raise UserError(
            f"column '{part}' holds {new[0]!r}, which the table had not when its text was numbered: "
            "leave such rows out, or pack the table again."
        )
    return codes.fill_null(0).to_numpy().astype(np.int64), text.is_null().to_numpy(zero_copy_only=False)


def _numbers(raw: Raw, part: str, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """``raw`` as ``dtype`` [B, ...], and which rows [B] hold a null."""
    if isinstance(raw, pa.Array):
        values, absent = _from_arrow(raw)
    else:
        assert isinstance(raw, np.ndarray)
        values, absent = raw, np.zeros(len(raw), bool)
    if dtype == "int64" and values.dtype == np.uint64 and values.size and values.max() > np.iinfo(np.int64).max:
        raise UserError(f"column '{part}' holds an integer above 2**63 - 1: store it as text or as a float.")
    with np.errstate(over="ignore"):  # becomes infinite, which is refused
        return values.astype(dtype, copy=False), absent


def _from_arrow(raw: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [B, ...] with 0 for a null, and which rows [B] hold a null."""
    if pa.types.is_dictionary(raw.type):
        raw = raw.dictionary_decode()
    nulls = raw.null_count > 0 and not pa.types.is_null(raw.type)
    absent = raw.is_null().to_numpy(zero_copy_only=False) if nulls else np.zeros(len(raw), bool)
    if pa.types.is_fixed_size_list(raw.type):
        inner, lacks = _from_arrow(raw.drop_null().flatten())
        row = (raw.type.list_size, *inner.shape[1:])
        values = np.zeros((len(raw), *row), inner.dtype)
        values[~absent] = inner.reshape(-1, *row)
        absent[~absent] = lacks.reshape(-1, raw.type.list_size).any(axis=1)
        return values, absent
    if pa.types.is_decimal(raw.type):
        raw = raw.cast(pa.float64())
    if raw.null_count:
        raw = raw.fill_null(pa.scalar(0).cast(raw.type))
    return raw.to_numpy(zero_copy_only=False), absent
