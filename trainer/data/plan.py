"""The plan: which rows make global step t, as a pure function of (rows per block, seed, lanes, batch size).

An epoch permutes the blocks, cuts the stream of their rows into L canonical lanes at exact row boundaries, and within
pools of a few blocks per lane permutes runs of contiguous rows. The world size only picks which lanes a rank reads, so
the global batch of a step is the same set of rows for every number of ranks, and a resumed run seeks, never replays.

Shapes: L lanes, T steps of an epoch. Steps are global: step s is step s % T of epoch s // T.
"""

import math
from bisect import bisect_left, bisect_right
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from trainer.errors import UserError

_BLOCKS, _RUNS = 0, 1  # the streams of the generator
_PAGE = 16  # pools of a lane that are planned at once, to spare NumPy's calls


class Pieces(NamedTuple):
    """Contiguous runs of rows, in order: ``block``, ``first`` row in it and number of ``rows``, each int64 [runs]."""

    block: np.ndarray
    first: np.ndarray
    rows: np.ndarray


class Plan:
    """Batches of an epoch differ by at most one row per lane; every row comes once an epoch.

    ``run_rows``: contiguous rows that stay together (1: single rows); ``pool_blocks``: pieces of blocks whose runs are
    permuted together.
    """

    def __init__(
        self, block_rows: np.ndarray, seed: int, lanes: int, batch_size: int, run_rows: int = 256, pool_blocks: int = 4
    ):
        for name, value in (
            ("batch_size", batch_size),
            ("data.lanes", lanes),
            ("data.run_rows", run_rows),
            ("data.pool_blocks", pool_blocks),
        ):
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1.")
        self.block_rows = np.asarray(block_rows, dtype=np.int64)
        self.num_rows = int(self.block_rows.sum())
        self.seed, self.lanes = seed, lanes
        self.batch_size = min(batch_size, self.num_rows)
        self.run_rows, self.pool_blocks = run_rows, pool_blocks
        if self.num_rows < 1:
            raise UserError("there are no rows to train on.")
        if self.batch_size % lanes and self.batch_size < self.num_rows:
            near = batch_size // lanes * lanes
            raise UserError(
                f"batch_size({batch_size}) % lanes({lanes}) != 0: "
                f"use batch_size={near + lanes}{f' or {near}' if near else ''}, or another data.lanes=."
            )
        self.lane_ends = np.arange(lanes + 1) * self.num_rows // lanes
        self.steps_per_epoch = -(-self.num_rows // self.batch_size)
        longest = int(np.diff(self.lane_ends).max())
        self.capacity = -(-longest // self.steps_per_epoch)
        """The most rows that a lane has in any step."""
        self._epoch = lru_cache(maxsize=2)(self._epoch_order)
        self._lane = lru_cache(maxsize=2 * lanes)(self._segments)
        self._page = lru_cache(maxsize=2 * lanes)(self._page_runs)

    def rows_at(self, step: int | np.ndarray) -> np.ndarray:
        """int64 [..., L]: rows of each lane at global steps [...]."""
        t, lane_rows = np.asarray(step)[..., None] % self.steps_per_epoch, np.diff(self.lane_ends)
        return (t + 1) * lane_rows // self.steps_per_epoch - t * lane_rows // self.steps_per_epoch

    def pieces(self, step: int, lane: int) -> Pieces:
        """The runs of ``lane`` at a global step, in order."""
        return self.pieces_of(step, 1, lane)[1]

    def pieces_of(self, first: int, steps: int, lane: int) -> tuple[np.ndarray, Pieces]:
        """The runs of ``lane`` at ``steps`` global steps from ``first``, in order, and the global step of each,
        int64 [runs]."""
        parts = []
        for epoch in range(first // self.steps_per_epoch, -(-(first + steps) // self.steps_per_epoch)):
            begin = epoch * self.steps_per_epoch
            low, high = max(first - begin, 0), min(first + steps - begin, self.steps_per_epoch)
            _, rows, page_ends = self._lane(epoch, lane)
            start, stop = low * rows // self.steps_per_epoch, high * rows // self.steps_per_epoch
            for page in range(bisect_right(page_ends, start) - 1, bisect_left(page_ends, stop)):
                runs = self._page(epoch, lane, page)
                i, j = runs[0].searchsorted((begin + low, begin + high))
                parts.append(runs[:, i:j])
        step, *columns = parts[0] if len(parts) == 1 else np.concatenate([_NONE, *parts], axis=1)
        return step, Pieces(*columns)

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks in the epoch's order, and where each begins in the stream of rows (one more for the end)."""
        order = _permutation(len(self.block_rows), self.seed, epoch, _BLOCKS, 0, 0)
        return order, np.concatenate([[0], np.cumsum(self.block_rows[order])])

    def _segments(self, epoch: int, lane: int) -> tuple[Pieces, int, list[int]]:
        """The parts of blocks that make a lane, in order, its rows, and where each page begins (one more for the end).

        A block at an edge is shared by two lanes.
        """
        order, starts = self._epoch(epoch)
        low, high = self.lane_ends[lane], self.lane_ends[lane + 1]
        i = np.arange(np.searchsorted(starts, low, "right") - 1, np.searchsorted(starts, high, "left"))
        first = np.maximum(low - starts[i], 0)
        rows = np.minimum(high, starts[i + 1]) - starts[i] - first
        pages = np.add.reduceat(rows, np.arange(0, len(rows), _PAGE * self.pool_blocks))
        return Pieces(order[i], first, rows), int(high - low), [0, *np.cumsum(pages).tolist()]

    def _page_runs(self, epoch: int, lane: int, page: int) -> np.ndarray:
        """The runs of a page of pools, permuted within each pool, cut where steps end, int64 [4, runs]: global step,
        block, first row in it, number of rows."""
        segments, lane_rows, page_ends = self._lane(epoch, lane)
        size = _PAGE * self.pool_blocks
        block, first, rows = (column[page * size : (page + 1) * size] for column in segments)
        counts = -(-rows // self.run_rows)
        ends = counts.cumsum()
        segment = np.arange(len(rows)).repeat(counts)
        offset = (np.arange(ends[-1]) - (ends - counts)[segment]) * self.run_rows
        of_pools = np.add.reduceat(counts, np.arange(0, len(rows), self.pool_blocks)).tolist()
        pools = zip(accumulate([0, *of_pools]), of_pools, range(page * _PAGE, (page + 1) * _PAGE))
        order = np.concatenate([b + _permutation(n, self.seed, epoch, _RUNS, lane, pool) for b, n, pool in pools])
        segment, offset = segment[order], offset[order]
        rows = np.minimum(self.run_rows, rows[segment] - offset)
        starts, end = page_ends[page] + rows.cumsum() - rows, page_ends[page + 1]
        low, high = self._step_of(np.array([starts[0], end - 1]), lane_rows).tolist()
        steps = np.arange(low + 1, high + 1) * lane_rows // self.steps_per_epoch
        cuts = np.sort(np.concatenate([starts, steps, [end]]), kind="stable")  # two sorted parts: a merge
        lengths = cuts[1:] - cuts[:-1]
        cuts, lengths = cuts[:-1][lengths > 0], lengths[lengths > 0]
        i = starts.searchsorted(cuts, "right") - 1
        segment = segment[i]
        step = epoch * self.steps_per_epoch + self._step_of(cuts, lane_rows)
        return np.stack([step, block[segment], first[segment] + offset[i] + cuts - starts[i], lengths])

    def _step_of(self, place: np.ndarray, lane_rows: int) -> np.ndarray:
        """The step of an epoch to which the rows at ``place`` of a lane's stream belong."""
        return ((place + 1) * self.steps_per_epoch - 1) // lane_rows


_NONE = np.empty((4, 0), dtype=np.int64)


def _permutation(n: int, seed: int, epoch: int, stream: int, lane: int, pool: int) -> np.ndarray:
    """A permutation of n from raw Philox words, which NumPy keeps stable over versions (its `permutation` is not)."""
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, stream], dtype=np.uint64)
    counter = np.array([0, epoch, lane, pool], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key, counter=counter).random_raw(n), kind="stable")


def default_lanes(batch_size: int, world_size: int, num_rows: int) -> int:
    """Eight lanes, or the fewest more that the ranks share evenly; fewer where eight cannot share ``batch_size``.

    So one, two, four and eight ranks read the same lanes. Raises UserError where the ranks cannot share the batch.
    """
    batch_size = min(batch_size, num_rows)
    if num_rows < world_size:
        raise UserError(f"rows({num_rows}) < ranks({world_size}): use fewer ranks.")
    for least in (8, 4, 2, 1):
        lanes = math.lcm(least, world_size)
        if batch_size % lanes == 0 or (least == 1 and batch_size == num_rows):
            return lanes
    near = batch_size // world_size * world_size
    raise UserError(
        f"batch_size({batch_size}) % ranks({world_size}) != 0: "
        f"use batch_size={near + world_size}{f' or {near}' if near else ''}."
    )
