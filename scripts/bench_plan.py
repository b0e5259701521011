"""An epoch of 10^9 rows in blocks of 8,192, of which there are 122,071: the time and the memory of its plan.

Prints for each part the median seconds over the rounds and the peak of what Python and NumPy allocated (measured in a
round of its own, since that takes time); writes bench/plan.json.
"""

import argparse
import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from trainer.data.plan import Plan
from trainer.data.remainder import EpochRemainder
from trainer.data.shards.files import read_index
from trainer.data.shards.index import Column, Index, Shard, write_index

BLOCKS, BLOCK_ROWS, OF_SHARD = 122_071, 8192, 32
LANES, BATCH = 64, 65_536


def index() -> Index:
    """Of three columns, 33 float32 numbers a row: shards of 32 blocks."""
    columns = (Column("x", "float32", (32,)), Column("y", "float32"), Column("row_id", "int64"))
    shards = []
    for first in range(0, BLOCKS, OF_SHARD):
        blocks = range(first, min(first + OF_SHARD, BLOCKS))
        offsets = {c.name: tuple(1_000_000 * (b - first) + 1024 * i for b in blocks) for i, c in enumerate(columns)}
        hashes = {c.name: tuple(f"{7919 * b + i:016x}" for b in blocks) for i, c in enumerate(columns)}
        rows = (BLOCK_ROWS,) * len(blocks)
        shards.append(Shard(f"{first // OF_SHARD:06d}.tar", 2**28, f"{first:064x}", rows, offsets, hashes))
    return Index(columns, tuple(shards), 0, "train")


def plan(rest: EpochRemainder | None = None) -> Plan:
    return Plan(np.full(BLOCKS, BLOCK_ROWS), 0, LANES, BATCH, rest=rest)


def steps(made: Plan, first: int, count: int = 1) -> int:
    """The rows of some steps, by all lanes."""
    return sum(int(made.pieces_of(first, count, lane)[1].rows.sum()) for lane in range(made.lanes))


def measured(work: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Seconds, and megabytes at the peak."""
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return median(seconds), peak / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    given = parser.parse_args()
    epoch = plan().steps_per_epoch
    middle = 3 * epoch + epoch // 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_index(folder, index())
        size = (folder / "index.json").stat().st_size
        work = {
            f"index.json ({size / 1e6:.1f} MB) read, checked and parsed": lambda: read_index(folder),
            f"the plan, and its first step on all {LANES} lanes": lambda: steps(plan(), 0),
            "a seek into the middle of the fourth epoch": lambda: steps(plan(), middle),
            "that with another batch size and other lanes from there on": lambda: steps(
                Plan(np.full(BLOCKS, BLOCK_ROWS), 0, 48, 48 * 512, rest=plan().rest_at(middle)), middle
            ),
            "one lane of a rank of 64, 64 steps from there": lambda: plan().pieces_of(middle, 64, 5),
        }
        found = {name: measured(each, given.rounds) for name, each in work.items()}
    shown = Table("", "seconds", "peak MB", title=f"{BLOCKS * BLOCK_ROWS:,} rows, {BATCH:,} a step")
    for name, (seconds, peak) in found.items():
        shown.add_row(name, f"{seconds:.3f}", f"{peak:.1f}")
    Console(soft_wrap=True).print(shown)
    given.out.mkdir(exist_ok=True)
    (given.out / "plan.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
