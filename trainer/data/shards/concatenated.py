"""Several folders as one data set: their blocks one after another, under one index.

Row ids count on from folder to folder, as if the tables lay one below the other.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, islice
from typing import Any

import numpy as np

from trainer.data.shards.files import AHEAD, Files, OpenFile
from trainer.data.shards.index import ROW_ID, Column, Index, Shard
from trainer.errors import UserError

_ALIKE = {"columns": "made of", "group_by": "grouped by", "standardised": "standardised by"}


class ConcatenatedFiles:
    """The `Files` of one split of several folders. ``first_ids``: what each folder's row ids count on from.

    Raises UserError, when their index is asked for, where two folders are the same or their columns are not.
    """

    def __init__(self, folders: Sequence[Files], first_ids: Sequence[int]):
        self.folders, self.first_ids = folders, first_ids

    @property
    def place(self) -> str:
        return f"[{', '.join(self.places)}]"

    @property
    def places(self) -> list[str]:
        return [folder.place for folder in self.folders]

    @property
    def far(self) -> bool:
        return any(folder.far for folder in self.folders)

    @property
    def room(self) -> float:
        return min(folder.room for folder in self.folders)

    def exists(self) -> bool:
        return all(folder.exists() for folder in self.folders)

    def index(self) -> Index:
        return self.join([files.index() for files in self.folders])

    def join(self, indexes: Sequence[Index]) -> Index:
        """`index`, from what those of the folders say."""
        return joined([(_folder(files.place), index) for files, index in zip(self.folders, indexes)], self.first_ids)

    def path_of(self, shard: Shard) -> str:
        folder, own = self._own(shard)
        return folder.path_of(own)

    def check(self, shard: Shard) -> None:
        folder, own = self._own(shard)
        folder.check(own)

    def open(self, shard: Shard) -> OpenFile:
        folder, own = self._own(shard)
        return folder.open(own)

    def want(self, shards: Iterable[Shard]) -> None:
        for shard in islice(shards, AHEAD):
            folder, own = self._own(shard)
            folder.want([own])

    def quiet(self, shard: Shard) -> float:
        folder, own = self._own(shard)
        return folder.quiet(own)

    def renew(self, shard: Shard) -> bool:
        folder, own = self._own(shard)
        return folder.renew(own)

    def _own(self, shard: Shard) -> tuple[Files, Shard]:
        """The folder of a shard, and the shard by the name that it has there."""
        number, _, name = shard.name.partition("-")
        return self.folders[int(number)], replace(shard, name=name)


def _folder(place: str) -> str:
    """What the user packed: the folder of both splits."""
    return re.sub("/(train|held_out)$", "", place)


def first_ids_of(indexes: Iterable[Index]) -> list[int]:
    """What the row ids of each folder count on from: the rows of the sources before."""
    rows = [int(index.meta.get("source_rows", index.num_rows)) for index in indexes]
    return list(accumulate(rows, initial=0))[:-1]


def joined(indexes: Sequence[tuple[str, Index]], first_ids: Sequence[int]) -> Index:
    """The index of all rows of the folders at the given places; shard NAME of the third is `2-NAME`.

    Raises UserError where two folders are the same, or the columns of one are not those of the first.
    """
    (place, first), *others = indexes
    seen = {first.digest: place}
    for other, index in others:
        if index.digest in seen:
            raise UserError(f"{other} holds the same shards as {seen[index.digest]}: name every folder once.")
        seen[index.digest] = other
        _check_alike(place, first, other, index)
    shards: list[Shard] = []
    for number, ((_, index), first_id) in enumerate(zip(indexes, first_ids)):
        for shard, numbers in zip(index.shards, index.block_numbers):
            own = replace(shard, name=f"{number}-{shard.name}", numbers=tuple(numbers), first_id=first_id)
            shards.append(own)
    columns = tuple(_column([index.column(column.name) for _, index in indexes], indexes) for column in first.columns)
    totals = {name: sum(index.meta.get(name, 0) for _, index in indexes) for name in ("source_rows", "dropped")}
    sources = ", ".join(str(index.meta.get("source", place)) for place, index in indexes)
    made = Index(columns, tuple(shards), first.seed, first.split, {**first.meta, **totals, "source": sources})
    made.__dict__["digest"] = hashlib.sha256("".join(seen).encode()).hexdigest()  # that of the JSON takes seconds
    return made


def _check_alike(place: str, first: Index, other: str, index: Index) -> None:
    def refuse(what: str) -> UserError:
        return _other(what, place, other)

    ours, theirs = ({column.name: column for column in each.columns} for each in (first, index))
    for name in [*ours, *theirs]:
        if name not in ours or name not in theirs:
            has, lacks = (other, place) if name in theirs else (place, other)
            raise refuse(f'{has} has a column "{name}" and {lacks} has none')
        a, b = ours[name], theirs[name]
        for what in ("kind", "dtype", "shape"):
            if getattr(a, what) != getattr(b, what):
                raise refuse(
                    f'column "{name}" has {what} {getattr(a, what)} in {place} and {getattr(b, what)} in {other}'
                )
        if (a.vocabulary is None) != (b.vocabulary is None):
            raise refuse(f'column "{name}" holds words in one of {place} and {other}, and numbers in the other')
    for key, words in _ALIKE.items():
        was, now = (_by_column(each.meta.get(key)) for each in (first, index))
        for name in [name for name in {**was, **now} if was.get(name) != now.get(name)]:
            raise refuse(f"{name} {words} {_brief(was.get(name))} in {place} and {_brief(now.get(name))} in {other}")
    if (was_drawn := _drawn(first)) != (now_drawn := _drawn(index)):
        raise refuse(
            f"{was_drawn} was held out of {place} and {now_drawn} of {other}, so that what belongs together may lie on "
            "both sides"
        )


def _drawn(index: Index) -> str:
    """What was drawn for the held-out side: values of a column, with all their rows, or single rows."""
    by, share = index.meta.get("split_by") or index.meta.get("group_by"), index.meta.get("held_out")
    if not by or share is None:
        return "single rows"
    return f"{share:g} of {by} (seed {index.seed})" if share else "nothing"


def _other(what: str, place: str, other: str) -> UserError:
    return UserError(f"{what}: pack the table of {other} again with svi shard like={place}.")


def _by_column(given: Any) -> dict[str, Any]:
    """What `Index.meta` says, by column; of the table as a whole where it does not tell columns."""
    return given if isinstance(given, dict) else {"the table is": given} if given else {}


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _column(same: Sequence[Column], indexes: Sequence[tuple[str, Index]]) -> Column:
    """A column of all folders: the longest of the lists of words, and the statistics of all rows.

    Raises UserError where the lists do not begin alike.
    """
    rows = [_described_rows(index, column.name) for (_, index), column in zip(indexes, same)]
    lists = [list(column.vocabulary or ()) for column in same]
    longest = max(range(len(lists)), key=lambda number: len(lists[number]))
    for number in range(len(lists)):  # each begins like the longest, so like any other
        count = len(lists[number])
        if lists[longest][:count] != lists[number][:count]:
            a, b = sorted((longest, number))
            code = next(code for code, (one, other) in enumerate(zip(lists[a], lists[b])) if one != other)
            place, other = indexes[a][0], indexes[b][0]
            what = f'code {code} of column "{same[0].name}" is "{lists[a][code]}" in {place} and "{lists[b][code]}"'
            raise _other(f"{what} in {other}", place, other)
    statistics = _statistics([column.statistics for column in same], rows)
    return replace(same[0], vocabulary=same[longest].vocabulary, statistics=statistics)


def _described_rows(index: Index, name: str) -> float:
    """Over how many rows of the source the statistics of a column are: with groups, not over what fills them up."""
    length = next((column for column in index.columns if column.name == "length"), None)
    if not index.meta.get("group_by") or name in ("length", ROW_ID) or length is None or length.statistics is None:
        return index.num_rows
    mean: float = length.statistics["mean"]
    return index.num_rows * mean


def _statistics(parts: Sequence[dict[str, Any] | None], rows: Sequence[float]) -> dict[str, Any] | None:
    """Mean, population sd, min and max of rows in several parts, from those of the parts."""
    told = [part for part in parts if part is not None]
    if len(told) < len(parts):
        return None
    mean, sd, low, high = (np.array([part[name] for part in told], np.float64) for name in ("mean", "sd", "min", "max"))
    share = (np.array(rows, np.float64) / math.fsum(rows)).reshape(-1, *[1] * (mean.ndim - 1))
    centre = (share * mean).sum(0)
    spread = np.sqrt((share * (sd**2 + (mean - centre) ** 2)).sum(0))
    found = {"mean": centre, "sd": spread, "min": low.min(0), "max": high.max(0)}
    return {name: values.tolist() for name, values in found.items()}
