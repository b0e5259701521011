"""The plan: which rows make global step t, as a pure function of (rows per block, seed, lanes, batch size).

An epoch permutes the blocks, cuts the stream of their rows into L canonical lanes at exact row boundaries, and within
pools of a few blocks per lane permutes runs of contiguous rows. The world size only picks which lanes a rank reads, so
the global batch of a step is the same set of rows for every number of ranks, and a resumed run seeks, never replays.

Shapes: L lanes, T steps of an epoch. Steps are global: step s is step s % T of epoch s // T.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from trainer.errors import UserError

_BLOCKS, _RUNS = 0, 1  # the streams of the generator


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
        self._pool = lru_cache(maxsize=4 * lanes)(self._pool_runs)

    def rows_at(self, step: int | np.ndarray) -> np.ndarray:
        """int64 [..., L]: rows of each lane at global steps [...]."""
        t, lane_rows = np.asarray(step)[..., None] % self.steps_per_epoch, np.diff(self.lane_ends)
        return (t + 1) * lane_rows // self.steps_per_epoch - t * lane_rows // self.steps_per_epoch

    def pieces(self, step: int, lane: int) -> Pieces:
        """The runs of ``lane`` at a global step, in order."""
        epoch, t = divmod(step, self.steps_per_epoch)
        rows = int(self.lane_ends[lane + 1] - self.lane_ends[lane])
        return self._slice(epoch, lane, t * rows // self.steps_per_epoch, (t + 1) * rows // self.steps_per_epoch)

    def pieces_of(self, first: int, steps: int, lane: int) -> tuple[np.ndarray, Pieces]:
        """The runs of ``lane`` at ``steps`` global steps from ``first``, cut where steps end, and each one's step,
        int64 [runs], counted from ``first``."""
        parts, done, per_epoch = [], 0, self.steps_per_epoch
        rows = int(self.lane_ends[lane + 1] - self.lane_ends[lane])
        while done < steps:
            epoch, t = divmod(first + done, per_epoch)
            here = min(steps - done, per_epoch - t)
            bounds = np.arange(t, t + here + 1) * rows // per_epoch
            runs = self._slice(epoch, lane, int(bounds[0]), int(bounds[-1]))
            begins = bounds[0] + np.cumsum(runs.rows) - runs.rows
            cuts = np.union1d(begins, bounds[bounds < bounds[-1]])
            i = np.searchsorted(begins, cuts, "right") - 1
            sizes = np.diff(cuts, append=bounds[-1])
            step = done + np.searchsorted(bounds, cuts, "right") - 1
            parts.append((step, Pieces(runs.block[i], runs.first[i] + cuts - begins[i], sizes)))
            done += here
        return np.concatenate([step for step, _ in parts]), _joined([runs for _, runs in parts])

    def _slice(self, epoch: int, lane: int, start: int, stop: int) -> Pieces:
        """Rows [start, stop) of a lane's stream."""
        pool_ends = self._lane(epoch, lane)[1]
        parts = []
        for pool in range(int(np.searchsorted(pool_ends, start, "right")) - 1, len(pool_ends) - 1):
            if pool_ends[pool] >= stop:
                break
            runs, ends = self._pool(epoch, lane, pool)
            low, high = max(start - pool_ends[pool], 0), min(stop, pool_ends[pool + 1]) - pool_ends[pool]
            parts.append(_cut(runs, ends, int(low), int(high)))
        return _joined(parts)

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks in the epoch's order, and where each begins in the stream of rows (one more for the end)."""
        order = _permutation(len(self.block_rows), self.seed, epoch, _BLOCKS, 0, 0)
        return order, np.concatenate([[0], np.cumsum(self.block_rows[order])])

    def _segments(self, epoch: int, lane: int) -> tuple[Pieces, np.ndarray]:
        """The parts of blocks that make a lane, in order, and where each pool begins (one more for the end).

        A block at an edge is shared by two lanes.
        """
        order, starts = self._epoch(epoch)
        low, high = self.lane_ends[lane], self.lane_ends[lane + 1]
        i = np.arange(np.searchsorted(starts, low, "right") - 1, np.searchsorted(starts, high, "left"))
        first = np.maximum(low - starts[i], 0)
        rows = np.minimum(high, starts[i + 1]) - starts[i] - first
        pool_ends = np.concatenate([[0], np.cumsum(np.add.reduceat(rows, np.arange(0, len(rows), self.pool_blocks)))])
        return Pieces(order[i], first, rows), pool_ends

    def _pool_runs(self, epoch: int, lane: int, pool: int) -> tuple[Pieces, np.ndarray]:
        """A pool's runs in their permuted order, and where each begins (one more for the end)."""
        segments, _ = self._lane(epoch, lane)
        here = slice(pool * self.pool_blocks, (pool + 1) * self.pool_blocks)
        block, first, rows = (column[here] for column in segments)
        counts = -(-rows // self.run_rows)
        segment = np.repeat(np.arange(len(rows)), counts)
        offset = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * self.run_rows
        runs = Pieces(block[segment], first[segment] + offset, np.minimum(self.run_rows, rows[segment] - offset))
        order = _permutation(len(segment), self.seed, epoch, _RUNS, lane, pool)
        runs = Pieces(*(column[order] for column in runs))
        return runs, np.concatenate([[0], np.cumsum(runs.rows)])


_NONE = np.empty(0, dtype=np.int64)


def _joined(parts: list[Pieces]) -> Pieces:
    """All pieces in order."""
    return Pieces(*(np.concatenate(columns) for columns in zip(*parts))) if parts else Pieces(*(_NONE,) * 3)


def _cut(runs: Pieces, ends: np.ndarray, low: int, high: int) -> Pieces:
    """Rows [low, high) of a stream of runs; ``ends``: where each run begins, and the end."""
    i = np.arange(np.searchsorted(ends, low, "right") - 1, np.searchsorted(ends, high, "left"))
    skipped = np.maximum(low - ends[i], 0)
    return Pieces(runs.block[i], runs.first[i] + skipped, np.minimum(high, ends[i + 1]) - ends[i] - skipped)


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
