"""The plan: which rows make global step t, as a pure function of (rows per block, seed, lanes, batch size).

An epoch permutes the blocks, cuts the stream of their rows into L canonical lanes at exact row boundaries, and within
pools of a few blocks per lane permutes runs of contiguous rows. The world size only picks which lanes a rank reads, so
the global batch of a step is the same set of rows for every number of ranks, and a resumed run seeks, never replays.

A run may go on with another batch size, or other lanes, at any step. What its epoch has left (`EpochRemainder`) is a
stream, the remainders of the lanes one after the other, which is cut into the new lanes and into steps as an epoch is.

Shapes: L lanes, T steps of an epoch. Steps are global: without a rest, step s is step s % T of epoch s // T.
"""

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import xxhash

from trainer.data.remainder import EpochRemainder, Part, dealt, left_of
from trainer.errors import UserError

_BLOCKS, _RUNS, _SHARDS = 0, 1, 2  # the streams of the generator
_PAGE = 16  # pools of a lane that are planned at once, to spare NumPy's calls


class Pieces(NamedTuple):
    """Contiguous runs of rows, in order: ``block``, ``first`` row in it and number of ``rows``, each int64 [runs]."""

    block: np.ndarray
    first: np.ndarray
    rows: np.ndarray


class _Stage(NamedTuple):
    """Steps that are cut alike: an epoch, or what the plan takes over.

    ``first`` step and number of ``steps``; of each lane its ``parts`` and its ``rows`` [L]; ``stop``: the epoch after.
    """

    first: int
    steps: int
    parts: list[tuple[Part, ...]]
    rows: np.ndarray
    stop: int


@dataclass(frozen=True, eq=False)
class Mixing:
    """How rows are mixed: what stays together, and among what it is permuted."""

    run_rows: int = 256
    """Contiguous rows that stay together (1: single rows)."""
    pool_blocks: int = 4
    """Pieces of blocks whose runs are permuted together."""
    shard_of: np.ndarray | None = None
    """int64 [blocks]."""
    shards_together: int = 0
    """Shards are permuted, and blocks among those of so many shards alone (0: of all): few are needed at a time."""


_USUAL = Mixing()


class Plan:
    """Batches of an epoch differ by at most one row per lane; every row comes once an epoch.

    ``block_rows``: int64 [blocks]; ``rest``: where the plan takes over from another; it has no steps before.
    """

    def __init__(
        self,
        block_rows: np.ndarray,
        seed: int,
        lanes: int,
        batch_size: int,
        mixing: Mixing = _USUAL,
        rest: EpochRemainder | None = None,
    ):
        for name, value in (
            ("batch_size", batch_size),
            ("data.lanes", lanes),
            ("data.run_rows", mixing.run_rows),
            ("data.pool_blocks", mixing.pool_blocks),
        ):
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1.")
        self.block_rows = np.asarray(block_rows, dtype=np.int64)
        self.num_rows = int(self.block_rows.sum())
        self.seed, self.lanes, self.mixing = seed, lanes, mixing
        self.batch_size = min(batch_size, self.num_rows)
        if self.num_rows < 1:
            raise UserError("there are no rows to train on.")
        if self.batch_size % lanes and self.batch_size < self.num_rows:
            near = batch_size // lanes * lanes
            raise UserError(
                f"batch_size({batch_size}) % lanes({lanes}) != 0: "
                f"use batch_size={near + lanes}{f' or {near}' if near else ''}, or another data.lanes=."
            )
        self.steps_per_epoch = -(-self.num_rows // self.batch_size)
        self.rest = rest or EpochRemainder(0, 0, ())
        self._epoch = lru_cache(maxsize=4)(self._epoch_stage)
        self._taken_over = self._take_over()
        self.first_whole = self._taken_over.first + self._taken_over.steps
        """The global step at which an epoch begins that is this plan's alone; so does one every `steps_per_epoch`."""
        stages = [self._taken_over] * bool(self._taken_over.steps) + [self._stage(self.first_whole)]
        self.capacity = max(-(-int(each.rows.max()) // each.steps) for each in stages)
        """The most rows that a lane has in any step."""
        self.fewest = min(int(each.rows.min()) // each.steps for each in stages)
        """The fewest."""
        self.most_parts = max(len(parts) for each in stages for parts in each.parts)
        """The most places of an epoch's order from which a step of a lane comes."""
        self._order = lru_cache(maxsize=3)(self._epoch_order)
        self._lane = lru_cache(maxsize=2 * max([lanes, *(part.lanes for part in self.rest.parts)]))(self._segments)
        self._page = lru_cache(maxsize=2 * lanes)(self._page_runs)

    @property
    def identity(self) -> tuple[object, ...]:
        """Another for a plan of other batches."""
        blocks, mixing = xxhash.xxh3_64_intdigest(self.block_rows.tobytes()), self.mixing
        return (blocks, self.seed, self.lanes, self.batch_size, mixing.run_rows, mixing.pool_blocks,
                mixing.shards_together, self.rest)  # fmt: skip

    def rows_at(self, step: int | np.ndarray) -> np.ndarray:
        """int64 [..., L]: rows of each lane at global steps [...]."""
        t, over = np.asarray(step)[..., None] - self.first_whole, self._taken_over
        steps, rows = np.asarray(self.steps_per_epoch), self._epoch(0).rows
        if over.steps:
            late = t >= 0
            steps, rows = np.where(late, steps, over.steps), np.where(late, rows, over.rows)
        t = t % steps
        counts: np.ndarray = (t + 1) * rows // steps - t * rows // steps
        return counts

    def pieces(self, step: int, lane: int) -> Pieces:
        """The runs of ``lane`` at a global step, in order."""
        return self.pieces_of(step, 1, lane)[1]

    def pieces_of(self, first: int, steps: int, lane: int) -> tuple[np.ndarray, Pieces]:
        """The runs of ``lane`` at ``steps`` global steps from ``first``, in order, and the global step of each,
        int64 [runs].
        """
        found, at = [], first
        while at < first + steps:
            stage = self._stage(at)
            high = min(first + steps, stage.first + stage.steps)
            rows, before = int(stage.rows[lane]), 0
            start, stop = ((step - stage.first) * rows // stage.steps for step in (at, high))
            for number, part in enumerate(stage.parts[lane]):
                begin, end = part.first + max(start - before, 0), part.first + min(stop - before, part.rows)
                before += part.rows
                if begin >= end:
                    continue
                page_ends = self._lane(part.epoch, part.lanes, part.lane)[1]
                for page in range(bisect_right(page_ends, begin) - 1, bisect_left(page_ends, end)):
                    runs = self._page(stage.first, lane, number, page)
                    i, j = runs[0].searchsorted((at, high))
                    found.append(runs[:, i:j])
            at = high
        step, *columns = found[0] if len(found) == 1 else np.concatenate([_NONE, *found], axis=1)
        return step, Pieces(*columns)

    def rest_at(self, step: int) -> EpochRemainder:
        """What is left at a global step, for a plan that takes over there."""
        stage = self._stage(step)
        if step == stage.first and stage.first >= self.first_whole:
            return EpochRemainder(step, stage.stop - 1, ())
        taken = ((step - stage.first) * stage.rows // stage.steps).tolist()
        left = [part for parts, n in zip(stage.parts, taken) for part in left_of(parts, n)]
        return EpochRemainder(step, stage.stop, tuple(left))

    def begins(self, step: int) -> bool:
        """Whether an epoch begins at a global step, or the plan takes over there."""
        return (
            step == self.rest.step or (step - self.first_whole) % self.steps_per_epoch == 0 <= step - self.first_whole
        )

    def epochs_at(self, step: int) -> float:
        """How many epochs, and parts of one, the steps before a global step are."""
        stage = self._stage(step)
        left = stage.rows - (step - stage.first) * stage.rows // stage.steps
        return stage.stop - int(left.sum()) / self.num_rows

    def step_after(self, epochs: float) -> int:
        """The first global step by which so many epochs were taken, or that at which this plan takes over."""
        over, late = self._taken_over, epochs - self._taken_over.stop
        if late >= 0 or not over.steps:
            return self.first_whole + math.ceil(max(0, late) * self.steps_per_epoch)
        return over.first + math.ceil(over.steps * max(0, 1 + late * self.num_rows / int(over.rows.sum())))

    def _take_over(self) -> _Stage:
        """What is left of the plan before. Less than an epoch is cut together with the next one: no batch is small."""
        step, epoch, parts = self.rest
        if 0 < self.rest.rows < self.num_rows:
            parts, epoch = parts + tuple(part for (part,) in self._whole(epoch)), epoch + 1
        dealt_out = dealt(parts, self.lanes)
        rows = np.array([sum(part.rows for part in each) for each in dealt_out])
        steps = -(-int(rows.max()) // -(-self.batch_size // self.lanes))
        return _Stage(step, steps, dealt_out, rows, epoch)

    def _stage(self, step: int) -> _Stage:
        """That to which a global step belongs."""
        over = self._taken_over
        assert step >= over.first, f"step {step} lies before step {over.first}, at which the plan takes over"
        late = step - self.first_whole
        return over if late < 0 else self._epoch(late // self.steps_per_epoch)

    def _epoch_stage(self, n: int) -> _Stage:
        """The ``n``-th of the epochs that are this plan's alone."""
        epoch, steps = self._taken_over.stop + n, self.steps_per_epoch
        rows = np.diff(self._lane_ends(self.lanes))
        return _Stage(self.first_whole + n * steps, steps, self._whole(epoch), rows, epoch + 1)

    def _whole(self, epoch: int) -> list[tuple[Part, ...]]:
        """The part that each lane is of an epoch."""
        rows = np.diff(self._lane_ends(self.lanes)).tolist()
        return [(Part(epoch, self.lanes, lane, 0, n),) for lane, n in enumerate(rows)]

    def _lane_ends(self, lanes: int) -> np.ndarray:
        """int64 [lanes + 1]: where each of so many lanes begins in an epoch's stream of rows."""
        return np.arange(lanes + 1) * self.num_rows // lanes

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks in the epoch's order, and where each begins in the stream of rows (one more for the end)."""
        order = _permutation(len(self.block_rows), self.seed, epoch, _BLOCKS, 0, 0)
        shard_of, together = self.mixing.shard_of, self.mixing.shards_together
        if together and shard_of is not None:
            place = np.argsort(_permutation(int(shard_of[-1]) + 1, self.seed, epoch, _SHARDS, 0, 0))
            group = place[shard_of] // together
            order = order[np.argsort(group[order], kind="stable")]
        return order, np.concatenate([[0], np.cumsum(self.block_rows[order])])

    def _segments(self, epoch: int, lanes: int, lane: int) -> tuple[Pieces, list[int]]:
        """The parts of blocks that make a lane of so many, in order, and where each page begins (one more for the end).

        A block at an edge is shared by two lanes.
        """
        order, starts = self._order(epoch)
        low, high = self._lane_ends(lanes)[lane : lane + 2]
        i = np.arange(np.searchsorted(starts, low, "right") - 1, np.searchsorted(starts, high, "left"))
        first = np.maximum(low - starts[i], 0)
        rows = np.minimum(high, starts[i + 1]) - starts[i] - first
        pages = np.add.reduceat(rows, np.arange(0, len(rows), _PAGE * self.mixing.pool_blocks))
        return Pieces(order[i], first, rows), [0, *np.cumsum(pages).tolist()]

    def _page_runs(self, first_step: int, lane: int, number: int, page: int) -> np.ndarray:
        """The runs of a page of pools in part ``number`` of a lane, in the stage that begins at ``first_step``,
        permuted within each pool, cut where steps end, int64 [4, runs]: global step, block, first row in it, number of
        rows.
        """
        stage = self._stage(first_step)
        parts, lane_rows = stage.parts[lane], int(stage.rows[lane])
        part = parts[number]
        before = sum(each.rows for each in parts[:number]) - part.first  # from here to the lane's stream
        segments, page_ends = self._lane(part.epoch, part.lanes, part.lane)
        size = _PAGE * self.mixing.pool_blocks
        block, first, rows = (column[page * size : (page + 1) * size] for column in segments)
        counts = -(-rows // self.mixing.run_rows)
        ends = counts.cumsum()
        segment = np.arange(len(rows)).repeat(counts)
        offset = (np.arange(ends[-1]) - (ends - counts)[segment]) * self.mixing.run_rows
        of_pools = np.add.reduceat(counts, np.arange(0, len(rows), self.mixing.pool_blocks)).tolist()
        pools = zip(accumulate([0, *of_pools]), of_pools, range(page * _PAGE, (page + 1) * _PAGE))
        order = np.concatenate(
            [b + _permutation(n, self.seed, part.epoch, _RUNS, part.lane, pool) for b, n, pool in pools]
        )
        segment, offset = segment[order], offset[order]
        rows = np.minimum(self.mixing.run_rows, rows[segment] - offset)
        starts = page_ends[page] + rows.cumsum() - rows
        begin, end = max(page_ends[page], part.first), min(page_ends[page + 1], part.stop)
        low, high = self._step_of(np.array([begin, end - 1]) + before, stage.steps, lane_rows).tolist()
        steps = np.arange(low + 1, high + 1) * lane_rows // stage.steps - before
        inner = starts[starts.searchsorted(begin, "right") : starts.searchsorted(end)]
        cuts = np.sort(np.concatenate([[begin], inner, steps, [end]]), kind="stable")  # two sorted parts: a merge
        lengths = cuts[1:] - cuts[:-1]
        cuts, lengths = cuts[:-1][lengths > 0], lengths[lengths > 0]
        i = starts.searchsorted(cuts, "right") - 1
        segment = segment[i]
        step = stage.first + self._step_of(cuts + before, stage.steps, lane_rows)
        return np.stack([step, block[segment], first[segment] + offset[i] + cuts - starts[i], lengths])

    @staticmethod
    def _step_of(place: np.ndarray, steps: int, lane_rows: int) -> np.ndarray:
        """The step of so many to which the rows at ``place`` of a lane's stream belong."""
        return ((place + 1) * steps - 1) // lane_rows


_NONE = np.empty((4, 0), dtype=np.int64)


def _permutation(n: int, seed: int, epoch: int, stream: int, lane: int, pool: int) -> np.ndarray:
    """A permutation of n from raw Philox words, which NumPy keeps stable over versions (its `permutation` is not)."""
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, stream], dtype=np.uint64)
    counter = np.array([0, epoch, lane, pool], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key, counter=counter).random_raw(n), kind="stable")
