"""Packing in parts: several jobs, on one machine or many, pack one table together.

`OUT.parts/` is where they meet. Each part reads its share of the source's pieces into one file of runs. When all have,
any part makes its share of the shards when it is run again, and `finish` makes those that are missing, writes the
indexes and gives the folder its name. Every file takes its name when it is whole, so a job that was killed is run again
and does what is left of it; two that do the same write the same bytes.
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from trainer.data.packing.emit import SIDES, Cut
from trainer.data.packing.ingest import Table, Tally, check_rounding, check_rows, total
from trainer.data.packing.pack import (
    Made,
    OnProgress,
    check_resources,
    cut_of,
    memory_share,
    scatter,
    write_indexes,
)
from trainer.data.packing.partial import check_out, disk_of, is_whole
from trainer.data.packing.running_moments import RunningMoments
from trainer.data.packing.runs import ReadRuns, RunsFile, RunsTail, read_tail
from trainer.data.packing.settle import Packing, settle
from trainer.data.packing.workers import Progress, default_workers
from trainer.data.shards.files import read_index
from trainer.data.shards.index import Index, Shard
from trainer.data.sources.source import Source
from trainer.data.store import atomic_write, sync_folder
from trainer.errors import UserError


class PartOf(NamedTuple):
    """One of the parts of a table, as 3 of 16."""

    number: int
    """From 1."""
    parts: int


class Parts:
    """The parts of the table that becomes ``out``."""

    def __init__(self, out: str | Path):
        self.out = Path(out).absolute()
        self.folder = self.out.with_name(f"{self.out.name}.parts")
        self.packed = self.folder / "packed"
        """What will be ``out``."""

    def read(
        self,
        source: Source | str | Path,
        part: PartOf,
        *,
        memory_bytes: int = 1 << 30,
        workers: int | None = None,
        overwrite: bool = False,
        progress: OnProgress | None = None,
        **options: Any,
    ) -> int | None:
        """Reads a ``part``; returns its rows, or None where that was done before.

        The rest as for `pack`. Raises UserError for other options than those of the other parts.
        """
        number, parts = part
        if not 1 <= number <= parts:
            raise UserError(f"part={number}/{parts} is not a part: write part=1/{parts} to part={parts}/{parts}.")
        check_resources(memory_bytes, workers)
        with disk_of(self.out):
            check_out(self.out, overwrite)
            self.packed.mkdir(parents=True, exist_ok=True)
            name = str(source) if isinstance(source, str | Path) else source.name
            given = {"source": name, "parts": parts, **options}
            given = json.loads(json.dumps(given, default=str))
            known = self._plan()
            if known is not None and known["given"] == given and self._tail(number, known) is not None:
                return None
            opened, table = settle(source, Packing(**options))
            plan = {"given": given, "table": table.content()}
            if known is None:
                with atomic_write(self.folder / "plan.json") as file:
                    file.write(json.dumps(plan).encode())
            elif known != plan:
                raise UserError(
                    f"the parts in '{self.folder}' were given other options, or another table, than part {number}: "
                    "give all the same, or remove that folder to start over."
                )
            pieces = _share(opened.piece_rows, part)
            rows = sum(opened.piece_rows[piece] for piece in pieces)
            workers = workers or default_workers(rows * table.row_bytes)
            shown, share = Progress(progress, rows, workers, passes=1), memory_share(memory_bytes, workers, table)
            with self._temporary(f"part-{number}-of-{parts}") as path:
                runs = RunsFile(table.recipes, path)
                whole = None
                try:
                    tallies = scatter(opened, table, runs, pieces, share, shown)
                    about = {"plan": _digest(plan), "tallies": [tally.state() for tally in tallies]}
                    whole = self._part(part)
                finally:
                    runs.close(about if whole else {}, whole)
            sync_folder(self.folder)
            return rows

    def missing(self) -> list[int]:
        """The parts that are not read. Raises UserError where there are none at all."""
        plan = self._known()
        return [part for part in range(1, plan["given"]["parts"] + 1) if self._tail(part, plan) is None]

    def write(
        self,
        part: PartOf,
        *,
        memory_bytes: int = 1 << 30,
        workers: int | None = None,
        progress: OnProgress | None = None,
    ) -> int:
        """Makes the shards of a ``part``; returns how many there were to make."""
        number, parts = part
        with disk_of(self.out), self._cut(memory_bytes, workers) as (cut, workers):
            mine = slice(len(cut.tasks) * (number - 1) // parts, len(cut.tasks) * number // parts)
            return self._make(cut, cut.tasks[mine], workers, progress)

    def finish(
        self,
        *,
        memory_bytes: int = 1 << 30,
        workers: int | None = None,
        overwrite: bool = False,
        progress: OnProgress | None = None,
    ) -> tuple[Index, Index | None]:
        """Makes what is left, and ``out``; the indexes of its splits, as `pack`.

        Raises UserError for parts that are missing, by their numbers.
        """
        check_resources(memory_bytes, workers)
        with disk_of(self.out):
            if self.folder.is_dir() and not self.packed.is_dir() and is_whole(self.out):  # all but cleared
                shutil.rmtree(self.folder)
                held = self.out / SIDES[1]
                return read_index(self.out / SIDES[0]), read_index(held) if held.is_dir() else None
            check_out(self.out, overwrite)
            plan = self._known()
            missing, parts = self.missing(), plan["given"]["parts"]
            if missing:
                named = ", ".join(map(str, missing[:20])) + (", …" if len(missing) > 20 else "")
                raise UserError(
                    f"of the {parts} parts in '{self.folder}' these are missing: {named}; run each again with "
                    f"part=NUMBER/{parts}, then finish=true."
                )
            with self._cut(memory_bytes, workers) as (cut, workers):
                self._make(cut, cut.tasks, workers, progress)
                made = [[self._made(*task) for task in cut.tasks if task[0] == side] for side in (0, 1)]
                indexes = write_indexes(cut, self.packed, made)
            replaced = self.folder / "replaced"
            if self.out.exists():
                self.out.rename(replaced)
            self.packed.rename(self.out)
            sync_folder(self.out.parent)
            shutil.rmtree(self.folder)
        return indexes

    def _plan(self) -> dict[str, Any] | None:
        path = self.folder / "plan.json"
        return json.loads(path.read_bytes()) if path.is_file() else None

    def _known(self) -> dict[str, Any]:
        plan = self._plan()
        if plan is None:
            raise UserError(f"there are no parts in '{self.folder}': run svi shard part=1/N and the others first.")
        return plan

    def _part(self, part: PartOf) -> Path:
        return self.folder / f"part-{part.number}-of-{part.parts}.rows"

    def _tail(self, part: int, plan: dict[str, Any]) -> RunsTail | None:
        path = self._part(PartOf(part, plan["given"]["parts"]))
        if not path.exists():
            return None
        tail = read_tail(path)
        if tail.about["plan"] != _digest(plan):
            raise UserError(
                f"'{path}' was read with other options than the rest: remove it, and run part {part} again."
            )
        return tail

    @contextmanager
    def _cut(self, memory_bytes: int, workers: int | None) -> "Iterator[tuple[Cut, int]]":
        """How all the parts become shards, and the workers to make them."""
        plan = self._known()
        table = Table.of(plan["table"])
        tails = [tail for part in range(1, plan["given"]["parts"] + 1) if (tail := self._tail(part, plan))]
        tally = total(Tally.of(state) for tail in tails for state in tail.about["tallies"])
        check_rows(tally, table.name)
        check_rounding(table, tally)
        workers = workers or default_workers(table.rows * table.row_bytes)
        runs = ReadRuns(table.recipes, tails)
        try:
            yield (
                cut_of(table, tally, runs, memory_share(memory_bytes, workers, table), Progress(None, 0, workers)),
                workers,
            )
        finally:
            runs.close()

    def _make(self, cut: Cut, tasks: Sequence[tuple[int, int]], workers: int, progress: OnProgress | None) -> int:
        """Makes those of ``tasks`` that are not there."""
        left = [task for task in tasks if not self._record(*task).exists()]
        rows = cut.tally.training + cut.tally.held_out
        shown = Progress(progress, rows * len(left) // max(1, len(cut.tasks)), workers, passes=1)

        def make(task: tuple[int, int]) -> None:
            side, number = task
            with self._temporary(f"{SIDES[side]}-{number}") as folder:
                folder.mkdir()
                shard, moments = cut.make(side, number, folder, shown.tick)
                (self.packed / SIDES[side]).mkdir(exist_ok=True)
                os.replace(folder / shard.name, self.packed / SIDES[side] / shard.name)
            sync_folder(self.packed / SIDES[side])
            with atomic_write(self._record(side, number)) as file:
                record = {"shard": asdict(shard), "moments": {name: each.state() for name, each in moments.items()}}
                file.write(json.dumps(record).encode())

        shown.run(make, left)
        return len(left)

    def _record(self, side: int, number: int) -> Path:
        return self.folder / f"{SIDES[side]}-{number:06d}.json"

    def _made(self, side: int, number: int) -> Made:
        record = json.loads(self._record(side, number).read_bytes())
        shard: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in record["shard"].items()
        }
        for name in ("offsets", "xxh3", "entries", "widest"):
            shard[name] = {column: tuple(values) for column, values in shard[name].items()}
        return Shard(**shard), {name: RunningMoments.of(state) for name, state in record["moments"].items()}

    @contextmanager
    def _temporary(self, name: str) -> Iterator[Path]:
        """A name for a file or folder of this process, which is gone in the end; what a killed one left goes first."""
        for leftover in self.folder.glob(f".{name}.*"):
            _remove(leftover)
        path = self.folder / f".{name}.{socket.gethostname()}-{os.getpid()}"
        try:
            yield path
        finally:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _digest(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def _share(piece_rows: Sequence[int], part: PartOf) -> range:
    """The pieces of a part: neighbors, of about as many rows as the others'. A piece is where its middle lies."""
    rows, before, mine = sum(piece_rows), 0, []
    for number, count in enumerate(piece_rows):
        if (2 * before + count) * part.parts // (2 * rows) == part.number - 1:
            mine.append(number)
        before += count
    return range(mine[0], mine[-1] + 1) if mine else range(0)
