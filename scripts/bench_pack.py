"""Packing 10^7 rows of float32 columns from Parquet, beside pyarrow's read of the same file into memory.

The columns are noise, in row groups of 10^6 rows as pyarrow writes them (Snappy); all but the last are stacked as x,
the last is y. Each round reads and packs once with the same number of threads, pages of the file in memory, so that
both see the same noise of a shared machine; a plain copy of the file with its sha256, made durable, is timed too.
Prints medians of seconds (wall and of the CPU) and of the rounds' ratios; writes bench/pack.json. The files lie below
--folder (default: the temporary folder) and are removed.
"""

import argparse
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.packing.pack import pack

GROUP_ROWS = 10**6


def write_table(path: Path, rows: int, columns: int) -> None:
    """``rows`` rows of noise in ``columns`` float32 columns."""
    generator = np.random.default_rng(0)
    schema = pa.schema([(f"c{i}", pa.float32()) for i in range(columns)])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, GROUP_ROWS):
            count = min(GROUP_ROWS, rows - first)
            writer.write_table(pa.table({n: generator.standard_normal(count, dtype=np.float32) for n in schema.names}))


def copy_with_hash(source: Path, target: Path) -> None:
    """Copies a file, hashing it on the way, and makes it durable."""
    digest = hashlib.sha256()
    with source.open("rb") as reading, target.open("wb") as writing:
        while piece := reading.read(1 << 20):
            digest.update(piece)
            writing.write(piece)
        writing.flush()
        os.fsync(writing.fileno())


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock and of the CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(folder: Path, rows: int, columns: int, threads: int, rounds: int, memory_bytes: int) -> dict[str, object]:
    """Reads, packs and copies in turn."""
    table, out = folder / "t.parquet", folder / "out"
    write_table(table, rows, columns)
    names = [f"c{i}" for i in range(columns)]
    pa.set_cpu_count(threads)
    works: dict[str, Callable[[], object]] = {
        "read": lambda: pq.read_table(table, use_threads=threads > 1),
        "pack": lambda: pack(
            table, out, columns={"x": names[:-1], "y": names[-1]}, workers=threads, memory_bytes=memory_bytes
        ),
        "copy": lambda: copy_with_hash(table, folder / "copy"),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            took = timed(work)
            if turn:  # the first warms the pages
                seconds[name].append(took)
        shutil.rmtree(out)
        (folder / "copy").unlink()
    table.unlink()

    def ratio(name: str, kind: int) -> float:
        return median(a[kind] / b[kind] for a, b in zip(seconds[name], seconds["pack"]))

    return {
        "rows": rows,
        "columns": columns,
        "threads": threads,
        "memory_bytes": memory_bytes,
        **{f"{name}_seconds": median(wall for wall, _ in took) for name, took in seconds.items()},
        **{f"{name}_cpu_seconds": median(cpu for _, cpu in took) for name, took in seconds.items()},
        "of_the_read": ratio("read", 0),
        "of_the_read_by_cpu": ratio("read", 1),
        "of_the_copy": ratio("copy", 0),
        "of_the_copy_by_cpu": ratio("copy", 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10**7)
    parser.add_argument("--columns", type=int, nargs="+", default=[10, 33])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-bytes", type=float, default=1 << 30)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("bench/pack.json"))
    given = parser.parse_args()
    results = []
    print(
        f"{'columns':>7} {'threads':>7} {'read':>7} {'pack':>7} {'copy':>7}  of the read (by cpu)  of the copy (by cpu)"
    )
    for columns in given.columns:
        for threads in given.threads:
            with TemporaryDirectory(dir=given.folder) as folder:
                found = measure(Path(folder), given.rows, columns, threads, given.rounds, int(given.memory_bytes))
            results.append(found)
            print(
                f"{columns:7} {threads:7} {found['read_seconds']:6.2f}s {found['pack_seconds']:6.2f}s "
                f"{found['copy_seconds']:6.2f}s {found['of_the_read']:12.2f} ({found['of_the_read_by_cpu']:.2f}) "
                f"{found['of_the_copy']:14.2f} ({found['of_the_copy_by_cpu']:.2f})",
                flush=True,
            )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"rounds": given.rounds, "results": results}, indent=1))
    print(f"written: {given.out}")


if __name__ == "__main__":
    main()
