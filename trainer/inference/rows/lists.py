"""The entries of ragged columns in a plate of their own: what is observed there counts in the row that it is of.

A model writes `pyro.plate("entries", len(lists.values))` beside its data plate, and gives entries what is their row's
by `lists.spread`. Each observed site of that plate becomes the sum over the entries of each row, in the data plate.

Shapes: B rows, M entries that there is room for.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.subsample_messenger import _Subsample

from trainer.errors import UserError
from trainer.inference.model.arguments import signature_of
from trainer.inference.model.latents import AtZero, is_deterministic, is_latent, log_prob, masked
from trainer.inference.model.plates import Batch, PlatedModel
from trainer.inference.model.ragged import Ragged
from trainer.inference.rows.entries import ENTRIES, OfEntries
from trainer.inference.rows.sites import AtFirst


class OfLists(OfEntries):
    """The model or guide ``given``, its entries of ragged columns summed by row."""

    def __init__(self, given: Any, plate: str):
        self.given, self.plate = given, plate
        self.__signature__ = signature_of(given)

    def __call__(self, *args: Any, **columns: Any) -> Any:
        lists = {len(each.values): each for each in columns.values() if isinstance(each, Ragged)}
        with _Summed(self.plate, lists):
            return self.given(*args, **columns)


def with_lists(model: PlatedModel, batch: Batch) -> PlatedModel:
    """``model`` with what is observed of the entries of ragged columns summed by row, or as it is without such."""
    rooms = {len(each.values) for name in model.own if isinstance(each := batch.columns[name], Ragged)}
    if rooms and rooms & set(_sizes(model, batch)):
        return PlatedModel(OfLists(model.fn, model.plate), batch.columns, model.plate)
    return model


def _sizes(model: PlatedModel, batch: Batch) -> Iterator[int]:
    """Those of the plates of entries beside the data plate."""
    with suppress(Exception), torch.random.fork_rng(devices=()):  # of the model, as the checks that follow say
        with AtFirst(model.plate), AtZero(batch.dtype, batch.valid.device):
            trace = poutine.trace(model).get_trace(batch)
        for site in trace.nodes.values():
            yield from (frame.size for frame in site.get("cond_indep_stack", ()) if frame.name == ENTRIES)


class _Summed(Messenger):
    """Sums what is observed of entries, ``lists`` by the room that they have."""

    def __init__(self, plate: str, lists: dict[int, Ragged]):
        super().__init__()
        self.plate, self.lists = plate, lists

    def _pyro_sample(self, msg: Message[..., Any]) -> None:
        sizes = [frame.size for frame in msg["cond_indep_stack"] if frame.name == ENTRIES]
        if len(msg["cond_indep_stack"]) != 1 or not sizes or sizes[0] not in self.lists:
            return
        if isinstance(msg["fn"], _Subsample) or is_deterministic(msg):
            return
        if is_latent(msg):
            raise UserError(
                f'latent site "{msg["name"]}" stands in the plate "{ENTRIES}" of ragged columns, which holds observed '
                "sites alone: pack the entries with group_by=, whose rows are columns [N, entries]."
            )
        lists = self.lists[sizes[0]]
        density = masked(log_prob(msg), msg["mask"]) * msg["scale"]
        real = lists.row_of_entry < len(lists)
        by_row = lists.total(torch.where(real, density, density.new_zeros(())))
        frame: Any = CondIndepStackFrame(self.plate, -1, len(lists), 0, len(lists))
        changes: dict[str, Any] = {
            "fn": dist.Unit(by_row, validate_args=False),
            "value": by_row.new_empty(len(lists), 0),
            "mask": None,
            "scale": 1.0,
            "cond_indep_stack": (frame,),
        }
        msg.update(changes)  # type: ignore[typeddict-item]
