"""The shuffle: the hash is a uniform bijection, and buckets keep every row within the memory."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from trainer.data.shuffle import PLACE, Buckets, scramble


def test_scramble_is_a_uniform_bijection() -> None:
    places = scramble(np.arange(200_000), 0, 0)
    assert len(np.unique(places)) == len(places)
    for shift in (58, 30, 0):  # high, middle and low bits
        counts = np.bincount((places >> np.uint64(shift) & np.uint64(63)).astype(np.int64), minlength=64)
        assert stats.chisquare(counts).pvalue > 1e-3
    # neighbours, and the two streams, are independent: 16 x 16 cells
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


def test_the_largest_bucket_fits_the_memory(tmp_path: Path) -> None:
    dtype = np.dtype([(PLACE, "uint64"), ("row_id", "int64"), ("x", "float32", (4,))])
    memory, count = 1 << 17, 50_000
    buckets = Buckets(tmp_path / "buckets", dtype, count, memory)
    for first in range(0, count, 1000):
        records = np.zeros(1000, dtype)
        records["row_id"] = np.arange(first, first + 1000)
        records[PLACE] = scramble(records["row_id"], 0, 0)
        buckets.add(records)
    read = list(buckets)
    assert len(read) == buckets.count > count * dtype.itemsize // memory
    assert max(bucket.nbytes + 8 * len(bucket) for bucket in read) <= memory
    assert all(one[PLACE].max() < two[PLACE].min() for one, two in itertools.pairwise(read))
    assert np.array_equal(np.sort(np.concatenate([bucket["row_id"] for bucket in read])), np.arange(count))
    assert Buckets(tmp_path / "none", dtype, count, count * 64).count == 1
    assert not (tmp_path / "none").exists()
