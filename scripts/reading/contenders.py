"""Ways to read a table in batches of 4,096 rows, each an endless stream of batches; as a process, one of them.

Every stream yields the rows of a batch once x [B, 32] and y [B] of it are torch tensors (a NumPy array for a copy). The
process answers each line of its input, a number of seconds, with the rows that it read in them and the seconds.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count, cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

FEATURES, BATCH, BLOCK_ROWS = 32, 4096, 8192
Stream = Iterator[int]


def copy(place: Path) -> Stream:
    """The bytes of the table to other memory, as they lie."""
    source = np.load(place / "table.npy")
    target = np.empty_like(source)
    while True:
        np.copyto(target, source)
        yield len(source)


def in_memory(place: Path) -> Stream:
    """A permutation of all rows, and `index_select` of the tensors that are there."""
    table = torch.from_numpy(np.load(place / "table.npy"))
    x, y = table[:, :-1].contiguous(), table[:, -1].contiguous()
    while True:
        order = torch.randperm(len(x))
        for first in range(0, len(x), BATCH):
            rows = order[first : first + BATCH]
            x.index_select(0, rows), y.index_select(0, rows)
            yield len(rows)


def ours(place: Path, run_rows: int = 256, steps: int = 64, lanes: int = 8, anew: bool = False) -> Stream:
    """`Reader`, in one thread, chunks of ``steps`` batches; ``anew``: every hash checked in each epoch, not in one."""
    from trainer.data.plan import Mixing, Plan
    from trainer.data.shards.folder import ShardFolder
    from trainer.data.shards.reader import Reader

    ring: list[dict[str, np.ndarray]] = [{}, {}, {}]
    folder, memory = ShardFolder(place / "shards"), cycle(ring)
    plan = Plan(folder.block_rows, 0, lanes, BATCH, Mixing(run_rows))
    for epoch in count():
        if anew or epoch == 0:
            folder = ShardFolder(place / "shards")
            reader = Reader(folder, plan, ("x", "y"), [list(range(lanes))], floats=np.dtype(np.float32))
        begin = epoch * plan.steps_per_epoch
        for step in range(begin, begin + plan.steps_per_epoch, steps):
            chunk = reader.chunk(step, min(steps, begin + plan.steps_per_epoch - step), next(memory))
            yield int(chunk.valid.sum())


def webdataset(place: Path, rows: bool = False) -> Stream:
    """Stock WebDataset on our shards: shards shuffled, blocks cut in two; or ``rows`` shuffled, and batched again."""
    import webdataset

    shards = sorted(map(str, (place / "shards").glob("*.tar")))
    blocks = webdataset.WebDataset(shards, shardshuffle=len(shards), empty_check=False).shuffle(8).decode()

    def halves() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for block in blocks:
            for first in range(0, len(block["y.npy"]), BATCH):
                yield block["x.npy"][first : first + BATCH], block["y.npy"][first : first + BATCH]

    def single() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for block in blocks:
            yield from zip(block["x.npy"], block["y.npy"])

    while True:
        if rows:
            shuffled = webdataset.DataPipeline(single, webdataset.shuffle(2 * BLOCK_ROWS), webdataset.batched(BATCH))
            for x, y in shuffled:
                torch.as_tensor(np.asarray(x)), torch.as_tensor(np.asarray(y))
                yield len(y)
        else:
            for x, y in halves():
                torch.from_numpy(x), torch.from_numpy(y)
                yield len(y)


def mosaic(place: Path, workers: int) -> Stream:
    """MosaicML streaming: MDS with an encoded array and number a row, shuffled by its default, through a DataLoader."""
    import streaming

    folder = place / f"mds-{workers}"
    if not folder.exists():
        table = np.load(place / "table.npy")
        columns = {"x": f"ndarray:float32:{FEATURES}", "y": "float32"}
        with streaming.MDSWriter(out=str(folder), columns=columns) as writer:
            for row in table:
                writer.write({"x": row[:-1], "y": row[-1]})
    data = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    return _loaded(DataLoader(data, batch_size=BATCH, num_workers=workers))


def litdata(place: Path, workers: int) -> Stream:
    """litdata: optimized chunks of 64 MB with an array a row, shuffled, through its DataLoader."""
    import litdata as library

    folder = place / f"lit-{workers}"
    if not folder.exists():
        table = np.load(place / "table.npy")
        library.optimize(_Rows(table), list(range(0, len(table), BLOCK_ROWS)), str(folder), chunk_bytes="64MB",
                         num_workers=1)  # fmt: skip
    data = library.StreamingDataset(str(folder), shuffle=True)
    return _loaded(library.StreamingDataLoader(data, batch_size=BATCH, num_workers=workers))


class _Rows:
    """The rows of a stretch of the table."""

    def __init__(self, table: np.ndarray):
        self.table = table

    def __call__(self, first: int) -> Iterator[dict[str, Any]]:
        for row in torch.from_numpy(self.table[first : first + BLOCK_ROWS].copy()):
            yield {"x": row[:-1].clone(), "y": row[-1].clone()}


def _loaded(loader: Any) -> Stream:
    while True:
        for batch in loader:
            yield len(torch.as_tensor(batch["y"]))


CONTENDERS: dict[str, tuple[str, Callable[[Path], Stream]]] = {
    "copy": ("straight copy", copy),
    "memory": ("in memory, randperm + index_select", in_memory),
    "ours": ("ours, runs of 256", ours),
    "ours-anew": ("ours, every hash in every epoch", lambda place: ours(place, anew=True)),
    "ours-16": ("ours, runs of 16", lambda place: ours(place, 16)),
    "ours-1": ("ours, row by row", lambda place: ours(place, 1)),
    "webdataset": ("WebDataset, our shards, blocks in halves", webdataset),
    "webdataset-rows": ("WebDataset, our shards, rows shuffled", lambda place: webdataset(place, True)),
    "mosaic": ("MosaicML streaming", lambda place: mosaic(place, 0)),
    "mosaic-2": ("MosaicML streaming, 2 workers", lambda place: mosaic(place, 2)),
    "litdata": ("litdata", lambda place: litdata(place, 0)),
    "litdata-2": ("litdata, 2 workers", lambda place: litdata(place, 2)),
}


def _begun(make: Callable[[], Stream]) -> Stream:
    """The stream, made when its first batch is asked for."""
    yield from make()


def main() -> None:
    name, place = sys.argv[1:]
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    stream = _begun(lambda: CONTENDERS[name][1](Path(place)))
    for line in sys.stdin:
        rows, began = 0, time.perf_counter()
        try:
            while not rows or time.perf_counter() - began < float(line):
                rows += next(stream)
        except ModuleNotFoundError as error:
            print(json.dumps(f"{error.name} is not installed"), file=answers, flush=True)
            return
        print(json.dumps([rows, time.perf_counter() - began]), file=answers, flush=True)


if __name__ == "__main__":
    main()
