"""Rows of a table or a shard folder, as the columns that a fitted model takes."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from trainer.data.packing.apply import available, check_columns, check_packed, rows_like
from trainer.data.shards.folder import ShardFolder, open_split
from trainer.data.shards.index import ROW_ID, Index
from trainer.data.shards.splits import is_packed
from trainer.data.sources.memory import MemorySource
from trainer.data.sources.source import Source, open_source
from trainer.inference.model.arguments import arguments
from trainer.inference.model.plates import Batch
from trainer.posterior.tensors import to_tensor

Progress = Callable[[int, int | None], None]
"""Of rows that are done, and of all where that is known."""
_ROWS = 2048  # read at a time


class NewRows(NamedTuple):
    """Rows in order."""

    total: int | None
    batches: Iterator[Batch]
    """A few thousand rows each, with their row ids."""
    lacking: tuple[str, ...]
    """Columns that the model was fitted with and these rows have not."""
    name: str

    @property
    def lacks(self) -> str:
        """In words."""
        return f"{self.name} has no column {', '.join(self.lacking)}"

    def watched(self, progress: Progress | None) -> Iterator[Batch]:
        """The batches; ``progress(rows_done, rows_total)`` is called once each has been used."""
        done = 0
        for batch in self.batches:
            yield batch
            done += batch.size
            if progress is not None:
                progress(done, self.total)


def new_rows(fn: Callable[..., Any], index: Index, dtype: torch.dtype, data: Any) -> NewRows:
    """``data`` (as for `fit`) as ``fn`` takes it, a model that was fitted to columns of ``index``; floats as ``dtype``.

    Raises UserError for data that lack a column without which ``fn`` cannot be called, and for what was never packed.
    """
    fitted = arguments(fn, [column.name for column in index.columns])
    folder = _shard_folder(data)
    if folder is not None:
        names = arguments(fn, [column.name for column in folder.index.columns])
        check_packed(index, folder.index, names)
        total, tables, name = folder.num_rows, _packed(folder, [*names, ROW_ID]), "the shard folder"
    else:
        source: Source = open_source(data) if isinstance(data, (str, Path)) else MemorySource(data)
        check_columns(index, source, _required(fn, index))
        names = arguments(fn, available(index, source))
        total, tables, name = source.num_rows, rows_like(index, source, names, _ROWS), source.name
    lacking = tuple(name for name in fitted if name not in (ROW_ID, *names))
    return NewRows(total, _batches(tables, dtype), lacking, name)


def _batches(tables: Iterator[dict[str, np.ndarray]], dtype: torch.dtype) -> Iterator[Batch]:
    for columns in tables:
        tensors = {name: to_tensor(values, dtype) for name, values in columns.items()}
        row_id = tensors.pop(ROW_ID)
        yield Batch.whole(tensors, row_id)


def _required(fn: Any, index: Index) -> list[str]:
    """The columns without which the model cannot be called."""
    parameters = inspect.signature(fn.forward if isinstance(fn, torch.nn.Module) else fn).parameters
    packed = {column.name for column in index.columns}
    return [name for name, each in parameters.items() if name in packed and each.default is each.empty]


def _packed(folder: ShardFolder, names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    for block, count in enumerate(folder.block_rows.tolist()):
        columns = {name: folder.read_block(block, name) for name in names}
        for first in range(0, count, _ROWS):
            yield {name: column[first : first + _ROWS] for name, column in columns.items()}


def _shard_folder(data: Any) -> ShardFolder | None:
    """``data`` as packed rows, or None where it is a table."""
    if isinstance(data, ShardFolder):
        return data
    if isinstance(data, (str, Path)) and is_packed(data):
        return open_split(data, "train")
    return None
