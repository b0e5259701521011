"""Rows of shards as a stock WebDataset pipeline: the library splits, shuffles and batches what `ShardFolder` reads.

Importing this module imports webdataset, and so torch.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import webdataset
from webdataset.utils import pytorch_worker_info

from trainer.data.fields import CsrRows, Rows
from trainer.data.shards.index import ROW_ID, Column, Index
from trainer.errors import UserError

Blocks = tuple[int, ...]
"""Numbers of blocks that one worker reads, one after another."""


def row_pipeline(
    index: Index,
    read: Callable[..., Iterator[dict[str, Rows]]],
    columns: Sequence[str] | None,
    shuffle: bool | int,
    batch_size: int | None,
) -> webdataset.FluidWrapper:
    """Make `ShardFolder.webdataset`; ``read`` is its `read_blocks`."""
    if shuffle < 0:
        raise UserError(f"shuffle={shuffle} is not a number of rows: give 0 or more, or True.")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size={batch_size} holds no row: give 1 or more, or None for single rows.")
    names = list(dict.fromkeys([*([column.name for column in index.columns] if columns is None else columns), ROW_ID]))
    chosen = [index.column(name) for name in names]
    waiting = 2 * int(index.block_rows.max()) if shuffle is True else shuffle
    pipeline = webdataset.FluidWrapper(_shards(index)).compose(
        _enough_for_ranks, webdataset.split_by_node, _enough_for_workers, webdataset.split_by_worker
    )
    if waiting:
        pipeline = pipeline.compose(partial(_shuffled, size=len(index.block_rows)))
    pipeline = pipeline.compose(partial(read, names=names), _rows)
    if waiting:
        pipeline = pipeline.compose(partial(_shuffled, size=waiting))
    return pipeline if batch_size is None else pipeline.batched(batch_size, partial(_batch, columns=chosen))


def _shards(index: Index) -> list[Blocks]:
    ends = list(accumulate((len(shard.rows) for shard in index.shards), initial=0))
    return [tuple(range(first, end)) for first, end in pairwise(ends)]


def _enough_for_ranks(shards: Iterable[Blocks]) -> list[Blocks]:
    _, ranks, _, _ = pytorch_worker_info()
    return _enough(shards, ranks)


def _enough_for_workers(shards: Iterable[Blocks]) -> list[Blocks]:
    """Those of a rank: its workers alone know how many they are."""
    *_, workers = pytorch_worker_info()
    return _enough(shards, workers)


def _enough(shards: Iterable[Blocks], parts: int) -> list[Blocks]:
    """``shards``, or their single blocks where they are fewer than ``parts``."""
    whole = list(shards)
    return whole if len(whole) >= parts else [(block,) for blocks in whole for block in blocks]


def _shuffled(source: Iterable[Any], size: int) -> Iterator[Any]:
    """Shuffle by WebDataset, in an order that `random` seeds: torch seeds that of a worker anew in each epoch."""
    rng = random.Random(random.getrandbits(64))
    rows: Iterator[Any] = webdataset.shuffle(size, initial=size, rng=rng)(iter(source))
    return rows


def _rows(blocks: Iterable[dict[str, Rows]]) -> Iterator[dict[str, Any]]:
    for block in blocks:
        for row in zip(*map(_each, block.values())):
            yield dict(zip(block, row))


def _each(values: Rows) -> Iterable[Any]:
    """The values of each row of a block."""
    if isinstance(values, np.ndarray):
        return values
    ends = values.offsets.tolist()
    if isinstance(values, CsrRows):
        indices = values.indices.astype(np.int64)
        return ({"indices": indices[a:b], "values": values.values[a:b]} for a, b in pairwise(ends))
    return (values.values[a:b] for a, b in pairwise(ends))


def _batch(rows: Sequence[dict[str, Any]], columns: Sequence[Column]) -> dict[str, Any]:
    """B rows as one dict: dense [B, ...]; of others the entries of all rows, with their offsets, int64 [B + 1]."""
    return {column.name: _joined([row[column.name] for row in rows], column.kind) for column in columns}


def _joined(values: list[Any], kind: str) -> Any:
    if kind == "dense":
        first = values[0]  # joined first and shaped then: a tenth of the time of np.array, which looks at each
        return np.concatenate(values).reshape(-1, *first.shape) if first.ndim else np.array(values)
    entries = values if kind == "csr" else [{"values": each} for each in values]
    offsets = np.cumsum([0, *(len(each["values"]) for each in entries)])
    return {"offsets": offsets, **{name: np.concatenate([each[name] for each in entries]) for name in entries[0]}}
