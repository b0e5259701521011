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

from trainer.data.packing.emit import SIDES, Cut, first_of_groups
from trainer.data.packing.ingest import WEIGHT, Scatter, Table, Tally, check_rounding, check_rows, total
from trainer.data.packing.partial import partial_folder
from trainer.data.packing.running_moments import RunningMoments
from trainer.data.packing.runs import Runs, RunsFile
from trainer.data.packing.settle import Packing, settle
from trainer.data.packing.shuffle import CELLS, PLACE
from trainer.data.packing.workers import Progress, default_workers
from trainer.data.shards.index import Index, Shard, write_index
from trainer.data.sources.source import Source
from trainer.errors import UserError

OnProgress = Callable[[int, int | None], None]
Made = tuple[Shard, dict[str, RunningMoments]]
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

    ``options``: those of `Packing`. ``workers``: threads, the cores there are when None, 1 for a small table.
    ``memory_bytes`` bounds the rows that are held at once (not a batch of each worker as it is read, 4 MB or a row
    group of Parquet, nor the vocabularies, nor a group that is larger by itself, nor two bytes a row).

    ``Column.statistics`` holds "mean", "sd" (population), "min" and "max" of the training rows as stored, per element,
    from one float64 pass; None for codes of text and for "row_id", the row number in the source, from 0 (of a group:
    of its first row). ``progress(rows_done, rows_total)`` counts either pass for half.

    ``out`` appears whole or not at all. Raises UserError for an ``out`` that exists (unless ``overwrite``, which only
    replaces a packed folder), a disk that is full, no training rows, and all that `Packing` and `settle` refuse.
    """
    check_resources(memory_bytes, workers)
    with partial_folder(Path(out), overwrite) as folder:
        opened, table = settle(source, Packing(**options))
        workers = workers or default_workers(table.rows * table.row_bytes)
        shown = Progress(progress, table.rows, workers)
        share = memory_share(memory_bytes, workers, table)
        in_memory = table.rows * table.row_bytes + 4 * workers * share <= memory_bytes
        rows = folder / "rows"
        runs = Runs(table.recipes) if in_memory else RunsFile(table.recipes, rows)
        try:
            tally = total(scatter(opened, table, runs, range(len(opened.piece_rows)), share, shown))
            check_rows(tally, table.name)
            check_rounding(table, tally)
            table = without_spared(table, tally)
            cut = cut_of(table, tally, runs, share, shown)
            shown.tick(tally.dropped)
            tasks = cut.tasks
            for side in {side for side, _ in tasks}:
                (folder / SIDES[side]).mkdir()

            def make(task: tuple[int, int]) -> Made:
                return cut.make(*task, folder / SIDES[task[0]], shown.tick)

            made = shown.run(make, tasks)
        finally:
            if isinstance(runs, RunsFile):
                runs.close({})
                rows.unlink()
        return write_indexes(cut, folder, [[each for task, each in zip(tasks, made) if task[0] == s] for s in (0, 1)])


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
        raise UserError(f"workers={workers} is too few: give a positive number, or null for all cores.")


def memory_share(memory_bytes: int, workers: int, table: Table) -> int:
    """Bytes of a run, and of what is loaded at once: a worker holds about four times as much.

    A load reads a stretch of every run, share² / table long: large ones for large tables, and what fits the cache else.
    """
    wanted = max(_LEAST_SHARE, math.isqrt(_STRETCH * table.rows * table.row_bytes))
    return max(1, min(wanted, memory_bytes // (4 * workers)))


def scatter(source: Source, table: Table, runs: Runs, pieces: range, share: int, shown: Progress) -> list[Tally]:
    """The first pass over some of the pieces; what each had."""
    return shown.run(Scatter(source, table, runs, share, shown.tick).piece, pieces)


def cut_of(table: Table, tally: Tally, runs: Runs, share: int, shown: Progress) -> Cut:
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
        for cells, most in shown.run(groups, spans):
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
