"""Latents that change the density where no gradient follows: their posterior would be their prior, in silence.

`.item()`, `float()`, `.detach()`, `.data` and NumPy take a value out of the graph; a comparison has no gradient. Found
by evaluation: what no gradient reaches is moved, and the densities of the other sites are looked at. A latent that none
of them depends on is legal.
"""

import warnings
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine, validation_enabled
from pyro.poutine.runtime import Message
from torch import Tensor

from trainer.errors import UserError, first_line
from trainer.inference.checks.dependence import FAILURES, SPREADS, Scattered, apart
from trainer.inference.model.latents import is_deterministic, is_latent, log_prob
from trainer.inference.model.plates import Batch, PlatedModel

_MOVES = (0.1, 1.0, -1.0)  # unconstrained; the far ones for comparisons
_REMEDY = (
    "compute with the tensor itself (no .item(), float(), .detach(), .data or NumPy, no torch.no_grad), and with a "
    "smooth function (torch.sigmoid) in place of a comparison or a rounding."
)


class _Followed(Scattered):
    """Sets every latent to numbers whose gradient can be asked for; ``moves``: what is added to those of a site."""

    def __init__(self, batch: Batch, plate: str, spread: float, moves: dict[str, float]):
        super().__init__(batch, plate, spread)
        self.moves = moves
        self.leaves: dict[str, Tensor] = {}

    def place(self, msg: Message[..., Any], shape: tuple[int, ...]) -> Tensor:
        name = str(msg["name"])
        leaf = super().place(msg, shape) + self.moves.get(name, 0.0)
        self.leaves[name] = leaf.requires_grad_()
        return leaf.clone()  # which the model may change in place


def refuse_cut_off(model: PlatedModel, batch: Batch) -> None:
    """Raises UserError for a latent whose value, not its gradient, reaches the density of another site."""
    with torch.random.fork_rng(devices=()), validation_enabled(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's of a float() whose sentence is here
        for spread in SPREADS:
            try:
                return _refuse(model, batch, spread)
            except FAILURES as error:
                if isinstance(error, RuntimeError) and "Can't call numpy" in str(error):
                    raise UserError(
                        f"the model takes the value of a latent out of torch ({first_line(error)}), where no gradient "
                        f"follows: {_REMEDY}"
                    ) from error


def _refuse(model: PlatedModel, batch: Batch, spread: float) -> None:
    leaves, densities = _evaluated(model, batch, spread, {})
    total = torch.stack([each.sum(dtype=torch.float64) for each in densities.values()]).sum()
    names = list(leaves)
    reached = torch.autograd.grad(total, list(leaves.values()), allow_unused=True) if total.requires_grad else ()
    for name in [name for name, each in zip(names, reached or [None] * len(names)) if each is None]:
        for site in (site for move in _MOVES for site in _changed(model, batch, spread, {name: move}, densities)):
            raise UserError(
                f'the value of latent "{name}" changes the density of site "{site}", but no gradient follows it, so '
                f"its posterior would be its prior: {_REMEDY}"
            )


def _changed(
    model: PlatedModel, batch: Batch, spread: float, moves: dict[str, float], densities: dict[str, Tensor]
) -> list[str]:
    """The other sites whose ``densities`` are not the same once latents take their ``moves``."""
    with suppress(*FAILURES):
        _, moved = _evaluated(model, batch, spread, moves)
        return [
            site
            for site, density in densities.items()
            if site not in moves and (site not in moved or apart(density.detach(), moved[site].detach()))
        ]
    return []


def _evaluated(
    model: PlatedModel, batch: Batch, spread: float, moves: dict[str, float]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The latents by name, and the log density of every site; a latent's own value has no part in its gradient."""
    torch.manual_seed(0)
    with _Followed(batch, model.plate, spread, moves) as followed:
        trace = poutine.trace(model).get_trace(batch)
    densities = {}
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and (is_latent(site) or (site["is_observed"] and not is_deterministic(site))):
            value: Any = site["value"]
            densities[str(name)] = log_prob({**site, "value": value.detach() if is_latent(site) else value})
    return followed.leaves, densities
