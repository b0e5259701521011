"""What a model does with the columns of packed data."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from trainer.data.shards.index import Index
from trainer.errors import UserError
from trainer.inference.checks.uses import calculates_with
from trainer.inference.guides.pyro_guides import is_autoguide
from trainer.inference.model.arguments import arguments
from trainer.inference.model.plates import Batch
from trainer.inference.step import Inference

_MOST_WHOLE = 2**24  # float32 holds all integers up to it


def precision_lines(index: Index, names: Sequence[str], dtype: torch.dtype) -> list[str]:
    """What is said of the columns ``names`` whose values ``dtype`` cannot hold."""
    if dtype != torch.float32:
        return []
    told = []
    for column in (index.column(name) for name in names):
        ends = [column.statistics[end] for end in ("min", "max")] if column.statistics else [0.0]
        whole = column.dtype == "int64" and column.vocabulary is None and np.abs(ends).max() > _MOST_WHOLE
        if column.dtype == "float64" or whole:
            held = "values" if column.dtype == "float64" else "integers"
            told.append(
                f"float32 rounds the {held} of column {column.name}: give dtype=float64, or take its mean off first"
            )
    return told


def columns_taken(takers: Iterable[Any], columns: Iterable[str]) -> set[str]:
    """Those of ``columns`` that a model or a guide has as arguments."""
    taken: set[str] = set()
    for taker in takers:
        made = getattr(taker, "func", taker)
        if callable(taker) and not inspect.isclass(made) and not is_autoguide(made):  # those take what the model takes
            call = taker.forward if isinstance(taker, torch.nn.Module) else taker
            found = inspect.signature(call).parameters.values()
            taken |= set(columns) if any(each.kind is each.VAR_KEYWORD for each in found) else {e.name for e in found}
    return taken


def refuse_spared(index: Index, model: Callable[..., Any]) -> None:
    """Raises UserError for a column that ``model`` takes and that was left out, since it could not be packed."""
    spared = index.meta.get("spared", {})
    for name in arguments(model, [*(column.name for column in index.columns), *spared]) if spared else ():
        if name in spared:
            raise UserError(f"{spared[name].rstrip('.')} (svi shard packs the table).")


def refuse_mixed_numbers(index: Index, inference: Inference, theta: torch.Tensor, batch: Batch) -> None:
    """Raises UserError for a column of codes, of words that are numbers in part, with which the model calculates."""
    for name, sentence in index.meta.get("mixed", {}).items():
        if name in inference.model.own and calculates_with(inference, theta, batch, name):
            raise UserError(sentence)
