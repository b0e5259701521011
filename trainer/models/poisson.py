"""Poisson regression with an exposure.

    weight ~ Normal(0, weight_sd) [D];  intercept ~ Normal(0, intercept_sd)
    y ~ Poisson(exposure * exp(intercept + x @ weight))

McCullagh and Nelder, "Generalized Linear Models" (1989), chapter 6. Shapes: x [B, D], y [B] counts, exposure [B] > 0.
"""

from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
from torch import Tensor


@dataclass(frozen=True)
class PoissonRegression:
    """``features`` is only for making rows; the model takes D from x."""

    features: int = 8
    weight_sd: float = 1.0
    intercept_sd: float = 10.0

    def __call__(self, x: Tensor, y: Tensor | None = None, exposure: Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(x.new_zeros(x.shape[-1]), self.weight_sd).to_event(1))
        intercept = pyro.sample("intercept", dist.Normal(x.new_zeros(()), self.intercept_sd))
        rate = (intercept + x @ weight).exp()
        with pyro.plate("data", len(x)):
            obs = None if y is None else y.to(x.dtype)
            pyro.sample("y", dist.Poisson(rate if exposure is None else exposure * rate), obs=obs)

    def truth(self, generator: np.random.Generator) -> dict[str, np.ndarray]:
        """Known parameters by site."""
        return {"weight": 0.3 * generator.normal(size=self.features), "intercept": np.array(-1.0)}

    def rows(
        self, truth: dict[str, np.ndarray], generator: np.random.Generator, first_row: int, rows: int
    ) -> dict[str, np.ndarray]:
        """Columns x [rows, features], y [rows] and exposure [rows], float32, drawn at ``truth``."""
        x = generator.standard_normal((rows, self.features), dtype=np.float32)
        exposure = generator.uniform(0.1, 2.0, rows)
        y = generator.poisson(exposure * np.exp(truth["intercept"] + x @ truth["weight"]))
        return {"x": x, "y": y.astype(np.float32), "exposure": exposure.astype(np.float32)}
