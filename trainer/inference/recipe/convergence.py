"""Whether a run has converged: the Monte Carlo error of the averaged iterates, their drift, and the full gradient.

A held-out ELBO cannot see an error of 0.3 standard deviations. The gradient over all rows, times the inverse curvature,
is the Newton step left. Where the curvature is known that says it all, since its draws are fresh. Where it is not,
ridges stay unseen, and the average's error is judged from the means of its segments as well (whole epochs where there
are eight, since an epoch's mean is free of the rows' order): Monte Carlo standard error by batch means (Flegal and
Jones 2010), drift as the split R-hat (Vehtari et al. 2021) that draws from the two halves' posteriors would have.

Shapes: P parameters, D latents.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.inference.guides.gaussian import GaussianView
from trainer.inference.optim.rounds import Round
from trainer.inference.optim.variance_reduction import Preconditioner

SEGMENTS = 8
_FEWEST_STEPS = 2  # of a segment
_SMALL_SITE = 256  # scalars, up to which every latent of a site has to meet a limit
_SHARE = 0.99  # of the others
Mark = tuple[int, Tensor]
"""How many iterates the running average held, and the average [P]."""


class Evidence(NamedTuple):
    """Each over the latents of small sites and 99 % of the others; None: not asked for."""

    mc_error: float | None
    """Monte Carlo standard error of the averaged location, in scales."""
    scale_error: float | None
    """The same of the averaged log scale, or half of the difference between the halves where that is larger."""
    rhat: float | None
    gradient: float | None
    """The step that the gradient over all rows leaves to go, in scales; nan where it was not worth a pass."""
    gain: float | None = None
    """Nats that fresh draws leave, for each parameter of a guide that is not mean-field."""


@dataclass(frozen=True)
class Rule:
    """Upper limits of an `Evidence`."""

    mc_error: float = 0.1
    scale_error: float = 0.02
    rhat: float = 1.01
    gradient: float = 0.1
    gain: float = 0.005

    def short_of(self, evidence: Evidence) -> list[str]:
        """The limits that ``evidence`` does not meet (a gradient of nan meets none)."""
        asked = {name: value for name, value in evidence._asdict().items() if value is not None}
        return [name for name, value in asked.items() if not value <= getattr(self, name)]


def segment_ends(round_: Round, steps_per_epoch: int, unit: int = 1) -> tuple[int, ...]:
    """The steps at which a round's segments end, multiples of ``unit``; none where its average is too short."""
    length = round_.horizon - round_.average_from
    part = length // SEGMENTS
    if part < max(_FEWEST_STEPS, unit):
        return ()
    step = steps_per_epoch if part >= steps_per_epoch else 1
    inner = (round_.average_from + round(k * length / SEGMENTS / step) * step for k in range(1, SEGMENTS))
    return (*(round(end / unit) * unit for end in inner), round_.horizon)


def segment_means(marks: Sequence[Mark]) -> Tensor:
    """Means [S, P], float64, of the iterates between one mark and the next, from running averages."""
    totals = [(0, torch.zeros_like(marks[0][1], dtype=torch.float64)), *((n, n * mean.double()) for n, mean in marks)]
    return torch.stack([(b - a) / (m - n) for (n, a), (m, b) in pairwise(totals)])


def of_average(view: GaussianView, means: Tensor, theta: Tensor) -> Evidence:
    """The evidence of segment means [S, P] beside their average ``theta`` [P]; the gradient is not known yet."""
    scale = view.sd(theta.double())
    error, drift = _error_and_drift(means)
    off = torch.maximum(error, drift.abs() / 2)[view.covariance.log_sd]
    drift = drift[view.loc] / scale
    top = small_sites(view)
    return Evidence(
        judged(error[view.loc] / scale, top),
        judged(off, top),
        judged((1 + drift**2 / 2).sqrt(), top),
        float("nan"),
    )


def scale_error_of_small(view: GaussianView, means: Tensor | None) -> float | None:
    """The ``scale_error`` of the small sites alone (None: there are none; nan: no segments tell)."""
    top = small_sites(view)
    if not top.any():
        return None
    if means is None:
        return math.nan
    error, drift = _error_and_drift(means)
    return float(torch.maximum(error, drift.abs() / 2)[view.covariance.log_sd][top].max())


def _error_and_drift(means: Tensor) -> tuple[Tensor, Tensor]:
    """The standard error [P] of the mean of ``means`` [S, P], and the difference [P] between its halves."""
    half = len(means) // 2
    return means.std(0) / len(means) ** 0.5, means[:half].mean(0) - means[half:].mean(0)


def newton_step(view: GaussianView, theta: Tensor, gradient: Tensor, preconditioner: Preconditioner) -> Tensor:
    """The step [P], float64, to where the ``gradient`` [P] of minus the ELBO (nats) vanishes.

    Locations: - L L' g. The covariance: as its structure has it. The other parameters stay.
    """
    factor = preconditioner.factor.double()
    step = view.covariance.step(theta, gradient, factor)
    step[view.loc] = -(factor @ (factor.T @ gradient[view.loc].double()))
    return step


def axis_step(view: GaussianView, theta: Tensor, gradient: Tensor) -> Tensor:
    """The same where no curvature is known, which is then taken as 1 / scale^2 for each latent.

    For the locations alone, since the noise of the draws would hide the log scales' step.
    """
    step = torch.zeros_like(theta, dtype=torch.float64)
    step[view.loc] = -(view.sd(theta.double()) ** 2) * gradient[view.loc].double()
    return step


def to_go(view: GaussianView, theta: Tensor, step: Tensor) -> tuple[float, float]:
    """The judged size of a ``step`` [P]: of the locations, in scales, and twice that of the log scales."""
    top, covariance = small_sites(view), view.covariance
    loc = covariance.distance(theta.double(), step[view.loc])
    return judged(loc, top), judged(2 * covariance.change(theta.double(), step), top)


def step_to_go(view: GaussianView, theta: Tensor, step: Tensor) -> float:
    """The judged ``step`` [P], in scales; twice a log scale's step counts too (a scale 5 % off is 0.1)."""
    return max(to_go(view, theta, step))


def judged(values: Tensor, top: Tensor) -> float:
    """The largest of the ``top`` [D] bool, or the 99 % quantile of the others where that is larger."""
    largest = [values[top].max()] if top.any() else []
    if not top.all():
        others = values[~top].sort().values
        largest.append(others[min(len(others) - 1, int(_SHARE * len(others)))])
    return float(torch.stack(largest).max())


def small_sites(view: GaussianView) -> Tensor:
    """bool [D]: latents of sites with at most 256 scalars."""
    return torch.cat([torch.full((site.size,), site.size <= _SMALL_SITE) for site in view.sites])
