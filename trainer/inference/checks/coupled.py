"""Whether discrete latents of a row reach other rows, as the states of a chain over the rows of a table do.

Summed out, such a latent is one axis of states for all rows, on which a shift along the rows does nothing: the run
would be of another model. So states are given to rows here, and rows evaluated in two orders. Shapes: B rows.
"""

import zlib
from contextlib import suppress
from typing import Any, cast

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from trainer.errors import UserError, shortened
from trainer.inference.checks.dependence import FAILURES, SPREADS, Scattered
from trainer.inference.model.latents import is_deterministic, is_discrete, is_latent, log_prob_by_row
from trainer.inference.model.plates import Batch, PlatedModel, inside
from trainer.inference.rows.sites import AtFirst, every_state

_MOST = 64
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}


def check_states(model: PlatedModel, batch: Batch) -> None:
    """Raises UserError, with the sites, where a row's density depends on the states of others.

    ``model``: as its user wrote it, with discrete latents in its rows.
    """
    rows = torch.arange(min(int(batch.valid), _MOST), device=batch.valid.device)
    turned = rows[len(rows) // 3 :].flip(0)
    with suppress(*FAILURES):  # a model that takes states only as Pyro enumerates them
        whole, others = _densities(model, batch, rows), _densities(model, batch, turned)
        names = [name for name in whole if name in others and _differ(whole[name][turned], others[name], batch.dtype)]
        if names:
            raise UserError(
                f'the model is not exchangeable over rows: site "{shortened(names, 3)}" of a row depends on the states '
                "of other rows; make a whole sequence or group one row (svi shard group_by=COLUMN)."
            )


def _densities(model: PlatedModel, batch: Batch, rows: Tensor) -> dict[str, Tensor]:
    """By site [B], each row in states of its own."""
    some = batch.at(rows)
    with AtFirst(model.plate), _Globals(some, model.plate, SPREADS[0]), _States(model.plate, rows):
        trace = poutine.trace(model).get_trace(some)
    return {
        name: log_prob_by_row(site, model.plate)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and inside(site, model.plate) and not isinstance(site["fn"], _Subsample)
        if not is_deterministic(site)
    }


def _differ(one: Tensor, two: Tensor, dtype: torch.dtype) -> bool:
    close = _CLOSE[dtype]
    return not torch.allclose(one, two, rtol=close, atol=close, equal_nan=True)


class _Globals(Scattered):
    """Latents of rows stay at u = 0, in whatever rows."""

    def place(self, msg: Message[..., Any], shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, **self.options) if inside(msg, self.plate) else super().place(msg, shape)


class _States(Messenger):
    """Gives discrete latents of rows the states that follow from the rows' numbers [B]."""

    def __init__(self, plate: str, rows: Tensor):
        super().__init__()
        self.plate, self.rows = plate, rows

    def _pyro_sample(self, msg: Message[..., Any]) -> None:
        fn = cast(Any, msg["fn"])
        if not is_latent(msg) or msg["done"] or not is_discrete(fn) or not inside(msg, self.plate):
            return
        states = every_state(str(msg["name"]), fn)
        states = states.reshape(len(states), *fn.event_shape)
        (frame,) = [each for each in msg["cond_indep_stack"] if each.name == self.plate]
        numbers = (self.rows + zlib.crc32(str(msg["name"]).encode()) % 997) * 7919 // 13 % len(states)
        along = numbers.view(-1, *(1,) * (-cast(int, frame.dim) - 1))
        msg["value"], msg["done"] = states[along.expand(fn.batch_shape)], True
