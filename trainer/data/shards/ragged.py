"""Rows of varying length in chunks of one shape: how many entries a slot has room for, and where each run's go.

Shapes: S slots (K steps of A lane groups), B rows of a slot, M entries that a slot has room for.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from trainer.data.fields import CsrRows, RaggedRows, VaryingRows
from trainer.data.plan import Pieces, Plan
from trainer.data.shards.gather import gather
from trainer.data.shards.index import Column


def most_entries(plan: Plan, widest: Sequence[int], entries: int, lanes: int) -> int:
    """M: the entries that ``lanes`` lanes of a step never exceed, in any epoch; padded rows included.

    ``widest``: [j] is the most that 2^j rows of a block have that follow each other; ``entries``: of all rows. The
    rows of a lane's step come in runs: full ones, two that the step cuts, and the short last ones of blocks. So
    windows of 2^j rows that cover n rows in p runs number (n + p (2^j - 1)) / 2^j at most.
    """
    fewest = min(plan.fewest, plan.capacity - 1)
    n = max(fewest, 1)
    cut = _runs(plan, n)
    each = min((n + cut * ((1 << j) - 1) >> j) * most for j, most in enumerate(widest))
    # A lane of a row more holds that row, one of a row less a copy of another: either has no more than the widest.
    times = 1 if plan.most_parts == 1 else 2  # that a step may hold a row
    return max(1, min(lanes * each, times * entries) + lanes * (plan.capacity - fewest) * widest[0])


def _runs(plan: Plan, n: int) -> int:
    """The most runs in which ``n`` rows of a lane's step come."""
    rows, parts = np.sort(plan.block_rows), plan.most_parts
    # Those that n rows touch, and all but two of each part of them whole.
    pools = 2 * parts + n // int(rows[: plan.mixing.pool_blocks].sum())
    short = min(parts * (int((rows % plan.mixing.run_rows > 0).sum()) + 2), plan.mixing.pool_blocks * pools)
    return min(n, n // plan.mixing.run_rows + 2 * parts + short)


class Slots(NamedTuple):
    """Which rows a chunk has: ``runs`` begin at its rows ``place`` [runs]."""

    number: int
    """S."""
    rows: int
    """B."""
    runs: Pieces
    place: np.ndarray
    padded: tuple[np.ndarray, np.ndarray]
    """int64 [padded rows]: the slot and the row of the chunk of each row that repeats the first of its slot."""


Gather = Callable[[list[Column], list[np.ndarray], Pieces, np.ndarray], None]
"""(members, targets, runs, place): copies runs of values of members to ``targets[...][place]``."""
Room = Callable[[Column, int], np.ndarray]
"""(member, count): memory for ``count`` of its values, as they are stored."""


def entries_of(
    column: Column, slots: Slots, most: int, gathered: Gather, room: Room, spare: VaryingRows | None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The offsets [S, B + 1] and the entries of a csr or ragged column, each [S M, ...], of which a slot has ``most``.

    ``spare``: the row of a slot that has none (None where no row is padded). Raises ValueError where a slot has more
    entries than ``most``.
    """
    (of_ends, _), *members = column.members
    runs, place, parts = slots.runs, slots.place, [part for part, _ in members]
    ends = room(of_ends, slots.number * slots.rows)
    gathered([of_ends], [ends], runs, place)
    before = np.zeros(len(place), np.int32)  # where the row before a run ends
    later = np.flatnonzero(runs.first)
    found, ones = np.zeros(len(later), np.int32), np.ones(len(later), np.int64)
    gathered([of_ends], [found], Pieces(runs.block[later], runs.first[later] - 1, ones), np.arange(len(later)))
    before[later] = found
    lengths = np.zeros(len(ends), np.int64)
    np.subtract(ends[1:], ends[:-1], out=lengths[1:])
    lengths[place] = ends[place] - before
    slot, row = slots.padded
    filled = np.zeros(slots.number, dtype=bool)
    filled[place // slots.rows] = True
    lengths[row] = np.where(filled[slot], lengths[slot * slots.rows], len(spare.entries["values"]) if spare else 0)
    offsets = np.zeros((slots.number, slots.rows + 1), np.int64)
    np.cumsum(lengths.reshape(slots.number, slots.rows), axis=1, out=offsets[:, 1:])
    if offsets[:, -1].max() > most:
        raise ValueError(f"{offsets[:, -1].max()} entries in a slot for {most}")
    starts = (offsets[:, :-1] + most * np.arange(slots.number)[:, None]).ravel()
    arrays = [room(part, slots.number * most) for part in parts]
    count = (ends[place + runs.rows - 1] - before).astype(np.int64)
    gathered(parts, arrays, Pieces(runs.block, before.astype(np.int64), count), starts[place])
    for array, part in zip(arrays, parts):
        again = row[filled[slot]]
        source = array.ctypes.data + most * slot[filled[slot]] * array.strides[0]
        gather(source, lengths[again], starts[again], array)
        for at in starts[row[~filled[slot]]].tolist():
            assert spare is not None
            values = spare.entries[part.name.rpartition(".")[2]]
            array[at : at + len(values)] = values
        for number, end in enumerate(offsets[:, -1].tolist()):
            unused = array[number * most + end : (number + 1) * most]
            unused[...] = array[number * most] if column.kind == "ragged" and end else 0
    return offsets, arrays


def rows_of(column: Column, offsets: np.ndarray, entries: list[np.ndarray]) -> VaryingRows:
    """The rows of a column of either kind, from its arrays in the order of its members."""
    if column.kind == "ragged":
        return RaggedRows(offsets, entries[0])
    return CsrRows(offsets, entries[0], entries[1], column.shape[0])
