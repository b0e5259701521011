"""Whether the states of the rows that are evaluated together fit memory, before any of them is."""

import torch

from trainer.distributed.launch import memory_share
from trainer.errors import UserError, shortened
from trainer.inference.model.plates import PlatedModel

LEAST_ROWS = 512
"""That are evaluated together at a start."""


def refuse_large(model: PlatedModel, rows: int, dtype: torch.dtype, remedy: str, ranks: int = 1) -> None:
    """Raises UserError where the largest tensor of ``rows`` rows of ``model`` is beyond a quarter of this machine's
    memory, which ``ranks`` share. ``remedy``: of too many, with {fit} for how many would fit.
    """
    if model.numbers == 1:
        return
    size, limit = torch.finfo(dtype).bits // 8, memory_share(ranks)
    taken = model.numbers * rows * size
    if taken > limit:
        raise UserError(
            f"summing out {shortened(model.sites.discrete)} takes {model.numbers:,} states x {rows:,} rows x {size} "
            f"bytes = {_in_words(taken)} at once, and {_in_words(limit)} may be held, a quarter of the memory: "
            f"{remedy.format(fit=limit // (model.numbers * size))}."
        )


def _in_words(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
