"""Packing: a source becomes `out/train/` and `out/held_out/`, split, shuffled and described, in bounded memory.

Pass one (`ingest`) reads the source piece by piece, checks it, and keeps its rows in runs ordered by cells (`runs`);
pass two (`emit`) sorts the cells and writes shards. Both on several threads. A row's place and its side of the split
are hashes of its row number, or of its group's key: the same seed gives the same bytes whatever the memory and the
workers, and a row keeps its side when rows are appended or columns change. `parts` does it in several jobs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.packing.apply import options_like
from trainer.data.packing.columns import ColumnMap
from trainer.data.packing.emit import SIDES, Cut, first_of_groups
from trainer.data.packing.ingest import WEIGHT, Scatter, Table, Tally, check_rounding, check_rows, describe, total
from trainer.data.packing.partial import partial_folder
from trainer.data.packing.running_moments import RunningMoments
from trainer.data.packing.runs import Runs, RunsFile
from trainer.data.packing.shuffle import CELLS, PLACE
from trainer.data.packing.workers import Progress, default_workers
from trainer.data.shards.folder import open_split
from trainer.data.shards.index import Index, Shard, write_index
from trainer.data.sources.source import Source
from trainer.errors import UserError

OnProgress = Callable[[int, int | None], None]
Made = tuple[Shard, dict[str, RunningMoments]]
_HELD_OUT, _FLOATS = 0.1, ("float32", "float64")
_LEAST_SHARE, _STRETCH = 1 << 23, 1 << 18  # bytes: of a run that need not be smaller, and of what is read of one


def pack(
    source: Source | str | Path,
    out: str | Path,
    *,
    memory_bytes: int = 1 << 30,
    workers: int | None = None,
    overwrite: bool = False,
    progress: OnProgress | None = None,
    **options: Any,
) -> tuple[Index, Index | None]:
    """Packs ``source`` (or the files of a path or glob) into the folder ``out``; returns the indexes of its splits.

    ``options``: those of `settle`. ``workers``: threads, the cores there are when None, 1 for a small table.
    ``memory_bytes`` bounds the rows that are held at once (not a batch of each worker as it is read, 4 MB or a row
    group of Parquet, nor the vocabularies, nor a group that is larger by itself, nor two bytes a row).

    ``Column.statistics`` holds "mean", "sd" (population), "min" and "max" of the training rows as stored, per element,
    from one float64 pass; None for codes of text and for "row_id", the row number in the source, from 0 (of a group:
    of its first row). ``progress(rows_done, rows_total)`` counts either pass for half.

    ``out`` appears whole or not at all. Raises UserError for an ``out`` that exists (unless ``overwrite``, which only
    replaces a packed folder), a disk that is full, no training rows, and all that `settle` refuses.
    """
    check_resources(memory_bytes, workers)
    with partial_folder(Path(out), overwrite) as folder:
        opened, table = settle(source, **options)
        workers = workers or default_workers(table.rows * table.row_bytes)
        shown = Progress(progress, table.rows)
        share = memory_share(memory_bytes, workers, table)
        in_memory = table.rows * table.row_bytes + 4 * workers * share <= memory_bytes
        rows = folder / "rows"
        runs = Runs(table.recipes) if in_memory else RunsFile(table.recipes, rows)
        try:
            tally = total(scatter(opened, table, runs, range(len(opened.piece_rows)), share, workers, shown))
            check_rows(tally, table.name)
            check_rounding(table, tally)
            table = without_spared(table, tally)
            cut = cut_of(table, tally, runs, share, workers, shown)
            shown.tick(tally.dropped)
            tasks = cut.tasks
            for side in {side for side, _ in tasks}:
                (folder / SIDES[side]).mkdir()

            def make(task: tuple[int, int]) -> Made:
                return cut.make(*task, folder / SIDES[task[0]], shown.tick)

            made = shown.run(make, tasks, workers)
        finally:
            if isinstance(runs, RunsFile):
                runs.close({})
                rows.unlink()
        return write_indexes(cut, folder, [[each for task, each in zip(tasks, made) if task[0] == s] for s in (0, 1)])


def settle(
    source: Source | str | Path,
    *,
    columns: ColumnMap | None = None,
    held_out: float = _HELD_OUT,
    seed: int = 0,
    shard_bytes: int = 1 << 27,
    block_rows: int = 8192,
    missing: str = "error",
    standardize: Sequence[str] = (),
    standardise: Sequence[str] = (),
    group_by: str | None = None,
    split_by: str | None = None,
    split_time: str | None = None,
    split_after: Any = None,
    float_dtype: str | None = None,
    categories: Sequence[str] = (),
    spare: bool = False,
    like: str | Path | Sequence[str | Path] | None = None,
) -> tuple[Source, Table]:
    """Opens ``source`` and says what is to become of it.

    ``columns``: shard column -> a source column [B], or a list of them, stacked to [B, len] (see `columns`); None:
        every source column under its own name.
    ``held_out``: the chance of a row (of a group, with ``group_by``) to be held out, by a hash of ``seed`` and its row
        number (its key). Where no row was drawn there is no `out/held_out`, and None is returned for it.
    ``split_by``: a source column of integers or text: ``held_out`` is the chance of each of its values, with all its
        rows. ``split_time``: a column of numbers, times or text, of which the rows at ``split_after`` or later are held
        out, whatever ``held_out`` says.
    ``missing``: "error", or "drop" for rows with a null or NaN, counted in ``Index.meta["dropped"]``.
    ``standardize`` (or ``standardise``): float columns to store as (x - mean) / sd of the training rows, per element,
        from float64; ``Index.meta["standardised"]`` keeps both. A constant element stays as it is (mean 0, sd 1).
    ``group_by``: a source column of integers or text. Rows that share its value become one row, in source order: row
        shape [...] becomes [T, ...], padded by repeating the group's last row; the int64 column "length" counts the
        real ones, and statistics are over these, per element of a source row.
    ``float_dtype``: of floats; None: float32, or float64 for a column of which float32 would round a value by more than
        1e-6 of its sd.
    ``categories``: columns of text in which numbers are names. Of others, ``Index.meta["mixed"]`` keeps what is wrong
        with one whose words are numbers, some or all.
    ``spare``: leave out what cannot be packed; ``Index.meta["spared"]`` keeps why, by column.
    ``like``: a packed folder (or several, as for `open_split`) whose columns, codes, shifts, groups and split this
        table gets too, in place of the options that say them; words that it had not get the next codes.
    A block has fewer than ``block_rows`` rows where these would exceed ``shard_bytes``.

    Raises UserError for options out of range or at odds, and all that `open_source` and `recipes` refuse.
    """
    for good, sentence in (
        (0 <= held_out < 1, f"held_out={held_out} is no fraction: give a number from 0 up to, but not including, 1."),
        (0 <= seed < 2**63, f"seed={seed} is out of range: give an integer from 0 to 2**63 - 1."),
        (shard_bytes >= 1, f"shard_bytes={shard_bytes} holds nothing: give a positive number."),
        (block_rows >= 1, f"block_rows={block_rows} holds nothing: give a positive number."),
        (missing in ("error", "drop"), f"missing={missing} is unknown: write missing=error or missing=drop."),
        (float_dtype in (None, *_FLOATS), f"float_dtype={float_dtype} is unknown: write float32 or float64."),
    ):
        if not good:
            raise UserError(sentence)
    _check_split(group_by, split_by, split_time, split_after)
    settled: dict[str, Any] = {
        "columns": columns,
        "group_by": group_by,
        "standardize": (*standardize, *standardise),
        "float_dtype": float_dtype,
        "categories": categories,
        "spare": spare,
        "held_out": held_out,
        "seed": seed,
        "split_by": split_by,
        "split_time": split_time,
        "split_after": split_after,
    }
    if like is not None:
        settled |= _like(like, settled)
    return describe(source, **settled, drop=missing == "drop", shard_bytes=shard_bytes, block_rows=block_rows)


def _like(place: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The options of the table packed at ``place``. Raises UserError for a given one that says otherwise."""
    folder = open_split(place, "train")
    if folder is None:
        raise UserError(f"like={place} is no shard folder.")
    index = folder.index
    found, usual = options_like(index), {"held_out": _HELD_OUT, "seed": 0}
    for name in ("columns", "standardize", "categories", *found):
        value = given[name]
        if value not in (None, (), [], {}, usual.get(name), found.get(name)):
            option = f"split.{name.removeprefix('split_')}" if name.startswith(("split_", "held")) else name
            raise UserError(f"{option}={value} has no place beside like={place}, which says that: leave it out.")
    shifted = [index.column(name).dtype for name in index.meta.get("standardised", {})]
    return {
        **found,
        "columns": None,
        "standardize": tuple(index.meta.get("standardised", {})),
        "float_dtype": shifted[0] if shifted else given["float_dtype"],
        "like": replace(index, shards=()),
    }


def without_spared(table: Table, tally: Tally) -> Table:
    """``table`` without the columns of which the first pass found that they have to be left out."""
    if table.spared is None:
        return table
    kept = [recipe for recipe in table.recipes if recipe.name not in tally.spared]
    mixed = {name: sentence for name, sentence in table.mixed.items() if name not in tally.spared}
    return replace(table, recipes=kept, mixed=mixed, spared={**table.spared, **tally.spared})


def check_resources(memory_bytes: int, workers: int | None) -> None:
    """Raises UserError for too little of them."""
    if memory_bytes < 1 << 16:
        raise UserError(f"memory_bytes={memory_bytes} is too little to sort in: give at least 65536.")
    if workers is not None and workers < 1:
        raise UserError(f"workers={workers} do nothing: give a positive number, or null for the cores there are.")


def _check_split(group_by: str | None, by: str | None, time: str | None, after: Any) -> None:
    if (time is None) != (after is None):
        raise UserError("split.time and split.after belong together: the column, and from where on rows are held out.")
    for name, value in (("group_by", group_by), ("split.by", by)):
        if value is not None and time is not None:
            raise UserError(f"{name}={value} and split.time={time} are two splits: give one of them.")
    if group_by is not None and by is not None:
        raise UserError(f"split.by={by} has no place beside group_by={group_by}: groups are held out whole already.")


def memory_share(memory_bytes: int, workers: int, table: Table) -> int:
    """Bytes of a run, and of what is loaded at once: a worker holds about four times as much.

    A load reads a stretch of every run, share² / table long: large ones for large tables, and what fits the cache else.
    """
    wanted = max(_LEAST_SHARE, math.isqrt(_STRETCH * table.rows * table.row_bytes))
    return max(1, min(wanted, memory_bytes // (4 * workers)))


def scatter(
    source: Source, table: Table, runs: Runs, pieces: range, share: int, workers: int, shown: Progress
) -> list[Tally]:
    """The first pass over some of the pieces; what each had."""
    return shown.run(Scatter(source, table, runs, share, shown.tick).piece, pieces, workers)


def cut_of(table: Table, tally: Tally, runs: Runs, share: int, workers: int, shown: Progress) -> Cut:
    """How the rows become shards; with groups, their places are read once, to count them."""
    cut = Cut(table, tally, runs, runs.counts, None, share)
    if table.group is None:
        return cut

    def groups(span: tuple[int, int]) -> tuple[np.ndarray, int]:
        places = np.sort(runs.load(*span, names=[PLACE])[PLACE])
        firsts = first_of_groups(places)
        cells = np.bincount((places[firsts] >> np.uint64(49)).astype(np.int64), minlength=CELLS)
        return cells, int(np.diff(firsts, append=len(places)).max(initial=0))

    units, longest = np.zeros(2 * CELLS, np.int64), 0
    for side in (0, 1):
        spans = list(cut.spans(side * CELLS, (side + 1) * CELLS, 32))
        for cells, most in shown.run(groups, spans, workers):
            units[side * CELLS : (side + 1) * CELLS] += cells
            longest = max(longest, most)
    if table.longest is not None:
        if longest > table.longest:
            raise UserError(
                f"'{table.name}' has a group of {longest:,} rows, and the table that it is to be like has groups of "
                f"{table.longest:,} at most: pack both together."
            )
        longest = table.longest
    return replace(cut, units=units, longest=longest)


def write_indexes(cut: Cut, folder: Path, made: Sequence[Sequence[Made]]) -> tuple[Index, Index | None]:
    """The indexes of both sides, in their folders; the last thing to be written."""
    train, held = made
    moments = {name: RunningMoments() for name in cut.described}
    for _, found in train:
        for name, each in moments.items():
            each.merge(found[name])
    statistics = {name: each.statistics() for name, each in moments.items()}
    statistics |= {name: cut.tally.moments[name].statistics(*shift) for name, shift in cut.shifts.items()}
    columns = tuple(replace(column, statistics=statistics.get(column.name)) for column in cut.columns)
    indexes = []
    for name, shards in zip(SIDES, made):
        index = Index(columns, tuple(shard for shard, _ in shards), cut.table.seed, name, _meta(cut))
        if shards:
            write_index(folder / name, index)
        indexes.append(index)
    return indexes[0], indexes[1] if held else None


def _meta(cut: Cut) -> dict[str, Any]:
    table = cut.table
    told = {"mixed": table.mixed, "spared": table.spared, WEIGHT: table.weighted}
    return {
        **{name: sentences for name, sentences in told.items() if sentences},
        "source": table.name,
        "source_rows": table.rows,
        "dropped": cut.tally.dropped,
        "columns": {made.name: list(made.parts) if made.stacked else made.parts[0] for made in table.recipes},
        "held_out": table.split.share if table.split.time is None else None,
        "split_by": table.split.by.parts[0] if table.split.by else None,
        "split_time": table.split.time and [table.split.time, str(table.split.after)],
        "group_by": table.group.parts[0] if table.group else None,
        "standardised": {name: {"mean": m.tolist(), "sd": sd.tolist()} for name, (m, sd) in cut.shifts.items()},
    }
