"""A global shuffle in bounded memory: a keyed hash gives every row its place, buckets cut the order into ranges.

The place of a row is a 64-bit number, a bijection of its id, so the order is one sort that no bound on memory changes:
bucket b of n holds the places in [b/n, (b+1)/n) · 2**64, and the buckets, each sorted, are the sorted whole.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

PLACE = "#place"  # the uint64 field of a record
INDEX_BYTES = 24  # a row's share of the sort: its place, its position, a flag, and the copies that they need


def scramble(ids: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """64 random bits for each of ``ids`` [B], a bijection for every (seed, stream): SplitMix64 at counter ``ids``.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    start = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)
    bits = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return bits


class Buckets:
    """At most ``rows`` records of ``dtype`` in buckets by their `PLACE`: one in memory, or files in ``folder``.

    There are as many as it takes for one to fit ``memory_bytes`` with the index that sorts it, and a quarter to spare,
    since their sizes are random.
    """

    def __init__(self, folder: Path, dtype: np.dtype, rows: int, memory_bytes: int):
        needed = rows * (dtype.itemsize + INDEX_BYTES)
        self.count = 1 if needed <= memory_bytes else -(-5 * needed // (4 * memory_bytes))
        self._folder, self._dtype, self._filled = folder, dtype, 0
        self._memory = np.empty(rows if self.count == 1 else 0, dtype)
        if self.count > 1:
            folder.mkdir()

    def add(self, records: np.ndarray) -> None:
        """Puts each of ``records`` into its bucket; within a bucket they keep the order in which they came."""
        if self.count == 1:
            self._memory[self._filled : self._filled + len(records)] = records
            self._filled += len(records)
            return
        bucket = ((records[PLACE] >> np.uint64(32)) * np.uint64(self.count) >> np.uint64(32)).astype(np.int64)
        records = records.take(np.argsort(bucket, kind="stable"))
        ends = np.bincount(bucket, minlength=self.count).cumsum()
        for number, (first, last) in enumerate(zip([0, *ends[:-1]], ends)):
            if first < last:  # opened anew each time: there may be more buckets than a process may open files
                with open(self._folder / str(number), "ab") as file:
                    file.write(records[first:last].data)

    def __iter__(self) -> Iterator[np.ndarray]:
        """The buckets in the order of their places."""
        if self.count == 1:
            yield self._memory[: self._filled]
            return
        for number in range(self.count):
            path = self._folder / str(number)
            if path.exists():
                yield np.fromfile(path, self._dtype)

    def remove(self) -> None:
        """Removes the files."""
        if self.count > 1:
            shutil.rmtree(self._folder)
