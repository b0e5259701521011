"""The side of the split on which a row comes to lie: by chance, with its group, or by its time.

A row's side goes with its place, so that it is known when rows are sorted: by chance it is a hash of the place, else
the place's lowest bit. Shapes: B rows of a batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.data.fields import Raw, VaryingRows
from trainer.data.packing.columns import Recipe
from trainer.data.packing.shuffle import scramble
from trainer.errors import UserError

_SIDES = 1  # stream of the hash; that of places is 0
_BIT = np.uint64(1)


@dataclass(frozen=True)
class Split:
    """``share`` of the rows is held out by a hash at ``seed``; of the values of ``by``, with all their rows; or, with
    ``time``, the rows at ``after`` or later (a number, or a date for a column of times or of text).
    """

    share: float
    seed: int
    by: Recipe | None = None
    time: str | None = None
    after: Any = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The source columns that are read for it."""
        return self.by.parts if self.by else (self.time,) if self.time else ()

    def places(self, places: np.ndarray, keys: np.ndarray | None, batch: Mapping[str, Raw]) -> np.ndarray:
        """``places`` [B], uint64, with the side marked; ``keys`` [B]: those of ``by``."""
        if self.by is not None:
            assert keys is not None
            held = self._drawn(keys)
        elif self.time is not None:
            held = _is_after(batch[self.time], self.time, self.after)
        else:
            return places
        return (places & ~_BIT) | held.astype(np.uint64)

    def missing(self, batch: Mapping[str, Raw]) -> dict[str, np.ndarray]:
        """The rows without a time, bool [B], by its column."""
        if self.time is None:
            return {}
        absent = _plain(batch[self.time]).is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
        return {self.time: absent} if absent.any() else {}

    def is_held_out(self, places: np.ndarray) -> np.ndarray:
        """The side, bool [B], of rows at ``places`` [B]."""
        return (places & _BIT).astype(bool) if self.parts else self._drawn(places)

    def _drawn(self, ids: np.ndarray) -> np.ndarray:
        return scramble(ids, self.seed, _SIDES) < np.uint64(int(self.share * 2**64))


def _is_after(raw: Raw, name: str, after: Any) -> np.ndarray:
    """bool [B]: which values of ``raw`` are at ``after`` or later. Raises UserError where the two do not compare."""
    import pyarrow.compute as pc

    values = _plain(raw)
    try:
        bound: Any = str(after) if pa.types.is_string(values.type) or pa.types.is_large_string(values.type) else after
        if pa.types.is_temporal(values.type):
            bound = pa.scalar(datetime.fromisoformat(str(after))).cast(values.type)
        found: np.ndarray = pc.greater_equal(values, bound).fill_null(False).to_numpy(zero_copy_only=False)
        return found
    except (pa.ArrowException, ValueError, TypeError):
        raise UserError(
            f"split.after={after} cannot be compared with column '{name}' ({values.type}): give a number, or a date as "
            "in split.after=2024-01-31."
        ) from None


def _plain(raw: Raw) -> pa.Array:
    assert not isinstance(raw, VaryingRows)
    values = pa.array(raw) if isinstance(raw, np.ndarray) else raw
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
