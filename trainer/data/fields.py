"""What a source column holds, and the choice of columns by name."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa

from trainer.errors import UserError

Raw: TypeAlias = pa.Array | np.ndarray
NUMERIC = ("float", "int", "bool")
_NUMPY_KINDS = {"f": "float", "i": "int", "u": "int", "b": "bool", "U": "text", "S": "text"}


class Field(NamedTuple):
    """What a source column holds: "float", "int", "bool", "text" or, when it is none of them, its type in words."""

    kind: str
    shape: tuple[int, ...] = ()  # of one row


def choose(wanted: Iterable[str] | None, available: Sequence[str], where: object) -> list[str]:
    """``wanted`` (all ``available`` when None); raises UserError with close names for one that ``where`` lacks."""
    chosen = list(available if wanted is None else wanted)
    for name in chosen:
        if available.count(name) > 1:
            raise UserError(f"'{where}' has two columns named '{name}': rename one of them.")
        if name not in available:
            close = difflib.get_close_matches(name, available, n=3, cutoff=0.5)
            shown = ", ".join(available[:20]) + (", …" if len(available) > 20 else "")
            hint = f"did you mean {' or '.join(close)}?" if close else f"it has {shown}."
            raise UserError(f"'{where}' has no column '{name}': {hint}")
    return chosen


def merge(known: Field | None, found: Field, name: str, file: Path) -> Field:
    """The field that holds both: integers and floats are floats; anything else must agree."""
    if known is None or known.kind == "null" or known == found:
        return found
    if found.kind == "null":
        return known
    if known.shape == found.shape and {known.kind, found.kind} == {"int", "float"}:
        return known._replace(kind="float")
    raise UserError(f"column '{name}' of '{file}' is {_words(found)}, and {_words(known)} before it: make them one.")


def _words(field: Field) -> str:
    return f"{field.kind} of shape {list(field.shape)}" if field.shape else field.kind


def arrow_field(kind: pa.DataType) -> Field:
    """The field of an Arrow type."""
    types = pa.types
    if types.is_fixed_size_list(kind):
        inner = arrow_field(kind.value_type)
        return Field(inner.kind, (kind.list_size, *inner.shape)) if inner.kind in NUMERIC else Field(str(kind))
    if types.is_dictionary(kind):
        coded = arrow_field(kind.value_type).kind in ("text", "int")
        return Field("text" if coded else str(kind))
    if types.is_floating(kind) or types.is_decimal(kind):
        return Field("float")
    if types.is_integer(kind):
        return Field("int")
    if types.is_boolean(kind):
        return Field("bool")
    return Field("text" if types.is_string(kind) or types.is_large_string(kind) else str(kind))


def numpy_field(dtype: np.dtype, shape: tuple[int, ...]) -> Field:
    """The field of rows of ``shape`` and ``dtype``."""
    kind = _NUMPY_KINDS.get(dtype.kind, str(dtype))
    return Field(f"text of shape {list(shape)}" if kind == "text" and shape else kind, shape)
