"""Ready batches of 4,096 rows from a warm page cache: our reader beside a copy, tensors in memory, and the others.

A table of float32 (x [32], y), noise, in shards of blocks of 8,192 rows. Every contender is a process with one thread
(and workers, where its line says so); they take turns, so that all see the same noise of a shared machine. The first
turn, which checks every hash and touches every page, is not counted. Prints medians in million rows a second and the
medians of the rounds' ratios, and what is wanted of them; writes bench/data.json.

MosaicML streaming and litdata come from the environment whose Python is --rivals (scripts/bench_data --help).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from scripts.reading.contenders import BLOCK_ROWS, CONTENDERS, FEATURES
from trainer.data.shards.index import ROW_ID, Column, Index, write_index
from trainer.data.shards.tar import ShardWriter

ROOT = Path(__file__).parent.parent.parent
COLUMNS = (Column("x", "float32", (FEATURES,)), Column("y", "float32", ()), Column(ROW_ID, "int64", ()))
WANTED = (("of a straight copy", "ours", "copy", 0.7), ("of randperm in memory", "ours", "memory", 1.0),
          ("times WebDataset, blocks in halves", "ours", "webdataset", 10.0),
          ("times WebDataset, rows shuffled", "ours", "webdataset-rows", 10.0))  # fmt: skip


class Contender:
    """A process that reads when it is its turn; between its turns it is stopped, with its workers."""

    def __init__(self, name: str, place: Path, python: str, log: Path):
        self.name, self.rates, self.error = name, list[float](), ""
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                [python, "-m", "scripts.reading.contenders", name, str(place)], cwd=ROOT, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
            )  # fmt: skip

    def turn(self, seconds: float) -> float:
        """Rows a second; 0 once it has failed."""
        if not self.error:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._signal(signal.SIGCONT)
            try:
                print(seconds, file=self._process.stdin, flush=True)
                answer = json.loads(self._process.stdout.readline())
                if isinstance(answer, list):
                    return float(answer[0] / answer[1])
                self.error = answer
            except (BrokenPipeError, ValueError):
                self.error = "failed: bench/data.log"
            finally:
                self._signal(signal.SIGSTOP)
        return 0.0

    def close(self) -> None:
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def write_table(place: Path, rows: int) -> None:
    """``rows`` rows of noise as table.npy and as shards."""
    table = np.random.default_rng(0).standard_normal((rows, FEATURES + 1), dtype=np.float32)
    np.save(place / "table.npy", table)
    (place / "shards").mkdir()
    writer = ShardWriter(place / "shards", COLUMNS, 64 * 2**20)
    for first in range(0, rows, BLOCK_ROWS):
        some = table[first : first + BLOCK_ROWS]
        ids = np.arange(first, first + len(some))
        writer.write({"x": some[:, :-1], "y": some[:, -1], ROW_ID: ids})
    write_index(place / "shards", Index(COLUMNS, writer.close(), 0, "train"))


def measure(names: Sequence[str], rows: int, rounds: int, seconds: float, rivals: str) -> list[Contender]:
    """All contenders, having taken their turns."""
    log = Path("bench/data.log")
    log.parent.mkdir(exist_ok=True)
    log.write_text("")
    with TemporaryDirectory() as folder:
        write_table(Path(folder), rows)
        here = {name: rivals if name.startswith(("mosaic", "litdata")) else sys.executable for name in names}
        contenders = [Contender(name, Path(folder), python, log) for name, python in here.items()]
        try:
            turns = [(number, contender) for number in range(rounds + 1) for contender in contenders]
            for number, contender in track(turns, "reading", console=Console(stderr=True)):
                rate = contender.turn(seconds)
                if number:
                    contender.rates.append(rate)
        finally:
            for contender in contenders:
                contender.close()
    return contenders


def ratio(one: Contender, other: Contender) -> float:
    """How many times as fast, the median over rounds."""
    return median(a / b for a, b in zip(one.rates, other.rates))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn")
    parser.add_argument("--rivals", default=sys.executable, help="the Python that has mosaicml-streaming and litdata")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--out", type=Path, default=Path("bench/data.json"))
    given = parser.parse_args()
    found = measure(given.only, given.rows, given.rounds, given.seconds, given.rivals)
    ran = {contender.name: contender for contender in found if not contender.error}
    table = Table(title=f"ready batches, {given.rows:,} rows of 33 float32", title_justify="left")
    for heading in ("contender", "M rows/s", "of a copy"):
        table.add_column(heading, justify="left" if heading == "contender" else "right")
    for contender in found:
        label = CONTENDERS[contender.name][0]
        if contender.error:
            table.add_row(label, "–", contender.error)
            continue
        share = f"{ratio(contender, ran['copy']):.3f}" if "copy" in ran else ""
        table.add_row(label, f"{median(contender.rates) / 1e6:.3g}", share)
    console = Console()
    console.print(table)
    for label, ours, other, wanted in WANTED:
        if {ours, other} <= ran.keys():
            value = ratio(ran[ours], ran[other])
            console.print(f"{value:.2f} {label} ({wanted:g} wanted{'' if value >= wanted else ', not reached'})")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    rates = {contender.name: contender.rates or contender.error for contender in found}
    given.out.write_text(json.dumps({"rows": given.rows, "rows_per_second": rates}, indent=1))
    console.print(f"written: {given.out}")


if __name__ == "__main__":
    main()
