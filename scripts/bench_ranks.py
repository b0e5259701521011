"""Two gloo ranks on two cores beside one rank, N = 10^6 in memory, each rank with batches of B rows of its own.

Turns are taken round by round: one rank alone; two ranks that sum the gradient at every step; two that average every
16 steps (`program=local_steps`); two that never speak; the all-reduce of such a gradient by itself; a straight copy by
one process and by both. Prints medians over the rounds, and the gain of two over one (of rows per second) of the same
round; writes bench/ranks.json.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from rich.console import Console
from rich.table import Table

from scripts.benchmark.ours import Ours, Way
from scripts.benchmark.problems import MODELS, Setting, make_data
from trainer.distributed.comm import Group
from trainer.inference.model.plates import Batch
from trainer.inference.optim.rounds import State
from trainer.inference.programs.fused import Fused
from trainer.inference.programs.local_steps import LocalSteps
from trainer.inference.programs.program import Program

WORLD, SYNC_EVERY = 2, 16
WAYS = ("one rank", "summed at every step", f"averaged every {SYNC_EVERY} steps", "two that never speak")


def run(program: Program, state: State, chunks: list[Batch], seconds: float, active: bool) -> float:
    """Seconds a step of ``program`` over about ``seconds``; the ranks take the same number of chunks."""

    def chunks_in(count: int) -> float:
        nonlocal state
        dist.barrier()
        began = time.perf_counter()
        for i in range(count if active else 0):
            chunk = chunks[i % len(chunks)]
            state = program.run(state, chunk, len(chunk.batch_rows)).state
        dist.barrier()
        return time.perf_counter() - began

    chunks_in(1)
    once = torch.tensor(chunks_in(2) / 2)
    dist.broadcast(once, 0)
    count = max(1, int(seconds / float(once)))
    return chunks_in(count) / count / len(chunks[0].batch_rows)


def repeated(work: Callable[[], Any], seconds: float, active: bool) -> float:
    """Seconds that ``work`` takes each time, on the ranks that are active."""
    dist.barrier()
    began, count = time.perf_counter(), 0
    while active and time.perf_counter() - began < seconds:
        work()
        count += 1
    each = (time.perf_counter() - began) / max(count, 1)
    dist.barrier()
    return each


def rank_main(rank: int, store: str, setting: Setting, rounds: int, seconds: float, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    comm, ours = Group(rank, WORLD), Ours(setting, Way(fused=True))
    ours.start()
    alone = ours._views()
    shared = [chunk._replace(batch_rows=chunk.batch_rows * WORLD) for chunk in alone]
    summed = Fused(ours.inference, ours.update, 0, [rank], comm)
    averaged = LocalSteps(ours.inference, ours.update, 0, [rank], comm, SYNC_EVERY)
    start = ours.update.init(ours.theta)
    for program in (summed, averaged):
        program.prepare(start, shared[0])
    gradient = torch.ones(len(ours.theta))
    source = np.ones(64 * 2**20 // 4, dtype=np.float32)
    target = np.ones_like(source)
    figures: list[dict[str, float]] = []
    for _ in range(rounds):
        here = {
            WAYS[0]: run(ours.program, start, alone, seconds, rank == 0),
            WAYS[1]: run(summed, start, shared, seconds, True),
            WAYS[2]: run(averaged, start, shared, seconds, True),
            WAYS[3]: run(ours.program, start, alone, seconds, True),
        }
        dist.barrier()
        began = time.perf_counter()
        for _ in range(500):
            comm.sum(gradient)
        here["all-reduce"] = (time.perf_counter() - began) / 500
        here["copy by one"] = repeated(lambda: np.copyto(target, source), seconds / 2, rank == 0)
        here["copy by two"] = repeated(lambda: np.copyto(target, source), seconds / 2, True)
        figures.append(here)
    if rank == 0:
        Path(out).write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def measured(setting: Setting, rounds: int, seconds: float) -> list[dict[str, float]]:
    """The figures of rank 0 by round, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        given = (f"{folder}/store", setting, rounds, seconds, f"{folder}/figures.json")
        multiprocessing.spawn(rank_main, given, nprocs=WORLD)
        return json.loads(Path(f"{folder}/figures.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["logistic", "network"], choices=list(MODELS))
    parser.add_argument("--batch", type=int, nargs="+", default=[4096])
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    given = parser.parse_args()
    table = Table(title="two gloo ranks on two cores: medians over rounds taken in turns", title_justify="left")
    for heading in ("each rank's batches", "µs/step", "gain over one"):
        table.add_column(heading, justify="left" if heading.startswith("each") else "right")
    results = []
    for model in given.models:
        for batch in given.batch:
            folder = (given.out / "data" / f"{model}-{given.rows}").absolute()
            make_data(model, given.rows, folder, shards=False)
            slots = SYNC_EVERY * max(1, min(64, given.rows // batch) // SYNC_EVERY)
            setting = Setting(model, batch, given.rows, given.rows, slots, 1, "cpu", str(folder))
            rounds = measured(setting, given.rounds, given.seconds)
            table.add_section()
            table.add_row(f"[bold]{model}, B = {batch:,}")
            for way in WAYS:
                gain = median(WORLD * here[WAYS[0]] / here[way] for here in rounds) if way != WAYS[0] else 1.0
                table.add_row(f"  {way}", f"{1e6 * median(here[way] for here in rounds):,.1f}", f"{gain:.2f}")
            copies = median(2 * here["copy by one"] / here["copy by two"] for here in rounds)
            table.add_row("  the all-reduce alone", f"{1e6 * median(here['all-reduce'] for here in rounds):,.1f}", "")
            table.add_row("  straight copies", "", f"{copies:.2f}")
            results.append({"model": model, "batch": batch, "rounds": rounds})
    Console(width=100).print(table)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "ranks.json").write_text(json.dumps(results, indent=1))
    print(f"written: {given.out / 'ranks.json'}")


if __name__ == "__main__":
    main()
