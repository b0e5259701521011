"""What a source column holds, and the choice of columns by name."""

import decimal
import numbers
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa

from trainer.errors import UserError, meant, shortened


class _Varying:
    """Rows of varying numbers of entries: row i has ``offsets[i]`` to ``offsets[i + 1]``, and offsets[0] is 0."""

    offsets: np.ndarray

    @property
    def entries(self) -> dict[str, np.ndarray]:
        """The arrays of entries, by name."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self: "V", rows: slice | np.ndarray) -> "V":
        """The rows of a slice of step 1 (which shares memory), or those of a mask or at places, in their order."""
        if isinstance(rows, slice):
            first, stop, _ = rows.indices(len(self))
            bounds = self.offsets[first : max(first, stop) + 1]
            here: Any = slice(bounds[0], bounds[-1])
            offsets = bounds - bounds[0]
        else:
            rows = np.flatnonzero(rows) if rows.dtype == bool else rows
            lengths = np.diff(self.offsets)[rows]
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            here = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][rows] - offsets[:-1], lengths)
        return replace(self, offsets=offsets, **{name: each[here] for name, each in self.entries.items()})  # type: ignore


V = TypeVar("V", bound=_Varying)


@dataclass(frozen=True, eq=False)
class CsrRows(_Varying):
    """B rows of ``width`` numbers that are mostly zero: entry e is ``values[e]`` at ``indices[e]``."""

    offsets: np.ndarray
    """int64 [B + 1]."""
    indices: np.ndarray
    """Integers [nnz], from 0 to ``width`` - 1."""
    values: np.ndarray
    """[nnz]; those at one index of a row add up."""
    width: int

    @property
    def entries(self) -> dict[str, np.ndarray]:
        return {"indices": self.indices, "values": self.values}


@dataclass(frozen=True, eq=False)
class RaggedRows(_Varying):
    """B rows of varying length."""

    offsets: np.ndarray
    """int64 [B + 1]."""
    values: np.ndarray
    """[entries, ...]."""

    @property
    def entries(self) -> dict[str, np.ndarray]:
        return {"values": self.values}


VaryingRows: TypeAlias = CsrRows | RaggedRows
Rows: TypeAlias = np.ndarray | CsrRows | RaggedRows
Raw: TypeAlias = pa.Array | Rows


def concatenate(parts: Sequence[Any]) -> Any:
    """Arrays or varying rows of one column, one after another."""
    first = parts[0]
    if isinstance(first, np.ndarray):
        return np.concatenate(parts)
    starts = np.cumsum([0, *(part.offsets[-1] for part in parts)])
    offsets = np.concatenate([[0], *(part.offsets[1:] + start for part, start in zip(parts, starts))])
    joined = {name: np.concatenate([part.entries[name] for part in parts]) for name in first.entries}
    return replace(first, offsets=offsets, **joined)


NUMERIC = ("float", "int", "bool")
VARYING = ("csr", "ragged")
TWICE = "twice"
"""The kind of what two columns of a table are named."""
NOT_UTF8 = "text that is not UTF-8"
LONG = "integers, some beyond 64 bits"

_NUMPY_KINDS = {"f": "float", "i": "int", "u": "int", "b": "bool", "U": "text", "S": "text"}


class Field(NamedTuple):
    """What a source column holds: "float", "int", "bool", "text", "csr" or "ragged" (rows come as `CsrRows` and
    `RaggedRows`) or, when it is none of them, its type in words.
    """

    kind: str
    shape: tuple[int, ...] = ()  # of one row; csr: (width,); ragged: of one entry
    dtype: str = ""  # csr and ragged: of the values; dense: "float32" where floats have no more digits
    entries: int = 0  # csr and ragged: of all rows, or 0 where that is not known
    names: tuple[str, ...] = ()  # csr: of the columns, where they have some


class Piece(NamedTuple):
    """A part of a file that can be read by itself: ``rows`` rows, from ``at`` to ``stop`` (rows, bytes or groups)."""

    rows: int
    at: int
    stop: int


def pieces_of(counts: Iterable[int], least: int = 1 << 18) -> list[Piece]:
    """Neighbours of ``counts`` rows joined to pieces of ``least`` rows or more, numbered as they come."""
    made: list[Piece] = []
    rows = at = stop = 0
    for count in counts:
        rows, stop = rows + count, stop + 1
        if rows >= least:
            made.append(Piece(rows, at, stop))
            rows, at = 0, stop
    return [*made, Piece(rows, at, stop)] if rows else made


def choose(wanted: Iterable[str] | None, available: Sequence[str], where: object) -> list[str]:
    """``wanted`` (all ``available`` when None); raises UserError with close names for one that ``where`` lacks, and for
    one that it has twice.
    """
    times = Counter(available)
    chosen = list(times if wanted is None else wanted)
    for name in chosen:
        if wanted is not None and times[name] > 1:
            raise UserError(f"'{where}' has two columns named '{name}': rename one of them.")
        if name not in times:
            hint = meant(name, available, f"it has {shortened(available)}.")
            raise UserError(f"'{where}' has no column '{name}': {hint}")
    return chosen


def merge(known: Field | None, found: Field, name: str, file: Path | str) -> Field:
    """The field that holds both: integers and floats are floats; anything else must agree."""
    if known is None or known.kind == "null" or known == found:
        return found
    if found.kind == "null":
        return known
    if found.kind in VARYING and found._replace(entries=0, dtype="") == known._replace(entries=0, dtype=""):
        return found._replace(
            entries=known.entries + found.entries, dtype=np.promote_types(known.dtype, found.dtype).name
        )
    if known.shape == found.shape and {known.kind, found.kind} <= {"int", "float"}:
        return Field("float", known.shape)
    raise UserError(f"column '{name}' of '{file}' is {_words(found)}, and {_words(known)} before it: make them one.")


def _words(field: Field) -> str:
    return f"{field.kind} of shape {list(field.shape)}" if field.shape else field.kind


def schema_fields(schema: pa.Schema, names: Iterable[str]) -> dict[str, Field]:
    """The fields of the columns ``names``; the kind of a name that two have is `TWICE`."""
    times = Counter(schema.names)
    return {name: Field(TWICE) if times[name] > 1 else arrow_field(schema.field(name).type) for name in names}


def arrow_field(kind: pa.DataType) -> Field:
    """The field of an Arrow type."""
    types = pa.types
    if types.is_fixed_size_list(kind):
        inner = arrow_field(kind.value_type)
        shape = (kind.list_size, *inner.shape)
        return Field(inner.kind, shape, inner.dtype) if inner.kind in NUMERIC else Field(str(kind))
    if types.is_dictionary(kind):
        coded = arrow_field(kind.value_type).kind in ("text", "int", "float")
        return Field("text" if coded else str(kind))
    if types.is_floating(kind) or types.is_decimal(kind):
        narrow = types.is_float16(kind) or types.is_float32(kind)
        return Field("float", dtype="float32" if narrow else "")
    if types.is_integer(kind):
        return Field("int")
    if types.is_boolean(kind):
        return Field("bool")
    return Field("text" if types.is_string(kind) or types.is_large_string(kind) else str(kind))


def _kind_of(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "truth values"
    if isinstance(value, numbers.Real | decimal.Decimal):
        return "numbers"
    return "text" if isinstance(value, str) else type(value).__name__


def _is_missing(value: Any) -> bool:
    """None, and what is unlike itself: NaN, NaT, and pandas' NA, which cannot even say so."""
    try:
        return value is None or bool(value != value)
    except (TypeError, ValueError) as error:
        return isinstance(error, TypeError)  # else an array


def object_field(values: Sequence[Any], first_row: int = 0) -> Field:
    """The field of Python objects; its kind tells where the second kind begins, when they are of several."""
    values = [None if _is_missing(value) else value for value in values]
    kinds = [_kind_of(value) for value in values]
    first = next((i for i, value in enumerate(values) if value is not None), None)
    if first is None:
        return Field("null")
    for i in range(first, len(values)):
        if values[i] is not None and kinds[i] != kinds[first]:
            where = f"{str(values[i])[:20]!r} in row {first_row + i}, counted from 0"
            return Field(f"{kinds[first]} and {kinds[i]} ({where})")
    try:
        found = arrow_field(pa.infer_type(values))
    except pa.ArrowException:
        return Field(kinds[first])
    is_long = found.kind == "int" and any(value is not None and not -(2**63) <= value < 2**63 for value in values)
    return Field(LONG) if is_long else found


def numpy_field(dtype: np.dtype, shape: tuple[int, ...]) -> Field:
    """The field of rows of ``shape`` and ``dtype``."""
    kind = _NUMPY_KINDS.get(dtype.kind, str(dtype))
    narrow = dtype.kind == "f" and dtype.itemsize <= 4
    kind = f"text of shape {list(shape)}" if kind == "text" and shape else kind
    return Field(kind, shape, "float32" if narrow else "")
