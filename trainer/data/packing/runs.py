"""Rows between the two passes: runs of rows ordered by their cells (`shuffle`), in memory or in a file.

A file of runs is written once, run by run, each a whole number of arrays, and ends with what is known of it: it has its
name only when it is whole. So a pass over any range of cells reads a few stretches of each run, whoever wrote them.

Shapes: B rows of a run.
"""

import json
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trainer.data.fields import CsrRows, RaggedRows, Rows, concatenate
from trainer.data.packing.columns import Recipe
from trainer.data.packing.shuffle import CELLS, PLACE, cells_of
from trainer.data.shards.index import ROW_ID
from trainer.errors import UserError

_CELL = "#cell"
_END = b"svi-run1"
_ALIGN = 64
_KEYS = (Recipe(PLACE, (), False, (), "uint64"), Recipe(ROW_ID, (), False, (), "int64"))


class Run(Protocol):
    """The rows of one run: their cells, uint16 [B] in order, and their arrays: of rows, of entries, or of where each
    row's entries begin (a value more than rows).
    """

    cells: np.ndarray

    def read(self, name: str, first: int, count: int, dtype: str, shape: tuple[int, ...] = ()) -> np.ndarray:
        """``count`` values [*shape] of an array, from number ``first`` on."""
        ...


class _InMemory:
    def __init__(self, cells: np.ndarray, arrays: dict[str, np.ndarray]):
        self.cells, self._arrays = cells, arrays

    def read(self, name: str, first: int, count: int, dtype: str, shape: tuple[int, ...] = ()) -> np.ndarray:
        return self._arrays[name][first : first + count]


class _InFile:
    def __init__(self, file: int, cells: np.ndarray, offsets: Mapping[str, int]):
        self.cells, self._file, self._offsets = cells, file, offsets

    def read(self, name: str, first: int, count: int, dtype: str, shape: tuple[int, ...] = ()) -> np.ndarray:
        values = np.empty((count, *shape), dtype)
        at = self._offsets[name] + first * math.prod(shape) * values.itemsize
        view = values.reshape(-1).view(np.uint8).data
        while len(view):
            read = os.preadv(self._file, [view], at)
            if not read:
                raise OSError(f"a file of rows ends {len(view)} bytes too early")
            view, at = view[read:], at + read
        return values


class Runs:
    """Runs of rows with the columns of ``recipes``, and how many rows each cell has (``counts``, int64 [2 CELLS])."""

    def __init__(self, recipes: Sequence[Recipe]):
        self.runs, self.counts = list[Run](), np.zeros(2 * CELLS, np.int64)
        self._recipes, self._lock = (*_KEYS, *recipes), threading.Lock()

    def add(self, rows: Mapping[str, Rows], held_out: np.ndarray) -> None:
        """Keeps ``rows`` (with their places and ids), of which those ``held_out`` [B] lie on the other side."""
        cells = cells_of(rows[PLACE], held_out)  # type: ignore[arg-type]
        order = np.argsort(cells, kind="stable")  # a radix sort, for 16 bits
        arrays: dict[str, np.ndarray] = {}
        for recipe in self._recipes:
            each = rows[recipe.name]
            if isinstance(each, np.ndarray):
                arrays[recipe.name] = each.take(order, axis=0).astype(recipe.dtype, copy=False)
                continue
            chosen, types = each[order], {"indices": "int32", "values": recipe.dtype}
            arrays[f"{recipe.name}.offsets"] = chosen.offsets
            for part, values in chosen.entries.items():
                arrays[f"{recipe.name}.{part}"] = values.astype(types[part], copy=False)
        run = self._keep(cells.take(order), arrays)
        with self._lock:
            self.runs.append(run)
            self.counts += np.bincount(cells, minlength=2 * CELLS)

    def _keep(self, cells: np.ndarray, arrays: dict[str, np.ndarray]) -> Run:
        return _InMemory(cells, arrays)

    def load(self, first: int, stop: int, names: Sequence[str] | None = None) -> dict[str, Any]:
        """The rows of the cells from ``first`` to ``stop``, in no order; only the columns ``names`` where given."""
        spans = [(run, *_span(run.cells, first, stop)) for run in self.runs]
        spans = [span for span in spans if span[2]] or spans[:1]
        recipes = [recipe for recipe in self._recipes if names is None or recipe.name in names]
        return {each.name: concatenate([_rows(each, *span) for span in spans]) for each in recipes}


def _rows(recipe: Recipe, run: Run, first: int, count: int) -> Rows:
    """The column of ``recipe`` in some rows of a run."""
    name, dtype, shape = recipe.name, recipe.dtype, recipe.shape
    if recipe.is_dense:
        return run.read(name, first, count, dtype, shape)
    offsets = run.read(f"{name}.offsets", first, count + 1, "int64")
    here = int(offsets[0]), int(offsets[-1] - offsets[0])
    if recipe.kind == "ragged":
        return RaggedRows(offsets - offsets[0], run.read(f"{name}.values", *here, dtype, shape))
    indices, values = run.read(f"{name}.indices", *here, "int32"), run.read(f"{name}.values", *here, dtype)
    return CsrRows(offsets - offsets[0], indices, values, shape[0])


class RunsFile(Runs):
    """Runs that are written to ``path``, from which `close` makes a file that `read_runs` reads."""

    def __init__(self, recipes: Sequence[Recipe], path: Path):
        super().__init__(recipes)
        self._path, self._size, self._tables = path, 0, list[dict[str, Any]]()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)

    def _keep(self, cells: np.ndarray, arrays: dict[str, np.ndarray]) -> Run:
        arrays = {_CELL: cells, **arrays}
        offsets: dict[str, int] = {}
        with self._lock:
            for name, values in arrays.items():
                offsets[name] = self._size
                self._size += -(-values.nbytes // _ALIGN) * _ALIGN
            self._tables.append({"rows": len(cells), "offsets": offsets})
        for name, values in arrays.items():
            _write(self._file, np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, offsets[name])
        return _InFile(self._file, cells, offsets)

    def close(self, about: dict[str, Any], durable: Path | None = None) -> None:
        """Ends the file; with ``durable`` it is written out and takes that name, with ``about`` in it."""
        try:
            if durable is not None:
                text = json.dumps({**about, "runs": self._tables}).encode()
                tail = self.counts.tobytes() + text + len(text).to_bytes(8, "little") + _END
                _write(self._file, memoryview(tail), self._size)
                os.fsync(self._file)
                os.rename(self._path, durable)
        finally:
            os.close(self._file)


def _span(cells: np.ndarray, first: int, stop: int) -> tuple[int, int]:
    """Where the cells from ``first`` to ``stop`` begin among sorted ``cells``, and how many these are."""
    if first >= stop:
        return 0, 0
    low, high = np.uint16(first), np.uint16(stop - 1)  # of another type the whole array would be copied
    start = int(np.searchsorted(cells, low))
    return start, int(np.searchsorted(cells, high, "right")) - start


def _write(file: int, data: memoryview, at: int) -> None:
    while len(data):
        count = os.pwrite(file, data, at)
        data, at = data[count:], at + count


@dataclass(frozen=True)
class RunsTail:
    """What a file of runs says of itself."""

    path: Path
    about: dict[str, Any]
    counts: np.ndarray


def read_tail(path: Path) -> RunsTail:
    """The end of the file of runs ``path``. Raises UserError for another file."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 16))
        end = file.read(16)
        length = int.from_bytes(end[:8], "little")
        if end[8:] != _END or length + 16 + 16 * CELLS > size:
            raise UserError(f"'{path}' is incomplete: remove it, and run that part again.")
        file.seek(size - 16 - length - 16 * CELLS)
        counts = np.frombuffer(file.read(16 * CELLS), np.int64)
        return RunsTail(path, json.loads(file.read(length)), counts)


class ReadRuns(Runs):
    """The runs of several files, together. Holds the files open until `close`."""

    def __init__(self, recipes: Sequence[Recipe], tails: Sequence[RunsTail]):
        super().__init__(recipes)
        self._files: list[int] = []
        for tail in tails:
            self.counts += tail.counts
            self._files.append(os.open(tail.path, os.O_RDONLY))
            self.runs += self._of(tail, self._files[-1])

    def _of(self, tail: RunsTail, file: int) -> Iterator[Run]:
        for table in tail.about["runs"]:
            cells = np.memmap(tail.path, np.uint16, "r", table["offsets"][_CELL], table["rows"])
            yield _InFile(file, cells, table["offsets"])

    def close(self) -> None:
        """Closes the files."""
        for file in self._files:
            os.close(file)
