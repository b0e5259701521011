"""Learning-rate schedules: pure functions of the step, with the horizon of the whole run (in steps) known.

`schedule(step, horizon)` gives the factor on the optimizer's lr for step 0, 1, ... as a float64 scalar tensor.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Schedule(Protocol):
    def __call__(self, step: Tensor, horizon: int) -> Tensor: ...


@dataclass(frozen=True)
class Constant:
    def __call__(self, step: Tensor, horizon: int) -> Tensor:
        return torch.ones_like(step, dtype=torch.float64)


@dataclass(frozen=True)
class RobbinsMonro:
    """((t + delay) / (1 + delay)) ** -forgetting, t = 1, 2, ...: Hoffman et al. (2013), eq. 26, from 1."""

    delay: float = 1.0
    forgetting: float = 0.7

    def __post_init__(self) -> None:
        if not 0.5 < self.forgetting <= 1:
            raise ValueError(f"schedule.forgetting={self.forgetting} must lie in (0.5, 1] for the steps to converge.")

    def __call__(self, step: Tensor, horizon: int) -> Tensor:
        return ((step.double() + 1 + self.delay) / (1 + self.delay)) ** -self.forgetting


@dataclass(frozen=True)
class Cosine:
    """From 1 to ``final`` along half a cosine: Loshchilov and Hutter, "SGDR", ICLR 2017, eq. 5, without restarts."""

    final: float = 0.0

    def __call__(self, step: Tensor, horizon: int) -> Tensor:
        done = (step.double() / horizon).clamp(max=1.0)
        return self.final + (1 - self.final) * 0.5 * (1 + torch.cos(math.pi * done))


@dataclass(frozen=True)
class OneCycle:
    """Up along half a cosine for a share ``warmup`` of the run, then down: Smith and Topin (2019)."""

    warmup: float = 0.3
    start: float = 0.04
    final: float = 1e-4

    def __call__(self, step: Tensor, horizon: int) -> Tensor:
        done = (step.double() / horizon).clamp(max=1.0)
        up = self.start + (1 - self.start) * 0.5 * (1 - torch.cos(math.pi * done / self.warmup))
        fall = (done - self.warmup) / (1 - self.warmup)
        down = self.final + (1 - self.final) * 0.5 * (1 + torch.cos(math.pi * fall))
        return torch.where(done < self.warmup, up, down)
