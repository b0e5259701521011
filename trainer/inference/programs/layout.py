"""A step's noise and rows as tensors in a row, as a compiled program takes them, and back.

Shapes: as in `trainer.inference.programs.program`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.inference.model.plates import Batch
from trainer.inference.model.ragged import Column, cat, maker, parts, rolled
from trainer.inference.step import StepNoise


@dataclass(frozen=True)
class Layout:
    """The order of a slot's tensors: [elements], [rows], valid, batch_rows, [row_id], columns."""

    noise_size: tuple[int, int]
    columns: tuple[tuple[str, int, Callable[..., Column]], ...]
    """Of each its name, how many tensors it has, and what makes it of them."""
    with_row_id: bool

    @classmethod
    def of(cls, noise_size: tuple[int, int], chunk: Batch) -> "Layout":
        """That of the slots of ``chunk``."""
        makers = tuple((name, *maker(column)) for name, column in chunk.columns.items())
        return cls(noise_size, makers, chunk.row_id is not None)

    def data(self, chunk: Batch) -> tuple[Tensor, ...]:
        """All of a chunk that comes from outside, each [K, ...]."""
        row_id = () if chunk.row_id is None else (chunk.row_id,)
        return (
            chunk.valid,
            chunk.batch_rows,
            *row_id,
            *(part for name, *_ in self.columns for part in parts(chunk.columns[name])),
        )

    def slot(self, tensors: Sequence[Tensor], theta: Tensor) -> tuple[StepNoise, Batch]:
        """What a step takes, from its tensors in a row."""
        left = list(tensors)
        elements = left.pop(0) if self.noise_size[0] else None
        rows = left.pop(0) if self.noise_size[1] else None
        valid, batch_rows = left.pop(0), left.pop(0)
        row_id = left.pop(0) if self.with_row_id else None
        groups = len(valid)
        if elements is None:
            assert rows is not None or not self.noise_size[1]
            elements = theta.new_zeros(groups, 1 if rows is None else rows.shape[1], 0)
        pairs = elements.shape[1]
        noise = StepNoise(elements, rows, ((0,) * pairs,) * groups)
        columns = {}
        for name, count, make in self.columns:
            columns[name], left = make(*left[:count]), left[count:]
        return noise, Batch(columns, valid, batch_rows, row_id)


def with_a_second_slot(chunk: Batch) -> Batch:
    """A chunk of one slot with another after it, of the same rows in another order."""
    columns = {name: cat([each, rolled(each)]) for name, each in chunk.columns.items()}
    row_id = None if chunk.row_id is None else torch.cat([chunk.row_id, chunk.row_id.roll(1, dims=2)])
    return Batch(columns, chunk.valid.repeat(2, 1), chunk.batch_rows.repeat(2), row_id)
