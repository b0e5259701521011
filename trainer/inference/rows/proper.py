"""Whether the densities of rows in their own numbers can be integrated around their modes: a pure look at a few rows.

Newton steps end at a maximum of a density that falls to both sides of it. Where the curvature is not positive there,
or where the density does not fall however far one goes, it has no Gaussian to integrate around.

Shapes: B rows, d numbers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.inference.rows.integral import LogDensity, Normal, around_the_mode, derivatives, solved_forward

_STEPS, _AGAIN = 8, 4  # Newton steps, and times that many, before a mode is said to be out of reach
_REACHED = 1e-3  # of a row's own sd, to the maximum of the Gaussian there
_FAR, _FALL = 1000.0, 1.0  # sds from the mode, by which a density has fallen so many nats at the least
_FLAT = {torch.float64: 1e-12, torch.float32: 1e-6}  # of the greatest curvature of a row


class Improper(NamedTuple):
    """By row and number, bool [B, d]."""

    level: Tensor
    """Where the density does not fall."""
    curved: Tensor
    """Where it falls, and its curvature is not positive at the end of the Newton steps, where its gradient is zero."""


def improper(f: LogDensity, start: Tensor) -> Improper:
    """What is wrong with densities exp ``f``, after Newton steps from ``start`` [B, d]; nothing where they are unknown
    there.
    """
    normal = around_the_mode(f, start, _STEPS)
    for _ in range(_AGAIN):
        if bool(reached(f, normal).all()):
            break
        normal = around_the_mode(f, normal.mode, _STEPS)
    known, there = f(normal.mode).detach().isfinite()[:, None], reached(f, normal)[:, None]
    level = torch.stack([~_falls(f, normal, number) for number in range(start.shape[1])], 1)
    values, vectors = torch.linalg.eigh(derivatives(f, normal.mode).curvature.double().nan_to_num())
    flat = values[:, 0] <= _FLAT[start.dtype] * values[:, -1].abs()
    along = vectors[:, :, 0].abs().argmax(1, keepdim=True)
    curved = torch.zeros_like(level).scatter(1, along, flat[:, None])
    return Improper(level & known, curved & known & there & ~level.any(1, keepdim=True))


def reached(f: LogDensity, normal: Normal) -> Tensor:
    """Whether each row's mode is where its Gaussian has it, to a thousandth of its sd: bool [B]."""
    left: Tensor = solved_forward(normal.factor, derivatives(f, normal.mode).gradient).norm(dim=1)
    return left < _REACHED


def _falls(f: LogDensity, normal: Normal, number: int) -> Tensor:
    """Whether each row's density falls to both sides of a number, however far: bool [B]. What is no number there does,
    as the density of what has overflown.
    """
    with torch.no_grad():
        middle, far = f(normal.mode), torch.zeros_like(normal.mode[0])
        far[number] = _FAR
        return ~torch.stack([f(normal.at(point)) > middle - _FALL for point in (far, -far)]).any(0)
