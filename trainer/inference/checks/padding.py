"""Whether places that only fill up the rows of a table packed in groups count in the likelihood.

Shapes: B rows, T entries of the longest row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.inference.model.plates import WEIGHT, Batch
from trainer.inference.objectives.objective import Term
from trainer.inference.rows.entries import ENTRIES, LENGTH

_CHECK_ROWS = 256
_CLOSE = {torch.float64: 1e-9, torch.float32: 5e-6}


def check_padding(evaluate: Callable[[Batch], dict[str, Term]], batch: Batch) -> None:
    """At a fixed z other values in these places change no term. Raises UserError, with the site, where they do.

    ``batch``: of rows that were packed in groups.
    """
    length = batch.columns[LENGTH]
    some = batch.at((length < length.max()).nonzero()[:_CHECK_ROWS, 0])
    if not some.size:
        return
    first = evaluate(some)
    for name, term in evaluate(_refilled(some)).items():
        apart = (term.value - first[name].value).abs()
        if term.scaled and apart > _CLOSE[batch.dtype] * (1 + 2 * first[name].value.abs()):
            column = next(each for each in batch.columns if each not in (LENGTH, WEIGHT))
            raise UserError(
                f'site "{name.replace("+", ", ")}" counts places that only fill a row up (column "{LENGTH}" says how '
                f'many entries it has): put it into `with pyro.plate("data", len({column}), dim=-2), '
                f'pyro.plate("{ENTRIES}", {column}.shape[1], dim=-1):`, which masks them, or take "{LENGTH}" as an '
                "argument and mask them yourself."
            )


def _refilled(batch: Batch) -> Batch:
    """With a row's first entry where nothing but its last was repeated."""
    length = batch.columns[LENGTH]

    def of(name: str, column: Tensor) -> Tensor:
        if name in (LENGTH, WEIGHT) or column.dim() < 2:
            return column
        real = torch.arange(column.shape[1], device=length.device) < length[:, None]
        return torch.where(real.reshape(*real.shape, *(1,) * (column.dim() - 2)), column, column[:, :1])

    return batch._replace(columns={name: of(name, column) for name, column in batch.columns.items()})
