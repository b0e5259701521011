"""Chunks of consecutive steps from a shard folder, as tensors; they end wherever something else happens."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytorch_lightning as pl
import torch

from trainer.data.plan import Plan
from trainer.data.shards.folder import ShardFolder
from trainer.data.shards.reader import ChunkArrays, Reader
from trainer.engine.transfer import sent_ahead
from trainer.errors import UserError
from trainer.inference.model.plates import Batch
from trainer.posterior.first_pass import FirstPass
from trainer.posterior.tensors import shared


@dataclass(frozen=True)
class Ranks:
    """Who evaluates what: P draws and L lanes over W ranks. Lane group p of P holds lanes [p L/P, (p+1) L/P)."""

    world_size: int
    rank: int
    lanes: int
    draws: int

    @property
    def groups(self) -> list[int]:
        """The draws that this rank evaluates; where W > P several ranks share one, each with its own lanes."""
        if self.world_size > self.draws:
            return [self.rank * self.draws // self.world_size]
        per_rank = self.draws // self.world_size
        return list(range(self.rank * per_rank, (self.rank + 1) * per_rank))

    @property
    def lanes_by_group(self) -> list[list[int]]:
        """The lanes of each of this rank's groups."""
        per_rank = self.lanes // self.world_size
        mine = range(self.rank * per_rank, (self.rank + 1) * per_rank)
        size = per_rank // len(self.groups)
        return [list(mine[i * size : (i + 1) * size]) for i in range(len(self.groups))]


@dataclass(frozen=True)
class RowTensors:
    """What a step is given of its rows."""

    columns: tuple[str, ...]
    """The model's."""
    dtype: torch.dtype
    """Of the columns that hold fractions."""
    with_row_id: bool = False
    """Whether the ids come too, by which rows have noise of their own."""


@dataclass(frozen=True)
class Cuts:
    """Where the stream of steps is cut into chunks."""

    slots: int | None = None
    """Steps of a chunk at the most; None: chosen before the first is asked for."""
    every: tuple[tuple[int, int], ...] = ()
    """As for `spans`."""
    ends: tuple[int, ...] = ()
    """As for `spans`."""
    memory: int = 2**30
    """Bytes of rows that are held at a time, at the most."""


class ChunkData(pl.LightningDataModule):
    """Streams the training chunks of this rank from step ``first`` to ``last``.

    ``slots`` of the ``cuts`` may be set to another number, which then holds for the chunks that are not read yet.
    ``first_pass``: checks rows that come for the first time, for whoever trains on the chunks.
    """

    def __init__(
        self,
        folder: ShardFolder,
        plan: Plan,
        ranks: Ranks,
        rows: RowTensors,
        cuts: Cuts,
        first_pass: FirstPass | None = None,
    ):
        super().__init__()
        self.folder, self.plan, self.ranks, self.rows = folder, plan, ranks, rows
        self.slots, self.every, self.ends, self.memory = cuts.slots, cuts.every, cuts.ends, cuts.memory
        self.first_pass = first_pass
        self.first, self.last = 0, 0

    def train_dataloader(self) -> "ChunkData":
        return self

    def trial_chunk(self, steps: int) -> Batch:
        """The first ``steps`` steps, or fewer where there is no room for them, to get ready on."""
        reader = self._reader()
        try:
            (arrays,) = reader.chunks([(self.first, min(steps, reader.most_steps(self.memory)))])
            return self._chunk(arrays)
        finally:
            reader.close()

    def most_slots(self, unit: int) -> int:
        """The steps of a chunk for which there is room, a multiple of ``unit``. Raises UserError where none are."""
        reader = self._reader()
        try:
            return reader.most_steps(self.memory, unit)
        finally:
            reader.close()

    def row_ids(self, step: int) -> np.ndarray:
        """int64 [A, B]: the ids of this rank's rows of a step."""
        reader = Reader(self.folder, self.plan, (), self.ranks.lanes_by_group, with_row_id=True)
        try:
            found = reader.chunk(step, 1).row_id
        finally:
            reader.close()
        assert found is not None
        ids: np.ndarray = found[0]
        return ids

    def __iter__(self) -> Iterator[Batch | UserError]:
        """Chunks; at last the error, if one ends them, for the ranks to agree on."""
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        return self._chunks() if device.type == "cpu" else sent_ahead(self._chunks(), device)

    def _chunks(self) -> Iterator[Batch | UserError]:
        assert self.slots is not None
        reader = self._reader()
        try:
            for arrays in reader.chunks(spans(self.first, self.last, lambda: self.slots or 1, self.every, self.ends)):
                yield self._chunk(arrays)
        except UserError as error:
            yield error
        finally:
            reader.close()

    def _reader(self) -> Reader:
        rows, lanes = self.rows, self.ranks.lanes_by_group
        floats = np.dtype(str(rows.dtype).removeprefix("torch."))
        return Reader(self.folder, self.plan, rows.columns, lanes, rows.with_row_id, floats)

    def _chunk(self, arrays: ChunkArrays) -> Batch:
        return Batch(
            {name: shared(rows) for name, rows in arrays.columns.items()},
            torch.from_numpy(arrays.valid),
            torch.from_numpy(arrays.batch_rows),
            None if arrays.row_id is None else torch.from_numpy(arrays.row_id),
        )


def spans(
    first: int,
    last: int,
    slots: Callable[[], int],
    every: tuple[tuple[int, int], ...] = (),
    ends: tuple[int, ...] = (),
) -> Iterator[tuple[int, int]]:
    """(first step, number of steps) of each chunk: at most what ``slots`` gives when it is asked for, none across any
    of ``ends`` (of rounds) or, for each (n, place) in ``every`` (checkpoints, epochs), across a step that is a multiple
    of n from ``place``.
    """
    while first < last:
        cuts = (next_cut(first, n, place) for n, place in every)
        steps = min(first + slots(), last, *cuts, *(end for end in ends if end > first)) - first
        yield first, steps
        first += steps


def next_cut(step: int, n: int, place: int) -> int:
    """The first step after ``step`` that is a multiple of ``n`` from ``place``."""
    return step + n - (step - place) % n
