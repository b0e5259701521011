"""The entries of a row: a table packed in groups has columns [B, T, ...], of which row i has the first length[i].

A model declares them by `pyro.plate("entries", T)` within its data plate. What stands there is masked where an entry
only fills the row up, whatever the model makes of it.

Shapes: B rows, T entries of the longest row.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor

from trainer.errors import UserError
from trainer.inference.model.arguments import signature_of
from trainer.inference.model.latents import AtZero
from trainer.inference.model.plates import Batch, PlatedModel
from trainer.inference.rows.sites import AtFirst, frames_of

ENTRIES, LENGTH = "entries", "length"
"""The plate of a row's entries, and the column that says how many of them a row has."""
_REAL = "_real_entries"
_LOG_2PI = math.log(2 * math.pi)


class OfEntries:
    """The model or guide ``given`` as a callable that takes the column `length` too, and masks entries beyond it."""

    def __init__(self, given: Callable[..., Any], plate: str):
        self.given, self.plate = given, plate
        self.__signature__ = signature_of(given)
        taken = self.__signature__.parameters.values()
        self._takes_length = any(each.name == LENGTH or each.kind is each.VAR_KEYWORD for each in taken)
        if not self._takes_length:
            length = inspect.Parameter(LENGTH, inspect.Parameter.KEYWORD_ONLY)
            self.__signature__ = self.__signature__.replace(parameters=[*taken, length])

    def __call__(self, *args: Any, **columns: Any) -> Any:
        length = columns[LENGTH]
        if not self._takes_length:
            del columns[LENGTH]
        with _Masked(self.plate, length):
            return self.given(*args, **columns)


def as_given(fn: Any) -> Any:
    """What the user gave, of what it may have become."""
    return fn.given if isinstance(fn, OfEntries) else fn


def with_entries(model: PlatedModel, batch: Batch) -> PlatedModel:
    """``model`` with the entries of its rows masked, or as it is where it has none.

    Raises UserError where its plate of entries is not as long as the rows.
    """
    length = batch.columns.get(LENGTH)
    if not isinstance(length, Tensor) or length.is_floating_point() or length.dim() != 1:
        return model
    sizes = set(_sizes(model, batch))
    if not sizes:
        return model
    columns = {name: batch.columns[name] for name in model.own if name != LENGTH}
    widths = {name: each.shape[1] for name, each in columns.items() if isinstance(each, Tensor) and each.dim() > 1}
    for size in sizes - set(widths.values()) if widths else ():
        name, width = next(iter(widths.items()))
        raise UserError(
            f'plate "{ENTRIES}" has {size} places where the rows have up to {width} entries: write '
            f'pyro.plate("{ENTRIES}", {name}.shape[1]), or give a plate of something else another name.'
        )
    if int(length.max()) > min(sizes):
        raise UserError(
            f'column "{LENGTH}" has up to {int(length.max())} entries in a row where plate "{ENTRIES}" has '
            f"{min(sizes)}: it counts the entries of each row that are not padding."
        )
    return PlatedModel(OfEntries(model.fn, model.plate), batch.columns, model.plate)


def _sizes(model: PlatedModel, batch: Batch) -> Iterator[int]:
    """Those of the plates of entries that the model has."""
    with suppress(Exception), torch.random.fork_rng(devices=()):  # of the model, as the checks that follow say
        with AtFirst(model.plate), AtZero(batch.dtype, batch.valid.device):
            trace = poutine.trace(model).get_trace(batch)
        for site in trace.nodes.values():
            frames = {frame.name: frame for frame in site.get("cond_indep_stack", ())}
            if ENTRIES in frames and model.plate in frames:
                yield frames[ENTRIES].size


class _Masked(Messenger):
    """Masks what stands in the plate of entries beyond ``length`` [B]."""

    def __init__(self, plate: str, length: Tensor):
        super().__init__()
        self.plate, self.length = plate, length

    def _pyro_sample(self, msg: Message[..., Any]) -> None:
        frames = {frame.name: frame for frame in msg["cond_indep_stack"]}
        if ENTRIES not in frames or self.plate not in frames or frames[self.plate].dim is None:
            return
        rows, entries = frames[self.plate], frames[ENTRIES]
        number: Any = entries.counter - 1  # of a loop
        if entries.dim is not None:
            number = _along(torch.arange(entries.size, device=self.length.device), entries.dim)
        real = number < _along(self.length, rows.dim)
        msg["mask"] = real if msg["mask"] is None else msg["mask"] & real
        infer: Any = {**(msg["infer"] or {}), _REAL: real}
        msg["infer"] = infer


def _along(values: Tensor, dim: int | None) -> Tensor:
    """A vector along an axis that is counted from the end."""
    assert dim is not None
    return values.view(-1, *(1,) * (-dim - 1))


def of_real_entries(site: Any, density: Tensor, u: Tensor) -> Tensor:
    """``density`` [batch shape] of a continuous latent of rows at its unconstrained values ``u``; that of a standard
    normal, whose integral is 1, where an entry only fills the row up.
    """
    real = site.get("infer", {}).get(_REAL)
    if real is None:
        return density
    normal = -0.5 * (u**2 + _LOG_2PI)
    return torch.where(real, density, normal.reshape(*density.shape, -1).sum(-1))


def entries_by_row(site: Any, plate: str) -> Tensor | None:
    """Whether what a ``site`` has is an entry of a row and not what fills it up, [B, other plates]; None where all are.

    An axis that no plate takes has one place.
    """
    real = site.get("infer", {}).get(_REAL)
    if real is None:
        return None
    frames = frames_of(site)
    shape = [1] * -frames[0].dim
    for frame in frames:
        shape[frame.dim] = frame.size
    (rows,) = [frame.dim for frame in frames if frame.name == plate]
    found: Tensor = real.expand(shape).movedim(rows, 0)
    return found
