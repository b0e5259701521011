"""Bayesian logistic regression.

    weight ~ Normal(0, weight_sd) [D];  intercept ~ Normal(0, intercept_sd)
    y ~ Bernoulli(logit = intercept + x @ weight)

Jaakkola and Jordan, "Bayesian parameter estimation via variational methods", Statistics and Computing 10 (2000).
Shapes: x [B, D], y [B] of 0 and 1.
"""

from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
from torch import Tensor


@dataclass(frozen=True)
class LogisticRegression:
    """``features`` is only for making rows; the model takes D from x."""

    features: int = 32
    weight_sd: float = 1.0
    intercept_sd: float = 10.0

    def __call__(self, x: Tensor, y: Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(x.new_zeros(x.shape[-1]), self.weight_sd).to_event(1))
        intercept = pyro.sample("intercept", dist.Normal(x.new_zeros(()), self.intercept_sd))
        with pyro.plate("data", len(x)):
            obs = None if y is None else y.to(x.dtype)
            pyro.sample("y", dist.Bernoulli(logits=intercept + x @ weight), obs=obs)

    def truth(self, generator: np.random.Generator) -> dict[str, np.ndarray]:
        """Known parameters by site."""
        return {"weight": 0.5 * generator.normal(size=self.features), "intercept": generator.normal(size=())}

    def rows(
        self, truth: dict[str, np.ndarray], generator: np.random.Generator, first_row: int, rows: int
    ) -> dict[str, np.ndarray]:
        """Columns x [rows, features] and y [rows], float32, drawn at ``truth``."""
        x = generator.standard_normal((rows, self.features), dtype=np.float32)
        probability = 1 / (1 + np.exp(-(truth["intercept"] + x @ truth["weight"])))
        return {"x": x, "y": (generator.random(rows) < probability).astype(np.float32)}
