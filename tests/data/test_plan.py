"""The plan against its definition spelled out with lists, over thousands of shapes; no process, no file."""

import re
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trainer.data import plan as planning
from trainer.data.plan import Pieces, Plan, _permutation, default_lanes
from trainer.errors import UserError
from trainer.lit.datamodule import Ranks

many = settings(max_examples=1500, deadline=None, derandomize=True, database=None)
Row = tuple[int, int]  # block, row in it


@st.composite
def shapes(draw: st.DrawFn) -> dict:
    """Arguments of a plan; blocks of 1 to 30 rows, at least one row in all, lanes that may outnumber the rows."""
    lanes = draw(st.integers(1, 16))
    block_rows = draw(st.lists(st.integers(1, 30), min_size=1, max_size=10))
    share = draw(st.integers(1, 12))
    return {
        "block_rows": np.array(block_rows),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "lanes": lanes,
        "batch_size": draw(st.sampled_from([lanes * share, sum(block_rows), 10**6])),
        "run_rows": draw(st.integers(1, 9)),
        "pool_blocks": draw(st.integers(1, 4)),
    }


def definition(epoch: int, block_rows, seed, lanes, batch_size, run_rows, pool_blocks) -> list[list[list[Row]]]:
    """[T][L] lists of rows: what the docstring of `plan` says, with every row of the epoch in memory."""
    order = _permutation(len(block_rows), seed, epoch, 0, 0, 0)
    stream = [(int(b), row) for b in order for row in range(block_rows[b])]
    steps = -(-len(stream) // min(batch_size, len(stream)))
    shares = []
    for lane in range(lanes):
        part = stream[lane * len(stream) // lanes : (lane + 1) * len(stream) // lanes]
        segments = [[row for row in part if row[0] == b] for b in order]
        segments = [segment for segment in segments if segment]
        shuffled: list[Row] = []
        for pool, first in enumerate(range(0, len(segments), pool_blocks)):
            runs = [
                segment[i : i + run_rows]
                for segment in segments[first : first + pool_blocks]
                for i in range(0, len(segment), run_rows)
            ]
            shuffled += [row for i in _permutation(len(runs), seed, epoch, 1, lane, pool) for row in runs[i]]
        n = len(shuffled)
        shares.append([shuffled[t * n // steps : (t + 1) * n // steps] for t in range(steps)])
    return [list(lanes_of_step) for lanes_of_step in zip(*shares)]


def rows(pieces: Pieces) -> list[Row]:
    """The rows of runs, one by one."""
    return [(b, first + i) for b, first, n in zip(*(column.tolist() for column in pieces)) for i in range(n)]


def lanes_of_step(plan: Plan, step: int) -> list[list[Row]]:
    return [rows(plan.pieces(step, lane)) for lane in range(plan.lanes)]


def divisors(n: int, most: int = 8) -> Iterator[int]:
    return (w for w in range(1, most + 1) if n % w == 0)


@many
@given(shapes(), st.integers(0, 3))
def test_every_row_once_in_balanced_batches(shape: dict, epoch: int) -> None:
    plan = Plan(**shape)
    total, steps = sum(shape["block_rows"]), plan.steps_per_epoch
    batches = [lanes_of_step(plan, epoch * steps + t) for t in range(steps)]
    every = [row for batch in batches for lane in batch for row in lane]
    assert len(every) == plan.num_rows == total
    assert set(every) == {(b, i) for b, n in enumerate(shape["block_rows"]) for i in range(n)}
    assert steps == -(-total // min(shape["batch_size"], total))
    sizes = np.array([[len(lane) for lane in batch] for batch in batches])  # [T, L]
    assert sizes.tolist() == [plan.rows_at(epoch * steps + t).tolist() for t in range(steps)]
    assert (np.ptp(sizes, axis=0) <= 1).all()
    assert sizes.sum(1).max() <= min(shape["batch_size"], total)
    assert sizes.max() == plan.capacity
    assert np.ptp(sizes.sum(0)) <= 1


@many
@given(shapes(), st.integers(0, 40), st.integers(1, 40))
def test_many_steps_at_once_are_the_single_ones(shape: dict, first: int, steps: int) -> None:
    """Over the ends of epochs and pools, with steps in which a lane has no row."""
    plan = Plan(**shape)
    assert np.array_equal(
        plan.rows_at(np.arange(first, first + steps)), [plan.rows_at(first + k) for k in range(steps)]
    )
    for lane in range(plan.lanes):
        step, runs = plan.pieces_of(first, steps, lane)
        assert (runs.rows > 0).all()
        assert step.tolist() == sorted(step)
        for k in range(steps):
            assert rows(Pieces(*(column[step == first + k] for column in runs))) == rows(plan.pieces(first + k, lane))


@many
@given(shapes(), st.integers(0, 5), st.data())
def test_any_step_is_its_definition_whatever_was_read_before(shape: dict, epoch: int, data: st.DataObject) -> None:
    """A plan that has read other steps (its caches full of them) and a fresh one, at the position of a resume."""
    expected = definition(epoch, **shape)
    plan = Plan(**shape)
    for t in data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=4)):
        step = epoch * plan.steps_per_epoch + t
        lanes_of_step(plan, data.draw(st.integers(0, 3 * plan.steps_per_epoch)))
        assert lanes_of_step(plan, step) == expected[t]
        assert lanes_of_step(Plan(**shape), step) == expected[t]


@settings(many, max_examples=500)
@given(st.integers(1, 6), st.integers(0, 3), st.integers(1, 8))
def test_ranks_part_the_lanes_in_order_and_keep_the_groups(multiple: int, power: int, draws: int) -> None:
    """For every world size of 1 to 8 and number of draws that divide: draw p always owns the same lanes."""
    lanes = multiple * 2**power
    draws = max(p for p in divisors(lanes) if p <= draws)
    of_draw = [list(range(p * lanes // draws, (p + 1) * lanes // draws)) for p in range(draws)]
    for world in divisors(lanes):
        if world % draws and draws % world:
            continue
        seen: list[list[int]] = [[] for _ in range(draws)]
        for rank in range(world):
            ranks = Ranks(world, rank, lanes, draws)
            assert len(ranks.groups) == len(ranks.lanes_by_group)
            assert len({len(group) for group in ranks.lanes_by_group}) == 1
            assert sum(map(len, ranks.lanes_by_group)) == lanes // world
            for draw, group in zip(ranks.groups, ranks.lanes_by_group):
                seen[draw] += group
        assert seen == of_draw


def test_a_small_plan_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 3, 5 and 2 rows; every permutation turns the order around."""
    monkeypatch.setattr(planning, "_permutation", lambda n, *key: np.arange(n)[::-1])
    plan = Plan(np.array([3, 5, 2]), 0, lanes=2, batch_size=4, run_rows=2, pool_blocks=2)
    assert (plan.steps_per_epoch, plan.capacity, plan.lane_ends.tolist()) == (3, 2, [0, 5, 10])
    assert [lanes_of_step(plan, t) for t in range(3)] == [
        [[(1, 2)], [(0, 2)]],
        [[(1, 0), (1, 1)], [(0, 0), (0, 1)]],
        [[(2, 0), (2, 1)], [(1, 3), (1, 4)]],
    ]
    assert [plan.rows_at(t).tolist() for t in range(3)] == [[1, 1], [2, 2], [2, 2]]


@many
@given(shapes(), st.integers(1, 400), st.integers(1, 8))
def test_a_batch_that_lanes_cannot_share_is_refused_and_the_remedies_work(shape: dict, size: int, world: int) -> None:
    total = int(sum(shape["block_rows"]))

    def refused(sentence: str, start: str) -> list[int]:
        assert sentence.startswith(start)
        assert "\n" not in sentence
        return [int(n) for n in re.findall(r"(?:batch_size=| or )(\d+)", sentence)]

    shape["batch_size"] = size
    if size % shape["lanes"] == 0 or size >= total:
        assert Plan(**shape).batch_size == min(size, total)
    else:
        with pytest.raises(UserError) as error:
            Plan(**shape)
        remedies = refused(str(error.value), f"batch_size({size}) % lanes({shape['lanes']}) != 0")
        assert min(abs(size - n) for n in remedies) < shape["lanes"]
        for shape["batch_size"] in remedies:
            assert Plan(**shape)
    if total < world or (size % world and size < total):
        with pytest.raises(UserError) as error:
            default_lanes(size, world, total)
        if total < world:
            assert str(error.value) == f"rows({total}) < ranks({world}): use fewer ranks."
            return
        remedies = refused(str(error.value), f"batch_size({size}) % ranks({world}) != 0")
        assert remedies
        for remedy in remedies:
            assert default_lanes(remedy, world, total) % world == 0
    else:
        lanes = default_lanes(size, world, total)
        assert lanes % world == 0
        assert lanes <= total
        assert Plan(**{**shape, "batch_size": size, "lanes": lanes}).steps_per_epoch == -(-total // min(size, total))


def test_one_two_four_and_eight_ranks_read_the_same_lanes() -> None:
    assert [default_lanes(4096, world, 10**6) for world in (1, 2, 4, 8)] == [8, 8, 8, 8]
    assert [default_lanes(6, world, 10**6) for world in (1, 2, 3, 6)] == [2, 2, 6, 6]
    assert default_lanes(96, 3, 10**6) == 24


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 0), ("lanes", 0), ("lanes", -8), ("run_rows", 0), ("pool_blocks", -1)]
)
def test_arguments_below_one_are_refused(name: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"{name}={value} must be at least 1\.$"):
        Plan(**{"block_rows": np.array([5, 5]), "seed": 0, "lanes": 2, "batch_size": 4, name: value})


def test_no_rows_are_refused() -> None:
    with pytest.raises(UserError, match="no rows"):
        Plan(np.array([], dtype=np.int64), 0, 1, 4)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def epoch_order(seed: int, epoch: int) -> list[Row]:
        plan = Plan(np.full(6, 40), seed, lanes=2, batch_size=20, run_rows=4)
        first = epoch * plan.steps_per_epoch
        return [row for t in range(plan.steps_per_epoch) for lane in lanes_of_step(plan, first + t) for row in lane]

    orders = [epoch_order(seed, epoch) for seed in (0, 1, 2**32, 2**62) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 16
    assert orders == [epoch_order(seed, epoch) for seed in (0, 1, 2**32, 2**62) for epoch in range(4)]


def test_permutations_are_uniform_keyed_by_every_argument_and_pinned() -> None:
    """What a seed orders may not change between versions: a resumed run would read other rows."""
    assert _permutation(10, 7, 1, 1, 3, 2).tolist() == [8, 0, 6, 4, 5, 9, 2, 3, 1, 7]
    base = (64, 7, 1, 1, 3, 2)
    keys = {tuple(_permutation(*base[:i], base[i] + 1, *base[i + 1 :])) for i in range(1, 6)}
    assert len(keys | {tuple(_permutation(*base))}) == 6
    for argument in range(1, 6):  # 24 permutations of four, over 4,800 values of each argument
        counts: dict[tuple[int, ...], int] = {}
        for value in range(4800):
            found = tuple(_permutation(4, *(value if i == argument else base[i] for i in range(1, 6))))
            counts[found] = counts.get(found, 0) + 1
        assert len(counts) == 24
        assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_a_billion_rows_are_planned_from_their_blocks() -> None:
    """Memory by the block (122,071 of them), not by the row; steps far into a run, offsets beyond 32 bits."""
    blocks = np.full(122_071, 8192)
    tracemalloc.start()
    try:
        plan = Plan(blocks, 3, lanes=64, batch_size=65_536)
        assert (plan.num_rows, plan.steps_per_epoch) == (1_000_005_632, 15_259)
        for step in (0, 15_258, 15_259, 40 * 15_259 + 7_000):
            sizes = plan.rows_at(step)
            assert 65_472 <= sizes.sum() <= 65_536
            for lane in (0, 31, 63):
                pieces = plan.pieces(step, lane)
                assert pieces.rows.sum() == sizes[lane]
                assert (pieces.first >= 0).all()
                assert (pieces.first + pieces.rows <= blocks[pieces.block]).all()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100 * len(blocks)  # bytes; one byte a row would be 8,192 times the blocks
