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
from typing import Any, NamedTuple, Protocol

import numpy as np

from trainer.data.fields import CsrRows, RaggedRows, Rows, VaryingRows
from trainer.data.packing.columns import Recipe
from trainer.data.packing.shuffle import CELLS, PLACE, cells_of
from trainer.data.shards.index import ROW_ID

_CELL = "#cell"
_END = b"svi-run1"
_ALIGN = 64


class _Array(NamedTuple):
    """One array of a run: of rows, of entries, or where each row's entries begin (a value more than rows)."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    column: str = ""  # whose entries these are

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def _arrays(recipes: Sequence[Recipe]) -> list[_Array]:
    made = [_Array(PLACE, np.dtype("uint64"), ()), _Array(ROW_ID, np.dtype("int64"), ())]
    for recipe in recipes:
        name, dtype = recipe.name, np.dtype(recipe.dtype)
        if recipe.is_dense:
            made.append(_Array(name, dtype, recipe.shape))
            continue
        made.append(_Array(f"{name}.offsets", np.dtype("int64"), ()))
        if recipe.kind == "csr":
            made.append(_Array(f"{name}.indices", np.dtype("int32"), (), name))
        made.append(_Array(f"{name}.values", dtype, recipe.shape if recipe.kind == "ragged" else (), name))
    return made


class Run(Protocol):
    """The rows of one run: their cells, uint16 [B] in order, and their arrays."""

    cells: np.ndarray

    def read(self, array: _Array, first: int, out: np.ndarray) -> None:
        """Copies values from number ``first`` on to ``out``."""
        ...


class _InMemory:
    def __init__(self, cells: np.ndarray, arrays: dict[str, np.ndarray]):
        self.cells, self._arrays = cells, arrays

    def read(self, array: _Array, first: int, out: np.ndarray) -> None:
        out[...] = self._arrays[array.name][first : first + len(out)]


class _InFile:
    def __init__(self, file: int, cells: np.ndarray, offsets: Mapping[str, int]):
        self.cells, self._file, self._offsets = cells, file, offsets

    def read(self, array: _Array, first: int, out: np.ndarray) -> None:
        at, view = self._offsets[array.name] + first * array.row_bytes, out.reshape(-1).view(np.uint8).data
        while len(view):
            count = os.preadv(self._file, [view], at)
            if not count:
                raise OSError(f"a file of rows ends {len(view)} bytes too early")
            view, at = view[count:], at + count


class Runs:
    """Runs of rows with the columns of ``recipes``, and how many rows each cell has (``counts``, int64 [2 CELLS])."""

    def __init__(self, recipes: Sequence[Recipe]):
        self.recipes, self.runs = recipes, list[Run]()
        self.counts = np.zeros(2 * CELLS, np.int64)
        self._all, self._lock = _arrays(recipes), threading.Lock()

    def add(self, rows: Mapping[str, Rows], held_out: np.ndarray) -> None:
        """Keeps ``rows`` (with their places and ids), of which those ``held_out`` [B] lie on the other side."""
        cells = cells_of(rows[PLACE], held_out)  # type: ignore[arg-type]
        order = np.argsort(cells, kind="stable")  # a radix sort, for 16 bits
        taken: dict[str, np.ndarray] = {}
        for name, each in rows.items():
            if isinstance(each, np.ndarray):
                taken[name] = each.take(order, axis=0)
            else:
                chosen = each[order]
                taken[f"{name}.offsets"] = chosen.offsets
                taken |= {f"{name}.{part}": values for part, values in chosen.entries.items()}
        arrays = {array.name: taken[array.name].astype(array.dtype, copy=False) for array in self._all}
        run = self._keep(cells.take(order), arrays)
        with self._lock:
            self.runs.append(run)
            self.counts += np.bincount(cells, minlength=2 * CELLS)

    def _keep(self, cells: np.ndarray, arrays: dict[str, np.ndarray]) -> Run:
        return _InMemory(cells, arrays)

    def load(self, first: int, stop: int, names: Sequence[str] | None = None) -> dict[str, Any]:
        """The rows of the cells from ``first`` to ``stop``, in no order; only the columns ``names`` where given."""
        spans = [(run, *_span(run.cells, first, stop)) for run in self.runs]
        spans = [(run, start, end) for run, start, end in spans if end > start]
        rows = sum(end - start for _, start, end in spans)
        columns = [recipe for recipe in self.recipes if names is None or recipe.name in names]
        plain = [array for array in self._all[:2] if names is None or array.name in names]
        plain += [array for array in self._all[2:] if array.name in {recipe.name for recipe in columns}]
        made: dict[str, Any] = {array.name: np.empty((rows, *array.shape), array.dtype) for array in plain}
        at = 0
        for run, start, end in spans:
            for array in plain:
                run.read(array, start, made[array.name][at : at + end - start])
            at += end - start
        return made | {recipe.name: self._varying(recipe, spans) for recipe in columns if not recipe.is_dense}

    def _varying(self, recipe: Recipe, spans: Sequence[tuple[Run, int, int]]) -> VaryingRows:
        begins, *parts = [array for array in self._all if array.name.startswith(f"{recipe.name}.")]
        bounds = []
        for run, start, end in spans:
            found = np.empty(end - start + 1, np.int64)
            run.read(begins, start, found)
            bounds.append(found)
        offsets = np.concatenate([[0], *(np.diff(each) for each in bounds)]).astype(np.int64).cumsum()
        arrays = [np.empty((int(offsets[-1]), *array.shape), array.dtype) for array in parts]
        at = 0
        for (run, _, _), bound in zip(spans, bounds):
            count = int(bound[-1] - bound[0])
            for array, out in zip(parts, arrays):
                run.read(array, int(bound[0]), out[at : at + count])
            at += count
        if recipe.kind == "csr":
            return CsrRows(offsets, arrays[0], arrays[1], recipe.shape[0])
        return RaggedRows(offsets, arrays[0])


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
    """Where the cells from ``first`` to ``stop`` lie among sorted ``cells``."""
    if first >= stop:
        return 0, 0
    low, high = np.uint16(first), np.uint16(stop - 1)  # of another type the whole array would be copied
    return int(np.searchsorted(cells, low)), int(np.searchsorted(cells, high, "right"))


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
    """The end of the file of runs ``path``. Raises ValueError for another file."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 16))
        end = file.read(16)
        length = int.from_bytes(end[:8], "little")
        if end[8:] != _END or length + 16 + 16 * CELLS > size:
            raise ValueError(f"{path} is no whole file of rows")
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
