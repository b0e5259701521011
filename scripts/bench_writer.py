"""Packing with our writer of tar files, and with WebDataset's TarWriter in its place: the record of a decision.

A table of noise is packed by each in turn, pages of the file in memory; the shards of both are verified. Also what
importing webdataset adds to the start of `svi shard`. Prints medians of seconds (wall and of the CPU) and, of the
shards' members, whether both wrote the same bytes. The files lie below --folder (default: the temporary folder).
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import webdataset
import xxhash

from scripts.bench_pack import timed, write_table
from trainer.data.fields import Rows
from trainer.data.packing import emit
from trainer.data.packing.pack import pack
from trainer.data.shards.tar import RECORD, ShardWriter, member_name, npy_header, padding, tar_header
from trainer.data.shards.verify import verify

START = """
import re, time, trainer.verbs.shard{more}
print(time.process_time(), int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024)
"""


class StockWriter(ShardWriter):
    """As `ShardWriter`, of dense columns, the bytes by `webdataset.TarWriter`; its shards end with more zeros."""

    def write(self, block: Mapping[str, Rows]) -> None:
        if self._file is None:
            self._start()
            options: dict[str, Any] = {"user": "", "group": "", "mode": 0o644, "mtime": 0}
            self._tar = webdataset.TarWriter(_Target(self), encoder=False, **options)
        for column in self.columns:
            values = np.ascontiguousarray(block[column.name], column.dtype)
            data = npy_header(column, len(values)) + values.tobytes()
            digest = xxhash.xxh3_64(tar_header(member_name(self.blocks, column.name), len(data)))
            digest.update(data)
            digest.update(bytes(padding(len(data))))
            self._offsets.setdefault(column.name, []).append(self._tar.tarstream.offset)
            self._xxh3.setdefault(column.name, []).append(digest.hexdigest())
            self._tar.write({"__key__": f"{self.blocks:08d}", f"{column.name}.npy": data})
        self._rows.append(len(values))
        self.blocks += 1

    def _finish(self) -> None:
        self._tar.close()
        super()._finish()


class _Target:
    """The open shard, as a file to write to."""

    def __init__(self, writer: ShardWriter):
        self.writer = writer

    def write(self, data: bytes) -> None:
        self.writer._put(data)


def same_members(ours: Path, stock: Path) -> bool:
    """Whether the shards differ only in the zeros at their ends."""
    for file in ours.glob("*/*.tar"):
        members = file.read_bytes()[: -2 * RECORD]
        rest = (stock / file.relative_to(ours)).read_bytes().removeprefix(members)
        if any(rest):
            return False
    return True


def starts(rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds of the CPU, and MB, of `svi shard` before it does anything; without and with webdataset."""
    found = {}
    for name, more in (("ours", ""), ("WebDataset", ", webdataset")):
        command = [sys.executable, "-c", START.format(more=more)]
        runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(rounds + 1)]
        seconds, memory = zip(*(map(float, run.split()) for run in runs[1:]))
        found[name] = median(seconds), median(memory)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2 * 10**6)
    parser.add_argument("--columns", type=int, default=33)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    for name, (cpu, memory) in starts(given.rounds).items():
        print(f"{name:>10}: svi shard has loaded after {cpu:.2f} s of the CPU, with {memory:.0f} MB", flush=True)
    with TemporaryDirectory(dir=given.folder) as folder:
        table, names = Path(folder) / "t.parquet", [f"c{i}" for i in range(given.columns)]
        write_table(table, given.rows, given.columns)
        for columns, shown in (({"x": names[:-1], "y": names[-1]}, "stacked"), (None, "each alone")):
            for threads in given.threads:
                took: dict[str, list[tuple[float, float]]] = {"ours": [], "WebDataset": []}
                for turn in range(given.rounds + 1):
                    for name, writer in (("ours", ShardWriter), ("WebDataset", StockWriter)):
                        emit.ShardWriter = writer  # type: ignore[misc]
                        out = Path(folder) / name
                        shutil.rmtree(out, ignore_errors=True)
                        seconds = timed(lambda: pack(table, out, columns=columns, workers=threads))  # noqa: B023
                        took[name] += [seconds] if turn else []  # the first warms the pages
                assert not verify(Path(folder) / "WebDataset" / "train").damaged
                same = same_members(Path(folder) / "ours", Path(folder) / "WebDataset")
                for name, found in took.items():
                    wall, cpu = (median(each[kind] for each in found) for kind in (0, 1))
                    print(f"{name:>10}: {given.columns} columns {shown}, {threads} threads: {wall:.2f} s, "
                          f"{cpu:.2f} s of the CPU", flush=True)  # fmt: skip
                print(f"{'':>10}  members of the same bytes: {same}", flush=True)


if __name__ == "__main__":
    main()
