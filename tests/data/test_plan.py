"""The plan against its definition spelled out with lists, over thousands of shapes; no process, no file."""

import json
import re
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trainer.data import plan as planning
from trainer.data.lanes import default_lanes
from trainer.data.plan import Mixing, Pieces, Plan, _permutation
from trainer.data.remainder import EpochRemainder, Part
from trainer.engine.datamodule import Ranks
from trainer.errors import UserError

many = settings(max_examples=500, deadline=None, derandomize=True, database=None)
Row = tuple[int, int]  # block, row in it


@st.composite
def shapes(draw: st.DrawFn) -> dict:
    """Arguments of a plan; blocks of 1 to 30 rows, at least one row in all, lanes that may outnumber the rows."""
    lanes = draw(st.integers(1, 16))
    block_rows = draw(st.lists(st.integers(1, 30), min_size=1, max_size=10))
    share = draw(st.integers(1, 12))
    new_shard = draw(st.lists(st.integers(0, 1), min_size=len(block_rows), max_size=len(block_rows)))
    return {
        "block_rows": np.array(block_rows),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "lanes": lanes,
        "batch_size": draw(st.sampled_from([lanes * share, sum(block_rows), 10**6])),
        "mixing": Mixing(
            run_rows=draw(st.integers(1, 9)),
            pool_blocks=draw(st.integers(1, 4)),
            shard_of=np.cumsum(new_shard) - new_shard[0],
            shards_together=draw(st.integers(0, 3)),
        ),
    }


def definition(epoch: int, block_rows, seed, lanes, batch_size, mixing: Mixing) -> list[list[list[Row]]]:
    """[T][L] lists of rows: what the docstring of `plan` says, with every row of the epoch in memory."""
    run_rows, pool_blocks, shard_of, shards_together = vars(mixing).values()
    order = _permutation(len(block_rows), seed, epoch, 0, 0, 0)
    if shards_together:
        shards = _permutation(shard_of[-1] + 1, seed, epoch, 2, 0, 0).tolist()
        groups = [shards[i : i + shards_together] for i in range(0, len(shards), shards_together)]
        order = [b for group in groups for b in order if shard_of[b] in group]
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


@settings(many, max_examples=300)
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


@st.composite
def takeovers(draw: st.DrawFn, total: int) -> tuple[int, int, int]:
    """(steps until then, lanes, batch size)."""
    lanes = draw(st.integers(1, 12))
    batch_size = draw(st.sampled_from([lanes * draw(st.integers(1, 8)), total, 10**6]))
    return draw(st.integers(0, 12)), lanes, batch_size


@settings(many, max_examples=300)
@given(shapes(), st.data())
def test_every_row_once_an_epoch_over_any_changes_of_lanes_and_batch_size(shape: dict, data: st.DataObject) -> None:
    """Of each launch the steps until the next, which may have no step between; the last goes on for two epochs."""
    plan, total, first = Plan(**shape), int(sum(shape["block_rows"])), 0
    changes = data.draw(st.lists(takeovers(total), max_size=6))
    taken = dict.fromkeys([(b, i) for b, n in enumerate(shape["block_rows"]) for i in range(n)], 0)
    for steps, *change in [*changes, (None,)]:
        stop = plan.first_whole + 2 * plan.steps_per_epoch if steps is None else first + steps
        for step in range(first, stop):
            lanes = lanes_of_step(plan, step)
            sizes = [len(lane) for lane in lanes]
            assert sizes == plan.rows_at(step).tolist()
            assert plan.fewest <= min(sizes) <= max(sizes) <= plan.capacity
            assert 0 < sum(sizes) <= -(-plan.batch_size // plan.lanes) * plan.lanes
            for row in (row for lane in lanes for row in lane):
                taken[row] += 1
            epochs = sum(taken.values()) / total
            assert plan.epochs_at(step + 1) == pytest.approx(epochs)
            if plan.begins(step + 1):
                assert plan.step_after(epochs) == step + 1
                assert set(taken.values()) == {epochs}
        first = stop
        if steps is not None:
            rest = EpochRemainder.of(json.loads(json.dumps(plan.rest_at(first).plain())))
            assert rest == plan.rest_at(first)
            assert rest.rows < 2 * total
            old, shape = plan, shape | {"lanes": change[0], "batch_size": change[1], "rest": rest}
            plan = Plan(**shape)
            assert plan.epochs_at(first) == pytest.approx(old.epochs_at(first))
            assert len({part.epoch for part in rest.parts}) <= 3
    assert len(set(taken.values())) == 1


@settings(many, max_examples=300)
@given(shapes(), st.integers(0, 30), st.integers(1, 8), st.data())
def test_what_is_left_is_cut_as_an_epoch_is(shape: dict, step: int, share: int, data: st.DataObject) -> None:
    """With the next one, in balanced steps, none of them small; in the order that the epoch had."""
    old = Plan(**shape)
    lanes = data.draw(st.integers(1, 12))
    plan = Plan(**{**shape, "lanes": lanes, "batch_size": lanes * share}, rest=old.rest_at(step))
    epoch, t = divmod(step, old.steps_per_epoch)
    end = (epoch + 1) * old.steps_per_epoch
    if t == 0:
        assert plan.rest == EpochRemainder(step, epoch, ())
        assert plan.first_whole == step
        return
    stream = [row for lane in range(old.lanes) for t in range(step, end) for row in rows(old.pieces(t, lane))]
    next_one = Plan(**{**shape, "lanes": lanes, "batch_size": lanes * share})
    first = (epoch + 1) * next_one.steps_per_epoch
    ends = np.arange(lanes + 1) * len(stream) // lanes
    for lane in range(lanes):
        found = [row for s in range(step, plan.first_whole) for row in rows(plan.pieces(s, lane))]
        after = [r for s in range(next_one.steps_per_epoch) for r in rows(next_one.pieces(first + s, lane))]
        assert found == stream[ends[lane] : ends[lane + 1]] + after
    sizes = np.array([plan.rows_at(s) for s in range(step, plan.first_whole)])
    assert (np.ptp(sizes, axis=0) <= 1).all()
    assert sizes.max() <= min(share, -(-plan.num_rows // lanes))
    assert len(sizes) <= -(-(len(stream) + plan.num_rows + 2 * lanes) // plan.batch_size)


def test_a_rest_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten rows in two lanes of five, three steps of which one is taken; then three lanes, of six rows a step."""
    monkeypatch.setattr(planning, "_permutation", lambda n, *key: np.arange(n))
    shape = {"block_rows": np.array([10]), "seed": 0, "mixing": Mixing(run_rows=1, pool_blocks=1)}
    rest = Plan(**shape, lanes=2, batch_size=4).rest_at(1)
    assert rest == EpochRemainder(1, 1, (Part(0, 2, 0, 1, 5), Part(0, 2, 1, 1, 5)))
    plan = Plan(**shape, lanes=3, batch_size=6, rest=rest)
    assert (plan.first_whole, plan.steps_per_epoch, plan.capacity, plan.most_parts) == (5, 2, 2, 3)
    assert [[[row for _, row in lane] for lane in lanes_of_step(plan, t)] for t in range(1, 5)] == [
        [[1], [3], [7]],
        [[2], [4, 6], [8, 9]],
        [[0], [3], [6, 7]],
        [[1, 2], [4, 5], [8, 9]],
    ]
    assert [plan.epochs_at(t) for t in (1, 5, 6)] == pytest.approx([0.2, 2.0, 2.4])
    assert [plan.step_after(epochs) for epochs in (0.1, 0.2, 0.3, 2, 2.25, 3)] == [1, 1, 2, 5, 6, 7]
    assert [step for step in range(1, 9) if plan.begins(step)] == [1, 5, 7]


def test_a_small_plan_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 3, 5 and 2 rows; every permutation turns the order around."""
    monkeypatch.setattr(planning, "_permutation", lambda n, *key: np.arange(n)[::-1])
    plan = Plan(np.array([3, 5, 2]), 0, lanes=2, batch_size=4, mixing=Mixing(run_rows=2, pool_blocks=2))
    assert (plan.steps_per_epoch, plan.capacity, plan._lane_ends(2).tolist()) == (3, 2, [0, 5, 10])
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
    shape = {"block_rows": np.array([5, 5]), "seed": 0, "lanes": 2, "batch_size": 4}
    wrong = {name: value} if name in shape else {"mixing": Mixing(**{name: value})}
    with pytest.raises(UserError, match=rf"{name}={value} must be at least 1\.$"):
        Plan(**{**shape, **wrong})


def test_no_rows_are_refused() -> None:
    with pytest.raises(UserError, match="no rows"):
        Plan(np.array([], dtype=np.int64), 0, 1, 4)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def epoch_order(seed: int, epoch: int) -> list[Row]:
        plan = Plan(np.full(6, 40), seed, lanes=2, batch_size=20, mixing=Mixing(run_rows=4))
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
