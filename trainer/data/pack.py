"""Packing: a source becomes `out/train/` and `out/held_out/`, split, shuffled and described, in bounded memory.

Pass one (`ingest`) reads the source, checks it, and scatters its rows into buckets (`shuffle`); pass two sorts each
bucket and writes blocks. A row's place and its side of the split are hashes of its row number, or of its group's key:
the same seed gives the same bytes whatever the memory, and a row keeps its side when rows are appended or columns
change.

Shapes: B rows of a bucket, U units (rows, or groups of rows) of it, T rows of the longest group.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.columns import ColumnMap
from trainer.data.index import ROW_ID, Column, Index, write_index
from trainer.data.ingest import Table, Tally, describe, scatter
from trainer.data.moments import Moments
from trainer.data.partial import partial_folder
from trainer.data.shards import ShardWriter
from trainer.data.shuffle import PLACE, Buckets
from trainer.data.sources import Source
from trainer.errors import UserError

Block = dict[str, np.ndarray]
Shifts = Mapping[str, tuple[np.ndarray, np.ndarray]]  # what standardising subtracts and divides by


def pack(
    source: Source | str | Path,
    out: str | Path,
    *,
    columns: ColumnMap | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    shard_bytes: int = 1 << 27,
    block_rows: int = 8192,
    memory_bytes: int = 1 << 30,
    missing: str = "error",
    standardise: Sequence[str] = (),
    group_by: str | None = None,
    split_by: str | None = None,
    split_time: str | None = None,
    split_after: Any = None,
    float_dtype: str = "float32",
    overwrite: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> tuple[Index, Index | None]:
    """Packs ``source`` (or the files of a path or glob) into the folder ``out``; returns the indexes of its splits.

    ``columns``: shard column -> a source column [B], or a list of them, stacked to [B, len] (see `columns`); None:
        every source column under its own name.
    ``held_out``: the chance of a row (of a group, with ``group_by``) to be held out, by a hash of ``seed`` and its row
        number (its key). Where no row was drawn there is no `out/held_out`, and None is returned for it.
    ``split_by``: a source column of integers or text: ``held_out`` is the chance of each of its values, with all its
        rows. ``split_time``: a column of numbers, times or text, of which the rows at ``split_after`` or later are held
        out, whatever ``held_out`` says.
    ``missing``: "error", or "drop" for rows with a null or NaN, counted in ``Index.meta["dropped"]``.
    ``standardise``: float columns to store as (x - mean) / sd of the training rows, per element, from float64;
        ``Index.meta["standardised"]`` keeps both. A constant element stays as it is (mean 0, sd 1).
    ``group_by``: a source column of integers or text. Rows that share its value become one row, in source order: row
        shape [...] becomes [T, ...], padded by repeating the group's last row; the int64 column "length" counts the
        real ones, and statistics are over these, per element of a source row.
    ``memory_bytes`` bounds the rows that are sorted at once (not a batch as it is read, 4 MB or a row group of
        Parquet, nor the vocabularies, nor a group that is larger by itself).
    A block has fewer than ``block_rows`` rows where these would exceed ``shard_bytes``.

    ``Column.statistics`` holds "mean", "sd" (population), "min" and "max" of the training rows as stored, per element,
    from one float64 pass; None for codes of text and for "row_id", the row number in the source, from 0 (of a group:
    of its first row). ``progress(rows_done, rows_total)`` counts either pass for half.

    ``out`` appears whole or not at all. Raises UserError for an ``out`` that exists (unless ``overwrite``, which only
    replaces a packed folder), a disk that is full, no training rows, and all that `open_source` and `recipes` refuse.
    """
    _check(held_out, seed, shard_bytes, block_rows, memory_bytes, missing, float_dtype)
    _check_split(group_by, split_by, split_time, split_after)
    with partial_folder(Path(out), overwrite) as folder, contextlib.ExitStack() as opened:
        table = describe(
            source, columns, group_by, standardise, float_dtype, held_out, seed, split_by, split_time, split_after
        )
        tick = _ticker(progress, table.source.num_rows)
        buckets = Buckets(folder / "buckets", table.record, table.source.num_rows, memory_bytes)
        tally = scatter(table, buckets, drop=missing == "drop", tick=tick)
        lengths = _lengths(table, buckets) if table.group else None
        shifts = {name: tally.moments[name].shift() for name in standardise}
        stored = _stored(table, tally, lengths, shifts, float_dtype)
        row_bytes = sum(np.dtype(column.dtype).itemsize * math.prod(column.shape) for column in stored)
        block_rows = min(block_rows, max(1, shard_bytes // row_bytes))
        splits = [_Split(folder / name, stored, shard_bytes, block_rows) for name in ("train", "held_out")]
        for split in splits:
            opened.callback(split.abort)
        tick(tally.dropped)
        _emit(table, buckets, splits, lengths, shifts, tick)
        buckets.remove()
        train, held = (split.close(seed, _meta(table, tally, shifts)) for split in splits)
    assert train is not None  # `scatter` saw a training row
    return train, held


def _check(
    held_out: float, seed: int, shard_bytes: int, block_rows: int, memory_bytes: int, missing: str, float_dtype: str
) -> None:
    for good, sentence in (
        (0 <= held_out < 1, f"held_out={held_out} is no fraction: give a number from 0 up to, but not including, 1."),
        (0 <= seed < 2**63, f"seed={seed} is out of range: give an integer from 0 to 2**63 - 1."),
        (shard_bytes >= 1, f"shard_bytes={shard_bytes} holds nothing: give a positive number."),
        (block_rows >= 1, f"block_rows={block_rows} holds nothing: give a positive number."),
        (memory_bytes >= 1 << 16, f"memory_bytes={memory_bytes} is too little to sort in: give at least 65536."),
        (missing in ("error", "drop"), f"missing={missing} is unknown: write missing=error or missing=drop."),
        (float_dtype in ("float32", "float64"), f"float_dtype={float_dtype} is unknown: write float32 or float64."),
    ):
        if not good:
            raise UserError(sentence)


def _check_split(group_by: str | None, by: str | None, time: str | None, after: Any) -> None:
    if (time is None) != (after is None):
        raise UserError("split.time and split.after belong together: the column, and from where on rows are held out.")
    for name, value in (("group_by", group_by), ("split.by", by)):
        if value is not None and time is not None:
            raise UserError(f"{name}={value} and split.time={time} are two splits: give one of them.")
    if group_by is not None and by is not None:
        raise UserError(f"split.by={by} has no place beside group_by={group_by}: groups are held out whole already.")


def _ticker(progress: Callable[[int, int | None], None] | None, total: int) -> Callable[[int], None]:
    """Counts the rows of both passes and reports half the count."""
    done = 0

    def tick(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None and rows:
            progress(done // 2, total)

    return tick


class _Split:
    """The shards of one side of the split: every block has ``block_rows`` rows but the last."""

    def __init__(self, folder: Path, columns: tuple[Column, ...], shard_bytes: int, block_rows: int):
        self.block_rows = block_rows
        self._folder, self._columns, self._shard_bytes = folder, columns, shard_bytes
        self._writer: ShardWriter | None = None
        self._carried: Block = {}

    def add(self, block: Block) -> None:
        """Writes what fills a block together with what was carried, and carries the rest."""
        if self._carried:
            block = {name: np.concatenate([self._carried[name], values]) for name, values in block.items()}
        while len(block[ROW_ID]) >= self.block_rows:
            self._write({name: values[: self.block_rows] for name, values in block.items()})
            block = {name: values[self.block_rows :] for name, values in block.items()}
        self._carried = block if len(block[ROW_ID]) else {}

    def close(self, seed: int, meta: dict[str, Any]) -> Index | None:
        """Writes what was carried, and the index; None, and no folder, where there was no row."""
        if self._carried:
            self._write(self._carried)
        if self._writer is None:
            return None
        index = Index(self._columns, self._writer.close(), seed, self._folder.name, meta)
        write_index(self._folder, index)
        return index

    def abort(self) -> None:
        """Closes what is open."""
        if self._writer is not None:
            self._writer.abort()

    def _write(self, block: Block) -> None:
        if self._writer is None:
            self._folder.mkdir()
            self._writer = ShardWriter(self._folder, self._columns, self._shard_bytes)
        self._writer.write(block)


def _units(table: Table, bucket: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The rows of a bucket by place [B]; per unit [U] its first row in that order, its rows, and if it is held out."""
    places = np.ascontiguousarray(bucket[PLACE])
    order = np.argsort(places, kind="stable")
    starts = np.arange(len(order))
    if table.group:
        places = places[order]
        starts = np.flatnonzero(np.concatenate([[True], places[1:] != places[:-1]]))
    return order, starts, np.diff(starts, append=len(order)), table.split.is_held_out(bucket[PLACE][order[starts]])


def _lengths(table: Table, buckets: Buckets) -> tuple[int, Moments]:
    """The rows of the longest group, and the moments of the training groups' rows."""
    longest, moments = 0, Moments()
    for bucket in buckets:
        _, _, rows, held = _units(table, bucket)
        longest = max(longest, int(rows.max()))
        moments.add(rows[~held])
    return longest, moments


def _stored(
    table: Table, tally: Tally, lengths: tuple[int, Moments] | None, shifts: Shifts, float_dtype: str
) -> tuple[Column, ...]:
    """The columns of the shards."""
    columns = []
    for recipe in table.recipes:
        shape = recipe.shape if lengths is None else (lengths[0], *recipe.shape)
        dtype = float_dtype if recipe.name in shifts else recipe.dtype
        moments = tally.moments.get(recipe.name)
        statistics = None if moments is None else moments.statistics(*shifts.get(recipe.name, (0.0, 1.0)))
        columns.append(Column(recipe.name, dtype, shape, recipe.vocabulary, statistics))
    if lengths is not None:
        columns.append(Column("length", "int64", (), None, lengths[1].statistics()))
    return (*columns, Column(ROW_ID, "int64", (), None, None))


def _meta(table: Table, tally: Tally, shifts: Shifts) -> dict[str, Any]:
    return {
        "source": table.source.name,
        "source_rows": table.source.num_rows,
        "dropped": tally.dropped,
        "columns": {made.name: list(made.parts) if made.stacked else made.parts[0] for made in table.recipes},
        "held_out": table.split.share if table.split.time is None else None,
        "split_by": table.split.by.parts[0] if table.split.by else None,
        "split_time": table.split.time and [table.split.time, str(table.split.after)],
        "group_by": table.group.parts[0] if table.group else None,
        "standardised": {name: {"mean": m.tolist(), "sd": sd.tolist()} for name, (m, sd) in shifts.items()},
    }


def _emit(
    table: Table,
    buckets: Buckets,
    splits: Sequence[_Split],
    lengths: tuple[int, Moments] | None,
    shifts: Shifts,
    tick: Callable[[int], None],
) -> None:
    """Sorts every bucket and hands its units to their side of the split, a block's worth at a time."""
    for bucket in buckets:
        order, starts, rows, held = _units(table, bucket)
        for split, units in zip(splits, (np.flatnonzero(~held), np.flatnonzero(held))):
            for first in range(0, len(units), split.block_rows):
                chosen = units[first : first + split.block_rows]
                places = starts[chosen]
                if lengths is not None:
                    places = places[:, None] + np.minimum(np.arange(lengths[0]), rows[chosen, None] - 1)
                taken = bucket.take(order[places])
                block = {recipe.name: taken[recipe.name] for recipe in table.recipes}
                for name, (mean, sd) in shifts.items():
                    block[name] = (block[name] - mean) / sd
                block[ROW_ID] = taken[ROW_ID]
                if lengths is not None:
                    block["length"], block[ROW_ID] = rows[chosen], taken[ROW_ID][:, 0]
                split.add(block)
                tick(int(rows[chosen].sum()))
