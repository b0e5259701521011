"""The reader alone on 10^6 rows of 33 float32 (x [32], y) in shards, pages in memory, beside a straight copy.

Each round reads an epoch in one thread (`Reader.chunk` into memory that takes turns) and copies the same bytes once, so
that both see the same noise of a shared machine. Prints medians in million rows a second and the median of the rounds'
ratios; writes bench/reader.json. What came first, checking blocks and touching pages, is not counted.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from trainer.data.index import ROW_ID, Column, Index, write_index
from trainer.data.plan import Plan
from trainer.data.reader import Reader, ShardFolder
from trainer.data.shards import ShardWriter

FEATURES, BLOCK_ROWS, LANES = 32, 8192, 8
COLUMNS = (Column("x", "float32", (FEATURES,)), Column("y", "float32", ()), Column(ROW_ID, "int64", ()))
# Steps of a chunk for each batch size: one, and some that make chunks of about 1 to 130 MB.
CHUNKS = {256: (1, 64, 1024), 4096: (1, 16, 64, 245), 65536: (1, 4, 15)}


def write_shards(folder: Path, rows: int) -> ShardFolder:
    """``rows`` rows of noise, in blocks."""
    generator = np.random.default_rng(0)
    writer = ShardWriter(folder, COLUMNS, 256 * 2**20)
    for first in range(0, rows, BLOCK_ROWS):
        ids = np.arange(first, min(first + BLOCK_ROWS, rows))
        x = generator.standard_normal((len(ids), FEATURES), dtype=np.float32)
        writer.write({"x": x, "y": x.sum(1), ROW_ID: ids})
    write_index(folder, Index(COLUMNS, writer.close(), 0, "train"))
    return ShardFolder(folder)


def seconds_of_epochs(folder: ShardFolder, batch_size: int, slots: int, run_rows: int) -> Iterator[float]:
    """Reads an epoch for each time that it is asked."""
    plan = Plan(folder.block_rows, 0, LANES, batch_size, run_rows)
    reader = Reader(folder, plan, ("x", "y"), [list(range(LANES))], floats=np.dtype(np.float32))
    memory = cycle([{}, {}, {}])  # type: ignore[var-annotated]
    steps, first = plan.steps_per_epoch, 0
    while True:
        began = time.perf_counter()
        for step in range(0, steps, slots):
            reader.chunk(first + step, min(slots, steps - step), next(memory))
        yield time.perf_counter() - began
        first += steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(CHUNKS), choices=list(CHUNKS))
    parser.add_argument("--run-rows", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--out", type=Path, default=Path("bench/reader.json"))
    given = parser.parse_args()
    source = np.ones((given.rows, FEATURES + 1), dtype=np.float32)
    target = np.ones_like(source)
    results = []
    print(f"{'batch':>6} {'K':>5} {'run_rows':>8} {'reader':>8} {'copy':>8} {'ratio':>6}   (million rows/s)")
    with TemporaryDirectory() as path:
        folder = write_shards(Path(path), given.rows)
        settings = [(b, k, r) for b in given.batch_sizes for k in CHUNKS[b] for r in given.run_rows]
        for batch_size, slots, run_rows in settings:
            epochs = seconds_of_epochs(folder, batch_size, slots, run_rows)
            next(epochs), next(epochs)
            reads, copies = [], []
            for _ in range(given.rounds):
                reads.append(next(epochs))
                began = time.perf_counter()
                np.copyto(target, source)
                copies.append(time.perf_counter() - began)
            result = {
                "batch_size": batch_size,
                "slots": slots,
                "run_rows": run_rows,
                "reader_rows_per_second": given.rows / median(reads),
                "copy_rows_per_second": given.rows / median(copies),
                "of_a_copy": median(copy / read for read, copy in zip(reads, copies)),
            }
            results.append(result)
            reader, copy = result["reader_rows_per_second"] / 1e6, result["copy_rows_per_second"] / 1e6
            ratio = result["of_a_copy"]
            print(f"{batch_size:6} {slots:5} {run_rows:8} {reader:8.1f} {copy:8.1f} {ratio:6.2f}", flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"rows": given.rows, "rounds": given.rounds, "results": results}, indent=1))
    print(f"written: {given.out}")


if __name__ == "__main__":
    main()
