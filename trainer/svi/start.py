"""Where training starts and in which units it steps: at the mode of a sample of rows, in its standard deviations.

Laplace's approximation in unconstrained space (Kass and Raftery 1995, section 4.1): the location starts at the mode of
the posterior given the sample (at scale N / n), the scale at 1 / sqrt(curvature), as a mean-field Gaussian has it, and
the optimiser's step for a location is multiplied by that scale. So a rate means the same for a coefficient of 80 and
for one of 0.001.

Shapes: P parameters, D latents.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from trainer.svi.guides import MeanField
from trainer.svi.step import Inference, StepBatch, StepNoise

MOST_LATENTS = 256
_ROUNDS, _ITERATIONS = 5, 100
_RISE = 0.05, 5.0  # nats; 0.5 for a Gaussian


def laplace_start(inference: Inference, theta: Tensor, rows: StepBatch) -> tuple[Tensor, Tensor] | None:
    """theta [P] at the mode given ``rows`` (one lane group), and the units [P] of a step.

    None where this is not known to help: another guide, other parameters beside it, more than 256 latents, a mode that
    is not found (a flat or separable problem), a curvature that is not positive.
    """
    guide = inference.guide
    if not isinstance(guide, MeanField) or guide.noise_size != (guide.size, 0) or guide.size > MOST_LATENTS:
        return None
    if set(inference.parameters.shapes) != {"guide.loc", "guide.log_scale"}:
        return None
    size, device = guide.size, theta.device
    objective = replace(inference.objective, kl="monte_carlo", antithetic=False, pairs=1)
    problem = replace(inference, objective=objective)
    wide = {n: c.double() if c.is_floating_point() else c for n, c in rows.columns.items()}
    batch = rows._replace(columns=wide)
    noise = StepNoise(torch.zeros(1, 1, size, dtype=torch.float64, device=device), None, ((0,),))
    log_scale = torch.zeros(size, dtype=torch.float64, device=device)

    def loss(loc: Tensor) -> Tensor:
        at = inference.parameters.flatten({"guide.loc": loc, "guide.log_scale": log_scale})
        return -problem.terms(at, noise, batch, share=1.0).sum()

    with _double():
        loc = _mode(loss, size, device)
        if loc is None:
            return None
        curvature = torch.stack([_column(loss, loc, i) for i in range(size)]).diagonal()
        if not (torch.isfinite(curvature).all() and (curvature > 0).all()):
            return None
        scale = curvature.rsqrt()
        if not _describes(loss, loc, scale):
            return None
    made = inference.parameters.flatten({"guide.loc": loc, "guide.log_scale": scale.log()}).to(theta.dtype)
    units = inference.parameters.flatten({"guide.loc": scale, "guide.log_scale": torch.ones_like(scale)})
    return made, units.to(theta.dtype)


def _mode(loss: Callable[[Tensor], Tensor], size: int, device: torch.device) -> Tensor | None:
    """Where ``loss`` is lowest, by L-BFGS (Liu and Nocedal 1989) from 0; None where it does not settle."""
    loc = torch.zeros(size, dtype=torch.float64, device=device, requires_grad=True)
    before = math.inf
    for _ in range(_ROUNDS):
        optimizer = torch.optim.LBFGS([loc], max_iter=_ITERATIONS, line_search_fn="strong_wolfe", tolerance_change=0.0)

        def closure() -> Tensor:
            optimizer.zero_grad()  # noqa: B023
            value = loss(loc)
            value.backward()
            return value

        optimizer.step(closure)
        now = float(loss(loc.detach()))
        if not (math.isfinite(now) and bool(torch.isfinite(loc).all())):
            return None
        if before - now < 1e-3:
            return loc.detach()
        before = now
    return None


def _column(loss: Callable[[Tensor], Tensor], loc: Tensor, i: int) -> Tensor:
    """Column ``i`` of the Hessian of ``loss`` at ``loc``."""
    at = loc.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(at), at, create_graph=True)
    return torch.autograd.grad(grad[i], at)[0]


def _describes(loss: Callable[[Tensor], Tensor], loc: Tensor, scale: Tensor) -> bool:
    """Whether one ``scale`` to either side of the mode, along every latent, ``loss`` rises by about a half.

    Not so where the data separate: the loss falls for ever, and its curvature at any place says nothing.
    """
    low, high = _RISE
    with torch.no_grad():
        lowest = loss(loc)
        sides = (sign * scale[i] * torch.eye(len(loc), dtype=loc.dtype)[i] for i in range(len(loc)) for sign in (-1, 1))
        return all(low < float(loss(loc + side) - lowest) < high for side in sides)


@contextmanager
def _double() -> Iterator[None]:
    """float64 for what the model makes itself."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(before)
