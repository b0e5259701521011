"""`ShardData`: shard folders as a Lightning data module, for a `VariationalModule` in your own Lightning trainer."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from trainer.engine.datamodule import ChunkData, next_cut
from trainer.engine.module import ChunkModule
from trainer.errors import UserError
from trainer.inference.model.plates import Batch
from trainer.posterior.full_data import FullData

_ROWS = 2048  # predicted at a time


class ShardData(pl.LightningDataModule):
    """Streams the rows of shard folders, which `svi shard` or `trainer.data.packing.pack` wrote.

    ``path``: a shard folder, or several that count as one data set. ``batch_size``: rows of a step, over all ranks.
    ``options``: the other ``data.`` options of `svi train`, as {"lanes": 4, "on_corrupt": "quarantine"}.

    Validation and prediction take the rows that were held out when the table was packed; without any, there is no
    validation, and prediction takes the training rows. Raises UserError for options that cannot be.
    """

    def __init__(self, path: str | Path | Sequence[str | Path], batch_size: int = 4096, **options: Any):
        super().__init__()
        places = [str(each) for each in path] if isinstance(path, list | tuple) else str(path)
        self.chosen = {"data.path": places, "batch_size": batch_size}
        self.chosen |= {f"data.{name}": value for name, value in options.items()}
        self._module: ChunkModule | None = None

    def serve(self, module: ChunkModule, chunks: ChunkData, train: FullData, held_out: FullData | None) -> None:
        """Takes what ``module`` trains on, once it has set that up."""
        self._module, self.chunks, self.train, self.held_out = module, chunks, train, held_out

    def train_dataloader(self) -> "_Epochs":
        """Chunks of consecutive steps; an epoch of Lightning's is one of the data."""
        return _Epochs(self._served(), self.chunks)

    def val_dataloader(self) -> range:
        """One item, for which the module evaluates all rows that were held out; none without any."""
        self._served()
        return range(0 if self.held_out is None else 1)

    def predict_dataloader(self) -> "_Rows":
        """This rank's part of the rows that were held out, else of the training rows, a few thousand at a time."""
        module = self._served()
        return _Rows(module, self.held_out or self.train)

    def _served(self) -> ChunkModule:
        if self._module is None:
            raise UserError(
                "ShardData gives rows to a VariationalModule that this process has trained: call "
                "trainer.fit(module, data) first, or predict with module.posterior().predict(data)."
            )
        return self._module


class _Epochs:
    """The chunks of the epoch in which the module's next step lies."""

    def __init__(self, module: ChunkModule, chunks: ChunkData):
        self.module, self.chunks = module, chunks

    def __iter__(self) -> Iterator[Batch | UserError]:
        chunks, plan, step = self.chunks, self.chunks.plan, self.module.step
        epoch_ends = next_cut(step, plan.steps_per_epoch, plan.first_whole)
        chunks.first, chunks.last = step, min(epoch_ends, self.module.update.horizon)
        return iter(chunks)


class _Rows:
    """This rank's blocks of a split, as batches."""

    def __init__(self, module: ChunkModule, data: FullData):
        self.module, self.data = module, data

    def __iter__(self) -> Iterator[Batch]:
        theta, comm = self.module.theta, self.data.comm
        for number in range(comm.rank, len(self.data.folder.block_rows), comm.size):
            rows = self.data.block(number, theta).batch
            for some in torch.arange(rows.size, device=rows.valid.device).split(_ROWS):
                yield rows.at(some)
