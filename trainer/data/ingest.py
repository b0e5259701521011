"""The first pass of packing: rows are read, checked, given their place and side, and scattered into buckets.

Shapes: B rows of a batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from trainer.data.columns import ColumnMap, Recipe, recipes, source_columns
from trainer.data.fields import choose
from trainer.data.index import ROW_ID
from trainer.data.moments import Moments
from trainer.data.shuffle import PLACE, Buckets, scramble
from trainer.data.sources import Source, open_source
from trainer.data.split import Split
from trainer.errors import UserError

_PLACES = 0  # stream of the hash
_READ_ROWS, _READ_BYTES = 1 << 16, 1 << 22  # of one batch: fixed, since the statistics' rounding depends on it


@dataclass(frozen=True)
class Table:
    """A source with the recipes for its columns and for the key of its groups, and how it is shuffled and split."""

    source: Source
    recipes: list[Recipe]
    group: Recipe | None
    split: Split
    seed: int

    @property
    def record(self) -> np.dtype:
        """What one row is while it is shuffled."""
        made = [(recipe.name, recipe.dtype, recipe.shape) for recipe in self.recipes]
        return np.dtype([(PLACE, "uint64"), (ROW_ID, "int64"), *made])

    def places(self, ids: np.ndarray) -> np.ndarray:
        """The place in the shuffled order, uint64 [B], of rows with ``ids`` [B]: their numbers, or their groups'."""
        return scramble(ids, self.seed, _PLACES)


def describe(
    source: Source | str | Path,
    columns: ColumnMap | None,
    group_by: str | None,
    standardise: Sequence[str],
    float_dtype: str,
    held_out: float,
    seed: int,
    split_by: str | None = None,
    split_time: str | None = None,
    split_after: Any = None,
) -> Table:
    """Opens ``source`` and settles what its columns become; columns to be standardised are carried in float64."""
    opened: Source
    if isinstance(source, str | Path):
        keys = [key for key in (group_by, split_by, split_time) if key is not None]
        opened = open_source(source, None if columns is None else source_columns(columns) + keys)
    else:
        opened = source
    made = recipes(opened, columns, float_dtype, standardise)
    for name in (ROW_ID,) if group_by is None else (ROW_ID, "length"):
        if any(recipe.name == name for recipe in made):
            raise UserError(f"the shards keep the column '{name}' for themselves: give yours another name.")
    for name in standardise:
        if name not in {recipe.name for recipe in made if recipe.dtype.startswith("float")}:
            raise UserError(f"standardise={name} names no column of floats: name one of columns, or a list of numbers.")
    group = None if group_by is None else _key(opened, group_by, "group_by", "a group needs an exact key")
    by = None if split_by is None else _key(opened, split_by, "split.by", "what is held out needs an exact key")
    if split_time is not None:
        choose([split_time], list(opened.fields), opened.name)
    return Table(opened, made, group, Split(held_out, seed, by, split_time, split_after), seed)


def _key(source: Source, name: str, option: str, because: str) -> Recipe:
    """The recipe of a column whose values are told apart exactly."""
    found = recipes(source, {"key": name}, "float32")[0]
    if found.dtype != "int64" or found.shape:
        raise UserError(f"{option}={name} is no column of integers or text: {because}.")
    return found


@dataclass
class Tally:
    """What the first pass saw: the moments of the numeric columns over training rows, and the rows of each fate."""

    moments: dict[str, Moments]
    training: int = 0
    held_out: int = 0
    dropped: int = 0


def scatter(table: Table, buckets: Buckets, *, drop: bool, tick: Callable[[int], None]) -> Tally:
    """Puts every row of the source into ``buckets``; ``tick(rows)`` is called as rows pass.

    Raises UserError for a missing value (unless ``drop``) and when no training row is left.
    """
    tally = Tally({recipe.name: Moments() for recipe in table.recipes if recipe.vocabulary is None})
    keyed = {"group": table.group, "by": table.split.by}
    made = [*table.recipes, *(key for key in keyed.values() if key is not None)]
    names = list(dict.fromkeys((*(part for recipe in made for part in recipe.parts), *table.split.parts)))
    rows = max(1, min(_READ_ROWS, _READ_BYTES // table.record.itemsize))
    hashes = {name: _word_hashes(key) for name, key in keyed.items() if key is not None}
    first_row = 0
    for batch in table.source.batches(rows, names):
        count = len(batch[names[0]])
        records, keys = np.empty(count, table.record), {name: np.empty(count, np.int64) for name in hashes}
        missing = np.zeros(count, bool)
        absences = [table.split.missing(batch)]
        for recipe in made:
            out = next((keys[name] for name, key in keyed.items() if recipe is key), None)
            absences.append(recipe.fill(records[recipe.name] if out is None else out, batch, first_row))
        for part, absent in ((part, absent) for found in absences for part, absent in found.items() if absent.any()):
            if not drop:
                row = first_row + int(absent.argmax())
                raise UserError(
                    f"'{table.source.name}' has no value for '{part}' in row {row} (counted from 0): "
                    "fill it in, or leave such rows out with missing=drop."
                )
            missing |= absent
        records[ROW_ID] = np.arange(first_row, first_row + count)
        exact = {name: codes if (words := hashes[name]) is None else words[codes] for name, codes in keys.items()}
        places = table.places(exact.get("group", records[ROW_ID]))
        records[PLACE] = table.split.places(places, exact.get("by"), batch)
        held = table.split.is_held_out(records[PLACE])
        if missing.any():
            records, held = records[~missing], held[~missing]
        buckets.add(records)
        training = records[~held] if held.any() else records
        for name, moments in tally.moments.items():
            moments.add(training[name])
        tally.dropped += count - len(records)
        tally.training += len(training)
        tally.held_out += len(records) - len(training)
        first_row += count
        tick(count)
    if not tally.training:
        raise UserError(
            f"'{table.source.name}' leaves no row to train on (of {first_row}, {tally.dropped} were dropped and "
            f"{tally.held_out} held out): lower held_out, or fill in the missing values."
        )
    return tally


def _word_hashes(group: Recipe) -> np.ndarray | None:
    """A hash for every word of a text key: unlike its code, it does not change when other words come and go."""
    if group.vocabulary is None:
        return None
    hashes = np.array([xxhash.xxh3_64_intdigest(word.encode()) for word in group.vocabulary], np.uint64)
    if len(np.unique(hashes)) < len(hashes):
        raise UserError(f"two groups of '{group.parts[0]}' share a 64-bit hash: number the groups instead.")
    return hashes
