"""Rows are checked as they come for the first time: in the first epoch's chunks, and in passes over all rows."""

from collections.abc import Callable

import numpy as np

from trainer.data.shards.folder import ShardFolder
from trainer.errors import UserError
from trainer.inference.checks.observed import RowCheck
from trainer.inference.estimates.passes import Block
from trainer.inference.model.plates import Batch
from trainer.inference.model.ragged import Column, Jagged, cat


class FirstPass:
    """Refuses wrong rows by ``check``: in chunks of ``folder`` before step ``until``, in blocks of any folder that is
    not `done`.
    """

    def __init__(self, check: RowCheck, folder: ShardFolder, until: int):
        self.check, self.folder, self.until = check, folder, until
        self._done: list[ShardFolder] = []

    def done(self, folder: ShardFolder) -> None:
        """All rows of ``folder`` are right."""
        self._done.append(folder)
        self.until = 0 if folder is self.folder else self.until

    def of_chunk(self, chunk: Batch, step: int, row_ids: Callable[[int], np.ndarray]) -> UserError | None:
        """The error of a chunk that begins at ``step``; ``row_ids(step)``: [A, B] of a step."""
        if step >= self.until or self.check.is_right(chunk.columns):
            return None
        slots, groups = chunk.valid.shape
        columns = {name: _flat(column, slots, groups) for name, column in chunk.columns.items()}
        count = len(next(iter(columns.values())))
        size = count // (slots * groups)

        def of_places(places: list[int]) -> list[int]:
            each = [(place // size // groups, place // size % groups, place % size) for place in places]
            return [int(row_ids(step + k)[a, b]) for k, a, b in each if b < int(chunk.valid[k, a])]

        try:
            self.check.refuse(Batch.whole(columns), of_places)
        except UserError as error:
            return error
        return None

    def of_block(self, folder: ShardFolder, block: Block, step: int) -> None:
        """Raises UserError for a wrong row of a block that is met at ``step``."""
        if any(each is folder for each in self._done) or (folder is self.folder and step >= self.until):
            return
        if folder is not self.folder or not self.check.is_right(block.columns):  # bounds are those of this folder
            self.check.refuse(block.batch)


def _flat(column: Column, slots: int, groups: int) -> Column:
    """[K, A, B, ...] as [K * A * B, ...]."""
    if isinstance(column, Jagged):
        return cat([column[k][a] for k in range(slots) for a in range(groups)])
    return column.flatten(0, 2)
