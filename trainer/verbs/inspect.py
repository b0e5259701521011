"""`svi inspect`: what a shard folder holds: columns with their statistics, sizes, how it was packed, a few rows."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from trainer.data.shards.files import Files
from trainer.data.shards.folder import ShardFolder
from trainer.data.shards.index import Column, Index
from trainer.data.shards.splits import split_files
from trainer.errors import counted
from trainer.options.verbs import Inspect
from trainer.training.data import cache_of, places, training_split

_SHOWN = 4  # numbers of a row's value


def run(cfg: Inspect, run_dir: Path) -> float:
    """Prints the columns of the first split, or several folders together, then the size and first rows of each split;
    returns the rows of all.
    """
    del run_dir
    console, total = Console(highlight=False), 0
    if len(several := places(cfg.data.path)) > 1:
        together = training_split(cfg.data).index
        console.print(_schema(together))
        console.print(_packed(together), soft_wrap=True)
    splits = [files for place in several for files in split_files(place, cache_of(cfg.data))]
    for number, files in enumerate(splits):
        folder = ShardFolder(files)
        if number == 0 and len(several) == 1:
            console.print(_schema(folder.index))
            console.print(_packed(folder.index), soft_wrap=True)
        console.print()
        console.print(_size(files, folder.index), soft_wrap=True)
        if cfg.rows:
            console.print(_rows(folder, cfg.rows))
        total += folder.num_rows
    return float(total)


def _schema(index: Index) -> Table:
    """A line for each column; of several numbers a row the least and largest of each statistic."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("column", "kind", "of a row", "mean", "sd", "min", "max"):
        table.add_column(heading, justify="right" if heading in ("mean", "sd", "min", "max") else "left")
    for column in index.columns:
        statistics = column.statistics or {}
        numbers = [_range(statistics.get(name)) for name in ("mean", "sd", "min", "max")]
        table.add_row(column.name, _kind(column), _shape(column), *numbers)
    return table


def _kind(column: Column) -> str:
    if column.vocabulary is not None:
        return counted(len(column.vocabulary), "category", "categories")
    return column.dtype if column.kind == "dense" else f"{column.kind} {column.dtype}"


def _shape(column: Column) -> str:
    if column.kind == "csr":
        return f"of {column.shape[0]:,}, those not 0"
    shape = " x ".join(map(str, column.shape)) or "1"
    return f"any number of {shape}" if column.kind == "ragged" else shape


def _range(value: Any) -> str:
    if value is None:
        return ""
    numbers = np.asarray(value, dtype=float)
    low, high = f"{numbers.min():.4g}", f"{numbers.max():.4g}"
    return low if low == high else f"{low} to {high}"


def _packed(index: Index) -> str:
    """How the table was packed, in a line."""
    meta = index.meta
    said = [f"packed from {meta.get('source', 'a source that it does not tell')}, seed {index.seed}"]
    for name, words in (("group_by", "grouped by {}"), ("split_by", "split by {}"), ("split_time", "split at {}")):
        if meta.get(name):
            said.append(words.format(meta[name]))
    if meta.get("dropped"):
        said.append(f"{counted(meta['dropped'], 'row')} without a value left out")
    if meta.get("standardised"):
        said.append(f"standardised: {', '.join(meta['standardised'])}")
    return " · ".join(said)


def _size(files: Files, index: Index) -> str:
    size = sum(shard.bytes for shard in index.shards)
    return (
        f"{files.place}: {counted(index.num_rows, 'row')} in {counted(len(index.block_rows), 'block')} of "
        f"{counted(len(index.shards), 'shard')}, "
        f"{size / 1e6:,.1f} MB, index {index.digest[:12]}"
    )


def _rows(folder: ShardFolder, count: int) -> Table:
    """The first rows, as they are stored."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = [column.name for column in folder.index.columns]
    for name in names:
        table.add_column(name, justify="right")
    columns = {name: folder.read_block(0, name)[:count] for name in names}
    for row in range(min(count, int(folder.block_rows[0]))):
        table.add_row(*(_cell(folder.index.column(name), columns[name], row) for name in names))
    return table


def _cell(column: Column, values: Any, row: int) -> str:
    if column.kind == "csr":
        one = values[row : row + 1]
        pairs = [f"{i}: {v:.4g}" for i, v in zip(one.indices[:_SHOWN], one.values[:_SHOWN])]
        return ", ".join(pairs) + (", …" if len(one.indices) > _SHOWN else "")
    numbers = np.ravel(values[row : row + 1].values if column.kind == "ragged" else values[row])
    if column.vocabulary is not None and len(numbers) == 1:
        return str(column.vocabulary[int(numbers[0])])
    shown = ", ".join(f"{number:.4g}" if numbers.dtype.kind == "f" else str(number) for number in numbers[:_SHOWN])
    return shown + (", …" if len(numbers) > _SHOWN else "")
