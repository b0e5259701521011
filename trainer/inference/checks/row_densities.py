"""Whether the continuous latents of rows have densities that can be integrated, on a few rows where training starts.

Shapes: B rows, d continuous numbers of a row.
"""

from contextlib import suppress
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from trainer.errors import UserError
from trainer.inference.checks.dependence import FAILURES
from trainer.inference.model.latents import AtZero
from trainer.inference.model.plates import Batch, PlatedModel
from trainer.inference.rows.marginal import rows_of
from trainer.inference.rows.proper import Improper, improper
from trainer.inference.rows.sites import RowSites

_MOST, _SHARE = 256, 0.01
_LEVEL = (
    "its density does not fall however far it goes to one side, so it has no integral: give it a proper prior, as "
    "Normal(0, spread)"
)
_CURVED = (
    "the curvature of its density is not positive where Newton steps end, as between two values that do equally well: "
    "keep it to one side (HalfNormal), or give a guide that holds it (guide._target_=module.guide)"
)


def check_row_densities(model: PlatedModel, batch: Batch) -> None:
    """Raises UserError, with the site and the number of rows, where more than 1 % of the first ones have no maximum."""
    if model.sites is None or not model.sites.continuous:
        return
    marginal: Any = model.fn
    rows = batch.at(torch.arange(min(int(batch.valid), _MOST)))

    def look(**columns: Any) -> Improper:
        with poutine.block(), AtZero(rows.dtype, rows.valid.device), pyro.validation_enabled(False):
            at = marginal.of_globals(**columns)
            start = torch.zeros(rows_of(columns).size, marginal.sites.size, dtype=rows.dtype, device=rows.valid.device)
            return improper(lambda u: marginal.joint(columns, at, u), start)

    with suppress(*FAILURES), torch.random.fork_rng(devices=()):  # of the model, as other checks say
        found = PlatedModel(look, batch.columns, model.plate, like=marginal.generative)(rows)
        for where, why in zip(found, (_LEVEL, _CURVED)):
            _refuse(where, why, marginal.sites)


def _refuse(where: Tensor, why: str, sites: RowSites) -> None:
    bad, rows = int(where.any(1).sum()), len(where)
    if bad <= _SHARE * rows:
        return
    number = int(where.sum(0).argmax())
    name = next(each.name for each in sites.continuous if each.start <= number < each.start + each.size)
    raise UserError(f'latent site "{name}" cannot be integrated out of {bad:,} of the first {rows:,} rows: {why}.')
