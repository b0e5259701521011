"""The shuffle: the hash is a uniform bijection, and runs give back what they were given."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from shard_tools import csr

from trainer.data.packing.columns import Recipe
from trainer.data.packing.runs import Runs, RunsFile
from trainer.data.packing.shuffle import CELLS, PLACE, cells_of, in_order, scramble


def test_scramble_is_a_uniform_bijection() -> None:
    places = scramble(np.arange(200_000), 0, 0)
    assert len(np.unique(places)) == len(places)
    for shift in (58, 30, 0):  # high, middle and low bits
        counts = np.bincount((places >> np.uint64(shift) & np.uint64(63)).astype(np.int64), minlength=64)
        assert stats.chisquare(counts).pvalue > 1e-3
    # neighbors, and the two streams, are independent: 16 x 16 cells
    high = (places >> np.uint64(60)).astype(np.int64)
    for other in (np.roll(high, 1), (scramble(places, 0, 1) >> np.uint64(60)).astype(np.int64)):
        assert stats.chisquare(np.bincount(16 * high + other, minlength=256)).pvalue > 1e-3


def test_scramble_is_pinned() -> None:
    """What a seed packs may not change between versions of numpy, or of this program."""
    assert scramble(np.array([0, 1, -1]), 0, 0).tolist() == [
        16623371667256809469,
        429404410292939812,
        15875620853186285172,
    ]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_split_fraction(fraction: float) -> None:
    count = 100_000
    places = scramble(np.arange(count), 7, 0)
    held = int((scramble(places, 7, 1) < np.uint64(int(fraction * 2**64))).sum())
    assert stats.binomtest(held, count, fraction).pvalue > 1e-3


def test_cells_cut_the_order_into_ranges_and_sides() -> None:
    places = scramble(np.arange(100_000), 0, 0)
    held = places % np.uint64(3) == 0
    cells = cells_of(places, held)
    assert np.array_equal(cells >= CELLS, held)
    for side in (False, True):
        order = np.argsort(places[held == side])
        assert (np.diff(cells[held == side][order].astype(int)) >= 0).all()
        assert np.bincount(cells[held == side][order] % CELLS, minlength=CELLS).max() < 20


@pytest.mark.parametrize("folder", [False, True])
def test_runs_give_back_the_rows_of_any_cells(tmp_path: Path, folder: bool) -> None:
    """In memory or in a file, in whatever pieces they came."""
    recipes = [Recipe("x", ("x",), False, (3,), "float32"), Recipe("w", ("w",), False, (50,), "uint16", kind="csr")]
    runs = RunsFile(recipes, tmp_path / "rows") if folder else Runs(recipes)
    rows, words = 5000, csr(5000)
    places = scramble(np.arange(rows), 0, 0)
    x = np.repeat(np.arange(rows, dtype=np.float32)[:, None], 3, axis=1)
    for first, stop in itertools.pairwise([0, 1, 700, 5000]):
        here = slice(first, stop)
        part = {PLACE: places[here], "row_id": np.arange(first, stop), "x": x[here], "w": words[here]}
        runs.add(part, np.arange(first, stop) % 4 == 0)
    cells = cells_of(places, np.arange(rows) % 4 == 0)
    assert np.array_equal(runs.counts, np.bincount(cells, minlength=2 * CELLS))
    for low, high in ((0, CELLS), (CELLS, 2 * CELLS), (100, 3000), (7, 7)):
        found = runs.load(low, high)
        ids = found["row_id"]
        assert np.array_equal(np.sort(ids), np.flatnonzero((cells >= low) & (cells < high)))
        assert np.array_equal(found["x"], x[ids])
        assert np.array_equal(found[PLACE], places[ids])
        assert np.array_equal(found["w"].offsets, words[ids].offsets)
        assert np.array_equal(found["w"].indices, words[ids].indices)
        assert np.array_equal(found["w"].values, words[ids].values)
    if isinstance(runs, RunsFile):
        runs.close({})


def test_what_shares_a_place_is_ordered_by_id() -> None:
    places = np.array([5, 2, 5, 2, 9], np.uint64)
    assert in_order(places, np.array([8, 7, 3, 1, 0])).tolist() == [3, 1, 2, 0, 4]
