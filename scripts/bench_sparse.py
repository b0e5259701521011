"""The reader on a bag-of-words corpus, stored as a csr column and densely: documents a second of both.

Documents of about ``--words`` distinct words of ``--width`` (20,000), in shards, pages in memory. Each round reads an
epoch of the dense column and several of the csr one in turn, by one thread, so that both see the same noise of a shared
machine for about as long, in chunks of at most 128 MiB as training does; the csr column also as the tensors that a
model gets, times a weight per word. Prints medians in
documents a second and the median of the rounds' ratios; writes bench/sparse.json. What came first, checking blocks and
touching pages, is not counted.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from trainer.data.fields import CsrRows
from trainer.data.packing.pack import pack
from trainer.data.plan import Plan
from trainer.data.shards.folder import ShardFolder
from trainer.data.shards.reader import Reader
from trainer.data.sources.memory import MemorySource
from trainer.posterior.tensors import shared

LANES, CHUNK_BYTES = 8, 128 * 2**20
EPOCHS = {"csr": 20, "product": 6, "dense": 1}  # of a round: each takes about as long


def corpus(documents: int, width: int, words: int) -> CsrRows:
    """Counts of words whose frequencies fall as 1 / rank; about ``words`` distinct ones a document."""
    generator = np.random.default_rng(0)
    lengths = 1 + generator.poisson(words - 1, documents)
    offsets = np.concatenate([[0], lengths.cumsum()])
    indices = (width ** generator.random(offsets[-1]) - 1).astype(np.int32)
    counts = 1.0 + generator.poisson(0.5, offsets[-1])
    return CsrRows(offsets, indices, counts.astype(np.float32), width)


def dense(rows: CsrRows) -> np.ndarray:
    made = np.zeros((len(rows), rows.width), np.float32)
    np.add.at(made, (np.arange(len(rows)).repeat(np.diff(rows.offsets)), rows.indices), rows.values)
    return made


def epochs(folder: Path, batch_size: int, use: Callable[[Any], None]) -> Iterator[float]:
    """The seconds of an epoch, each chunk of which is given to ``use``, for each time that it is asked."""
    opened = ShardFolder(folder / "train")
    plan = Plan(opened.block_rows, 0, LANES, batch_size)
    reader = Reader(opened, plan, ("x",), [list(range(LANES))], floats=np.dtype(np.float32))
    memory: dict[str, np.ndarray] = {}
    one = shared(reader.chunk(0, 1).columns["x"]).nbytes
    steps, slots, first = plan.steps_per_epoch, max(1, CHUNK_BYTES // one), 0
    while True:
        began = time.perf_counter()
        for step in range(0, steps, slots):
            use(reader.chunk(first + step, min(slots, steps - step), memory).columns["x"])
        yield time.perf_counter() - began
        first += steps


def times_weights(weight: torch.Tensor) -> Callable[[Any], None]:
    """Multiplies each slot's rows by a weight per word."""

    def use(rows: Any) -> None:
        column = shared(rows)
        for slot in range(len(column)):
            column[slot][0] @ weight

    return use


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=16_384)
    parser.add_argument("--width", type=int, default=20_000)
    parser.add_argument("--words", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("bench/sparse.json"))
    given = parser.parse_args()
    results = []
    print(f"{'words':>5} {'csr':>11} {'and x @ w':>11} {'dense':>9} {'csr / dense':>11}   (documents/s)")
    for words in given.words:
        rows = corpus(given.documents, given.width, words)
        with TemporaryDirectory() as path:
            folders = {"csr": Path(path) / "csr", "dense": Path(path) / "dense"}
            for name, stored in (("csr", rows), ("dense", dense(rows))):
                pack(MemorySource({"x": stored}), folders[name], held_out=0, block_rows=1024)
            ways = {name: epochs(folder, given.batch_size, lambda _: None) for name, folder in folders.items()}
            ways["product"] = epochs(folders["csr"], given.batch_size, times_weights(torch.ones(given.width)))
            for way in ways.values():
                next(way)
            rounds = [
                {name: sum(next(way) for _ in range(EPOCHS[name])) / EPOCHS[name] for name, way in ways.items()}
                for _ in range(given.rounds)
            ]
        seconds = {name: [each[name] for each in rounds] for name in ways}
        result = {f"{name}_documents_per_second": given.documents / median(each) for name, each in seconds.items()}
        result["ratio"] = median(d / c for c, d in zip(seconds["csr"], seconds["dense"]))
        results.append({"words": words, **result})
        rates = [result[f"{name}_documents_per_second"] for name in ("csr", "product", "dense")]
        print(f"{words:5} {rates[0]:11,.0f} {rates[1]:11,.0f} {rates[2]:9,.0f} {result['ratio']:11.1f}", flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({**vars(given), "out": str(given.out), "results": results}, indent=1))
    print(f"written: {given.out}")


if __name__ == "__main__":
    main()
