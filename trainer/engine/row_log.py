"""Which rows each step takes, written down: a file for each rank and launch, of int64 (step, count, row ids...).

Rows are logged before their step is taken, so that no checkpoint holds a step that the log does not. A launch that goes
on from a checkpoint takes again what was taken after it: from its first step on, its record replaces that of the ones
before.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback

from trainer.engine.module import ChunkModule
from trainer.inference.model.plates import Batch


class RowLog(Callback):
    """Writes the ids of each step's rows to a file in ``folder``, without a buffer: SIGKILL takes nothing from it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.file: io.FileIO | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, ChunkModule)
        self.folder.mkdir(parents=True, exist_ok=True)
        launch = torch.tensor(1 + max(_launches(self.folder), default=-1), device=module.device)
        name = f"{int(module.comm.from_first(launch)):06d}.{trainer.global_rank}-{trainer.world_size}.rows"
        self.file = (self.folder / name).open("wb", buffering=0)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if not isinstance(batch, Batch):  # an error, for the ranks to agree on
            return
        assert self.file is not None
        assert isinstance(module, ChunkModule)
        assert batch.row_id is not None
        row_id, taken = (
            batch.row_id.cpu().numpy(),
            np.arange(batch.row_id.shape[-1]) < batch.valid.cpu().numpy()[..., None],
        )
        records = []
        for k, (ids, here) in enumerate(zip(row_id, taken)):
            records += [[module.step + k, here.sum()], ids[here]]
        self.file.write(np.concatenate(records).astype("<i8").tobytes())

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if self.file is not None:
            self.file.close()


def logged_rows(folder: Path) -> dict[int, np.ndarray]:
    """The ids of the rows [B] that each global step took, sorted; steps that were taken again by their last record.

    Steps of which a rank's record is missing (it was killed before) end a launch.
    """
    steps: dict[int, np.ndarray] = {}
    for launch in sorted(_launches(folder)):
        paths = list(folder.glob(f"{launch:06d}.*.rows"))
        ranks = [_records(path) for path in paths]
        if len(ranks) < int(paths[0].suffixes[0].partition("-")[2]) or not all(ranks):
            continue
        first, stop = min(ranks[0]), min(max(each) for each in ranks) + 1
        steps = {step: rows for step, rows in steps.items() if step < first}
        steps |= {step: np.sort(np.concatenate([each[step] for each in ranks])) for step in range(first, stop)}
    return steps


def _launches(folder: Path) -> set[int]:
    return {int(path.name.partition(".")[0]) for path in folder.glob("*.rows")}


def _records(path: Path) -> dict[int, np.ndarray]:
    """The whole records of a file."""
    content, found, at = path.read_bytes(), {}, 0
    numbers = np.frombuffer(content[: len(content) // 8 * 8], "<i8")
    while at + 2 <= len(numbers):
        step, count = numbers[at : at + 2].tolist()
        if at + 2 + count > len(numbers):
            break
        found[step] = numbers[at + 2 : at + 2 + count]
        at += 2 + count
    return found
