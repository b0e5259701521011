"""The mode of a log joint density, by a search from 0 that does not end at a saddle.

Shapes: D latents.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.inference.estimates.derivatives import hessian
from trainer.inference.recipe.saddle import AT_START, Loss, Search, best_mode, laplace_elbo

_ROUNDS, _ITERATIONS = 5, 100


class Mode(NamedTuple):
    """What a search for the lowest loss comes to."""

    loc: Tensor
    """[D] where it ends."""
    settled: bool
    lowest: Tensor
    """[D] the lowest place that it has seen."""
    curvature: Tensor | None = None
    """[D, D]: the Hessian there, where it is known."""


def lowest_place(loss: Loss, like: Tensor) -> Tensor:
    """The lowest place [D] that a search sees; ``like``: any tensor [D]."""
    return mode_of(loss, len(like), like.device).lowest


def mode_of(loss: Loss, size: int, device: torch.device) -> Mode:
    """Where ``loss`` is lowest, by L-BFGS (Liu and Nocedal 1989) from 0."""
    loc = torch.zeros(size, dtype=torch.float64, device=device, requires_grad=True)
    before, least, lowest = math.inf, math.inf, loc.detach().clone()
    for _ in range(_ROUNDS):
        optimizer = torch.optim.LBFGS([loc], max_iter=_ITERATIONS, line_search_fn="strong_wolfe", tolerance_change=0.0)

        def closure() -> Tensor:
            nonlocal least, lowest
            optimizer.zero_grad()  # noqa: B023
            value = loss(loc)
            value.backward()
            if float(value.detach()) < least:
                least, lowest = float(value.detach()), loc.detach().clone()
            return value

        try:
            optimizer.step(closure)
        except IndexError:  # its line search has no step left to take where all that it tried are not finite
            return Mode(torch.full_like(loc, math.nan).detach(), False, lowest)
        now = float(loss(loc.detach()).detach())  # a net beside the latents wants its gradient
        if not (math.isfinite(now) and bool(torch.isfinite(loc).all())):
            break
        if before - now < 1e-3:
            return Mode(loc.detach(), True, lowest)
        before = now
    return Mode(loc.detach(), False, lowest)


def off_saddle(losses: tuple[Loss, Loss], found: Mode, parts: Tensor, seed: int, say: Callable[[str], None]) -> Mode:
    """``found``, or the best mode that pushes lead to where it is a saddle.

    ``losses``: minus the log joint, and minus its likelihood; ``parts``: as of `Search`.
    """
    if not found.settled:
        return found
    loss, likelihood = losses

    def settle(start: Tensor) -> Tensor | None:
        mode = mode_of(lambda change: loss(start + change), len(start), start.device)
        return start + mode.loc if mode.settled else None

    curvature = hessian(loss, found.loc)
    search = Search(settle, lambda end: laplace_elbo(loss, end), parts)
    best = best_mode(loss, likelihood, found.loc, curvature, search, seed)
    if best is None:
        return found._replace(curvature=curvature)
    say(AT_START.format(best.sentence()))
    return Mode(best.at, True, best.at)
