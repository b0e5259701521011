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


class ChunkData(pl.LightningDataModule):
    """Streams the training chunks of this rank from step ``first`` to ``last``.

    ``slots``: steps of a chunk, set before the first is asked for; another number holds for those that are not read
    yet. A chunk also ends where `spans` says.
    ``memory``: bytes of rows that are held at a time, at the most.
    """

    def __init__(
        self,
        folder: ShardFolder,
        plan: Plan,
        ranks: Ranks,
        columns: tuple[str, ...],
        dtype: torch.dtype,
        with_row_id: bool,
        slots: int | None,
        every: tuple[tuple[int, int], ...] = (),
        ends: tuple[int, ...] = (),
        memory: int = 2**30,
    ):
        super().__init__()
        self.folder, self.plan, self.ranks = folder, plan, ranks
        self.columns, self.dtype, self.with_row_id = columns, dtype, with_row_id
        self.slots, self.every, self.ends = slots, every, ends
        self.memory = memory
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
        floats = np.dtype(str(self.dtype).removeprefix("torch."))
        return Reader(self.folder, self.plan, self.columns, self.ranks.lanes_by_group, self.with_row_id, floats)

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
