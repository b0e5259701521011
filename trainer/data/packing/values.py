"""The values of one source column as numbers: codes of words, integers, floats, and which of them are missing.

Shapes: B rows of a batch.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from trainer.data.fields import Raw, VaryingRows
from trainer.errors import UserError


def in_row(flags: np.ndarray) -> np.ndarray:
    """Whether any of ``flags`` [B, ...] is set, [B]."""
    found: np.ndarray = np.any(flags.reshape(len(flags), -1), axis=1)
    return found


def as_words(raw: Raw) -> pa.Array:
    """Text, or the values of categories, with a null where there is none."""
    assert not isinstance(raw, VaryingRows)
    if isinstance(raw, np.ndarray):
        return pa.array(np.char.decode(raw, "utf-8") if raw.dtype.kind == "S" else raw, from_pandas=True)
    raw = raw.dictionary_decode() if pa.types.is_dictionary(raw.type) else raw
    if not pa.types.is_floating(raw.type):
        return raw
    import pyarrow.compute as pc  # here and below: numbers are packed without it, and it takes 0.1 s to load

    return pc.if_else(pc.is_nan(raw), None, raw)


def as_codes(raw: Raw, part: str, vocabulary: list[Any], first_row: int) -> tuple[np.ndarray, np.ndarray]:
    """The places in ``vocabulary`` as int64 [B], and which rows [B] hold a null. Raises UserError for a new value."""
    import pyarrow.compute as pc

    text = as_words(raw)
    text, known = _comparable(text, pa.array(vocabulary))
    codes = pc.index_in(text, value_set=known)
    if codes.null_count != text.null_count:
        row = pc.index(pc.and_(codes.is_null(), text.is_valid()), True).as_py()
        raise UserError(
            f"column '{part}' holds {text[row].as_py()!r} in row {first_row + row} (counted from 0), which the packed "
            "table had not when its categories were numbered: leave such rows out, or pack a table that has it."
        )
    return codes.fill_null(0).to_numpy().astype(np.int64), text.is_null().to_numpy(zero_copy_only=False)


def _comparable(words: pa.Array, known: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Both as one type: 7 and 7.0 are the category "7"."""
    import pyarrow.compute as pc

    is_float, is_int = pa.types.is_floating, pa.types.is_integer
    if is_float(words.type) and not is_float(known.type) and pc.all(pc.equal(words, pc.floor(words))).as_py():
        words = words.cast(pa.int64())
    if (is_int(words.type) and is_int(known.type)) or (is_float(known.type) and not pa.types.is_string(words.type)):
        return words.cast(known.type), known
    return (words, known) if words.type == known.type else (words.cast(pa.string()), known.cast(pa.string()))


def as_numbers(raw: Raw, part: str, dtype: str, first_row: int) -> tuple[np.ndarray, np.ndarray]:
    """``raw`` as ``dtype`` [B, ...], and which rows [B] hold a null."""
    if isinstance(raw, pa.Array):
        values, absent = _from_arrow(raw)
    else:
        assert isinstance(raw, np.ndarray)
        values, absent = raw, np.zeros(len(raw), bool)
    if dtype == "int64" and values.dtype == np.uint64 and values.size and values.max() > np.iinfo(np.int64).max:
        row = first_row + int(in_row(values > np.iinfo(np.int64).max).argmax())
        raise UserError(
            f"column '{part}' holds an integer above 2**63 - 1 in row {row} (counted from 0): store it as text or as a "
            "float."
        )
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
