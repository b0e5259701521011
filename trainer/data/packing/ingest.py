"""The first pass of packing: rows are read, checked, given their place and side, and kept in runs.

Shapes: B rows of a batch, F rows of a run.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import xxhash

from trainer.data.fields import Rows, VaryingRows, concatenate
from trainer.data.packing.columns import Recipe
from trainer.data.packing.running_moments import RunningMoments
from trainer.data.packing.runs import Runs
from trainer.data.packing.shuffle import PLACE, scramble
from trainer.data.packing.split import Split
from trainer.data.shards.index import ROW_ID
from trainer.data.sources.source import Source
from trainer.errors import UserError

ENTRY_BYTES = 12  # of a csr column, about: an index and a value
WEIGHT = "weight"
"""The column of weights; `Index.meta` has this key where packing was asked for it."""
_PLACES = 0  # stream of the hash
_READ_ROWS, _READ_BYTES = 1 << 16, 1 << 22  # of one batch: fixed, since the shifts' rounding depends on it


@dataclass(frozen=True)
class Table:
    """What becomes of a source: recipes for its columns and for the key of its groups, its order, split and blocks."""

    name: str
    rows: int
    recipes: list[Recipe]
    group: Recipe | None
    split: Split
    seed: int
    standardize: tuple[str, ...]
    float_dtype: str | None
    drop: bool
    shard_bytes: int
    block_rows: int
    entry_bytes: int = 0
    """Of the entries of all sparse and ragged columns, about."""
    shifts: dict[str, dict[str, Any]] | None = None
    """What standardizing subtracts ("mean") and divides by ("sd"), where it is that of another table."""
    longest: int | None = None
    """T, where it is that of another table."""
    mixed: dict[str, str] = field(default_factory=dict)
    """What is wrong with columns of text that are numbers in part, where a model calculates with them."""
    weighted: bool = False
    """Whether a column `weight` was asked for."""
    spared: dict[str, str] | None = None
    """Where columns that cannot be packed are left out: why, by column."""

    @property
    def row_bytes(self) -> int:
        """Of one row while it is packed, about."""
        dense = sum(np.dtype(r.dtype).itemsize * math.prod(r.shape) for r in self.recipes if r.is_dense)
        return 18 + dense + sum(8 for r in self.recipes if not r.is_dense) + self.entry_bytes // self.rows

    def places(self, ids: np.ndarray) -> np.ndarray:
        """The place in the shuffled order, uint64 [B], of rows with ``ids`` [B]: their numbers, or their groups'."""
        return scramble(ids, self.seed, _PLACES)

    def content(self) -> dict[str, Any]:
        """As JSON keeps it: what `of` makes the same from."""
        kept: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return kept

    @classmethod
    def of(cls, content: dict[str, Any]) -> "Table":
        """The table that gave ``content``."""

        def recipe(made: dict[str, Any] | None) -> Recipe | None:
            return (
                None
                if made is None
                else Recipe(**{**made, "parts": tuple(made["parts"]), "shape": tuple(made["shape"])})
            )

        content = {"standardize" if name == "standardise" else name: value for name, value in content.items()}  # of 0.1
        split = Split(**{**content["split"], "by": recipe(content["split"]["by"])})
        settled = {"recipes": [recipe(made) for made in content["recipes"]], "group": recipe(content["group"])}
        return cls(**{**content, **settled, "split": split, "standardize": tuple(content["standardize"])})


@dataclass
class Tally:
    """What the first pass saw: the moments of what is to be standardized, and the rows of each fate."""

    moments: dict[str, RunningMoments] = field(default_factory=dict)
    entries: dict[str, int] = field(default_factory=dict)
    """Of each sparse and ragged column, over all rows."""
    spared: dict[str, str] = field(default_factory=dict)
    """Why columns have to be left out, where that is asked for."""
    training: int = 0
    held_out: int = 0
    dropped: int = 0

    def merge(self, later: "Tally") -> None:
        """Adds the rows of ``later``."""
        for name, moments in later.moments.items():
            self.moments.setdefault(name, RunningMoments()).merge(moments)
        for name, count in later.entries.items():
            self.entries[name] = self.entries.get(name, 0) + count
        self.spared = {**later.spared, **self.spared}
        self.training += later.training
        self.held_out += later.held_out
        self.dropped += later.dropped

    def state(self) -> dict[str, Any]:
        """Numbers from which `of` makes the same again."""
        return {**vars(self), "moments": {name: moments.state() for name, moments in self.moments.items()}}

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Tally":
        """The tally that gave ``state``."""
        return cls(**{**state, "moments": {name: RunningMoments.of(each) for name, each in state["moments"].items()}})


class Scatter:
    """Puts rows of ``source`` into ``runs``, each of at most ``run_bytes``; `piece` may run in several threads."""

    def __init__(self, source: Source, table: Table, runs: Runs, run_bytes: int, tick: Callable[[int], None]):
        self.source, self.table, self.runs, self.tick = source, table, runs, tick
        self._keyed = {name: key for name, key in (("group", table.group), ("by", table.split.by)) if key is not None}
        self._hashes = {name: _word_hashes(key) for name, key in self._keyed.items()}
        made = [*table.recipes, *self._keyed.values()]
        self._names = list(dict.fromkeys((*(part for each in made for part in each.parts), *table.split.parts)))
        self._batch_rows = max(1, min(_READ_ROWS, _READ_BYTES // table.row_bytes))
        self._run_rows = max(self._batch_rows, run_bytes // table.row_bytes)
        self._first_rows = np.cumsum([0, *source.piece_rows])

    def piece(self, number: int) -> Tally:
        """The rows of one piece. Raises UserError for a missing value, unless these rows are dropped."""
        followed = (recipe.name for recipe in self.table.recipes if recipe.follows)
        tally = Tally({name: RunningMoments() for name in (*self.table.standardize, *followed)})
        first_row, stop = self._first_rows[number : number + 2].tolist()
        room = _Room(self.table, min(self._run_rows, stop - first_row))
        for batch in self.source.batches(self._batch_rows, self._names, number):
            count = len(batch[self._names[0]])
            if room.filled + count > room.rows:
                self._keep(room, tally)
            rows, keys, missing = self._made(batch, first_row, room.after(count), tally)
            rows[ROW_ID][...] = np.arange(first_row, first_row + count)
            exact = {
                name: codes if (words := self._hashes[name]) is None else words[codes] for name, codes in keys.items()
            }
            places = self.table.places(exact.get("group", rows[ROW_ID]))
            rows[PLACE][...] = self.table.split.places(places, exact.get("by"), batch)
            room.add(rows, missing)
            tally.dropped += int(missing.sum())
            first_row += count
            self.tick(count)
        if room.filled:
            self._keep(room, tally)
        if first_row != stop:
            raise UserError(f"'{self.source.name}' has changed while it was read: pack it again.")
        return tally

    def _made(
        self, batch: Any, first_row: int, rows: dict[str, Any], tally: Tally
    ) -> tuple[dict[str, Any], dict[str, np.ndarray], np.ndarray]:
        """Fills ``rows`` of the recipes; also the keys [B], and which rows miss a value, bool [B]."""
        count = len(batch[self._names[0]])
        absences, keys = [self.table.split.missing(batch)], {}
        for recipe in self.table.recipes:
            try:
                if recipe.is_dense:
                    lacking = recipe.fill(rows[recipe.name], batch, first_row)
                else:
                    rows[recipe.name], lacking = recipe.varying(batch, first_row)
                if lacking and self.table.spared is not None:
                    raise self._missing(lacking, first_row)
                absences.append(lacking)
            except UserError as error:
                if self.table.spared is None or not recipe.is_dense:
                    raise
                rows[recipe.name][...] = 0
                tally.spared.setdefault(recipe.name, str(error))
        for name, key in self._keyed.items():
            keys[name] = np.empty(count, np.int64)
            absences.append(key.fill(keys[name], batch, first_row))
        missing = np.zeros(count, bool)
        for found in absences:
            if found and not self.table.drop:
                raise self._missing(found, first_row)
            for absent in found.values():
                missing |= absent
        return rows, keys, missing

    def _missing(self, absences: dict[str, np.ndarray], first_row: int) -> UserError:
        part, absent = next(iter(absences.items()))
        row = first_row + int(absent.argmax())
        return UserError(
            f"'{self.table.name}' has no value for '{part}' in row {row} (counted from 0): "
            "fill it in, or leave such rows out with missing=drop."
        )

    def _keep(self, room: "_Room", tally: Tally) -> None:
        rows = room.take()
        held = self.table.split.is_held_out(rows[PLACE])  # type: ignore[arg-type]
        for name, moments in tally.moments.items():
            moments.add(_values(rows[name][~held]))
            others = RunningMoments()
            others.add(_values(rows[name][held]))
            moments.rounding = np.maximum(moments.rounding, others.rounding)
        for name, each in rows.items():
            if isinstance(each, VaryingRows):
                tally.entries[name] = tally.entries.get(name, 0) + int(each.offsets[-1])
        tally.held_out += int(held.sum())
        tally.training += int((~held).sum())
        if len(held):
            self.runs.add(rows, held)


def _values(rows: Rows) -> np.ndarray:
    return rows if isinstance(rows, np.ndarray) else rows.entries["values"]


class _Room:
    """Memory for ``rows`` rows, filled batch by batch and used again."""

    def __init__(self, table: Table, rows: int):
        self.rows, self.filled = rows, 0
        self._dense = {PLACE: np.empty(rows, np.uint64), ROW_ID: np.empty(rows, np.int64)}
        self._dense |= {r.name: np.empty((rows, *r.shape), r.dtype) for r in table.recipes if r.is_dense}
        self._varying: dict[str, list[VaryingRows]] = {r.name: [] for r in table.recipes if not r.is_dense}

    def after(self, count: int) -> dict[str, Any]:
        """The next ``count`` rows, to be filled."""
        return {name: array[self.filled : self.filled + count] for name, array in self._dense.items()}

    def add(self, rows: dict[str, Rows], missing: np.ndarray) -> None:
        """Counts the rows that `after` gave as filled, less those that miss a value."""
        kept = slice(None) if not missing.any() else ~missing
        count = int((~missing).sum())
        for name, each in rows.items():
            if isinstance(each, VaryingRows):
                self._varying[name].append(each[kept])
            elif not isinstance(kept, slice):
                self._dense[name][self.filled : self.filled + count] = each[kept]
        self.filled += count

    def take(self) -> dict[str, Rows]:
        """The rows so far; they are valid until the next one is added."""
        rows: dict[str, Rows] = {name: array[: self.filled] for name, array in self._dense.items()}
        for name, parts in self._varying.items():
            rows[name] = concatenate(parts)
            parts.clear()
        self.filled = 0
        return rows


def total(tallies: Iterable[Tally]) -> Tally:
    """Of all pieces, in their order."""
    made = Tally()
    for tally in tallies:
        made.merge(tally)
    return made


def check_rows(tally: Tally, name: str) -> None:
    """Raises UserError when no training row is left."""
    if not tally.training:
        total = tally.dropped + tally.held_out
        raise UserError(
            f"'{name}' leaves no row to train on (of {total}, {tally.dropped} were dropped and "
            f"{tally.held_out} held out): lower held_out, or fill in the missing values."
        )


def check_rounding(table: Table, tally: Tally) -> None:
    """Raises UserError where a column is to be stored as float32, like that of another table, which would round it."""
    for recipe in table.recipes if table.shifts is not None else ():
        if recipe.follows and tally.moments[recipe.name].needs_float64:
            raise UserError(
                f"column '{recipe.name}' is float32 in the table that '{table.name}' is to be like, which rounds the "
                "values of this one by more than 1e-6 of their sd: pack both tables together, or subtract the same "
                "number from both."
            )


def _word_hashes(group: Recipe) -> np.ndarray | None:
    """A hash for every word of a text key: unlike its code, it does not change when other words come and go."""
    if group.vocabulary is None:
        return None
    hashes = np.array([xxhash.xxh3_64_intdigest(str(word).encode()) for word in group.vocabulary], np.uint64)
    if len(np.unique(hashes)) < len(hashes):
        raise UserError(f"two groups of '{group.parts[0]}' share a 64-bit hash: number the groups instead.")
    return hashes
