"""Varying intercepts and slopes: a regression whose coefficients differ by group.

    mean ~ Normal(0, mean_sd), scale ~ HalfNormal(scale_sd)      of the intercept and the K slopes       [1 + K]
    effect ~ Normal(mean, scale)                                 in plate "groups"                       [G, 1 + K]
    sigma ~ HalfNormal(noise_prior_sd)                                                                   []
    y ~ Normal(effect[group, 0] + x @ effect[group, 1:], sigma)  in plate "data"                         [B]

These are the sites, with their shapes. Non-centered (the default), the site is `deviation` ~ Normal(0, 1) [G, 1 + K]
instead of `effect` = mean + scale * deviation.

Gelman and Hill, "Data Analysis Using Regression and Multilevel/Hierarchical Models" (2006), chapter 13; non-centered as
in Papaspiliopoulos, Roberts and Sköld, "A general framework for the parametrization of hierarchical models",
Statistical Science 22 (2007). Shapes: x [B, K], group [B] int64 in [0, G), y [B].
"""

from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
from torch import Tensor

from trainer.errors import UserError


@dataclass(frozen=True)
class VaryingSlopes:
    """``groups`` = G, up to 10^5; ``slopes`` = K is only for making rows."""

    groups: int | None = None
    slopes: int = 1
    mean_sd: float = 10.0
    scale_sd: float = 2.0
    noise_prior_sd: float = 10.0
    centered: bool = False

    def __post_init__(self) -> None:
        if not self.groups:
            raise UserError("the hierarchical model needs its number of groups: add model.groups=G.")

    def __call__(self, x: Tensor, group: Tensor, y: Tensor | None = None) -> None:
        size = x.shape[-1] + 1
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(size), self.mean_sd).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(x.new_full((size,), self.scale_sd)).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(x.new_tensor(self.noise_prior_sd)))
        with pyro.plate("groups", self.groups):
            if self.centered:
                effect = pyro.sample("effect", dist.Normal(mean, scale).to_event(1))
            else:
                effect = mean + scale * pyro.sample("deviation", dist.Normal(x.new_zeros(size), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            own = effect[group]
            pyro.sample("y", dist.Normal(own[:, 0] + (x * own[:, 1:]).sum(-1), sigma), obs=y)

    def truth(self, generator: np.random.Generator) -> dict[str, np.ndarray]:
        """Known parameters by site."""
        size = self.slopes + 1
        mean, scale = generator.normal(size=size), generator.uniform(0.3, 1.0, size)
        deviation = generator.normal(size=(self.groups or 0, size))
        groups = {"effect": mean + scale * deviation} if self.centered else {"deviation": deviation}
        return {"mean": mean, "scale": scale, "sigma": np.array(0.7), **groups}

    def rows(
        self, truth: dict[str, np.ndarray], generator: np.random.Generator, first_row: int, rows: int
    ) -> dict[str, np.ndarray]:
        """Columns x [rows, slopes] and y [rows], float32, and group [rows], int64, drawn at ``truth``."""
        x = generator.standard_normal((rows, self.slopes), dtype=np.float32)
        group = generator.integers(0, self.groups, rows)
        effect = truth["effect"] if self.centered else truth["mean"] + truth["scale"] * truth["deviation"]
        own = effect[group]
        y = own[:, 0] + (x * own[:, 1:]).sum(-1) + truth["sigma"] * generator.standard_normal(rows)
        return {"x": x, "group": group, "y": y.astype(np.float32)}
