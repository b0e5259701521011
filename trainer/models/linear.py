"""Bayesian linear regression; with a known noise sd it is conjugate, and its posterior is the exact yardstick.

    weight ~ Normal(0, weight_sd) [D];  intercept ~ Normal(0, intercept_sd)
    sigma ~ HalfNormal(noise_prior_sd), or noise_sd where that is given
    y ~ Normal(intercept + x @ weight, sigma)

Bishop, "Pattern Recognition and Machine Learning" (2006), section 3.3, eq. 3.50-3.51 for the posterior, 3.86 for the
evidence; section 10.1.2 for the mean-field optimum of a Gaussian. Shapes: x [B, D], y [B].
"""

import math
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from trainer.errors import UserError


@dataclass(frozen=True)
class LinearRegression:
    """``features`` is only for making rows; the model takes D from x."""

    features: int = 20
    weight_sd: float = 10.0
    intercept_sd: float = 10.0
    noise_sd: float | None = None
    noise_prior_sd: float = 10.0

    def __call__(self, x: Tensor, y: Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(x.new_zeros(x.shape[-1]), self.weight_sd).to_event(1))
        intercept = pyro.sample("intercept", dist.Normal(x.new_zeros(()), self.intercept_sd))
        if self.noise_sd is None:
            sigma = pyro.sample("sigma", dist.HalfNormal(x.new_tensor(self.noise_prior_sd)))
        else:
            sigma = x.new_tensor(self.noise_sd)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(intercept + x @ weight, sigma), obs=y)

    def truth(self, generator: np.random.Generator) -> dict[str, np.ndarray]:
        """Known parameters by site."""
        sigma = {} if self.noise_sd is not None else {"sigma": np.array(1.5)}
        return {"weight": generator.normal(size=self.features), "intercept": generator.normal(size=()), **sigma}

    def rows(
        self, truth: dict[str, np.ndarray], generator: np.random.Generator, first_row: int, rows: int
    ) -> dict[str, np.ndarray]:
        """Columns x [rows, features] and y [rows], float32, drawn at ``truth``."""
        x = generator.standard_normal((rows, self.features), dtype=np.float32)
        sigma = float(truth["sigma"]) if self.noise_sd is None else self.noise_sd
        y = truth["intercept"] + x @ truth["weight"] + sigma * generator.standard_normal(rows)
        return {"x": x, "y": y.astype(np.float32)}


@dataclass
class Statistics:
    """The sufficient statistics of rows seen so far, float64: [1, x] squared, [1, x] times y, y squared, and N."""

    xx: Tensor
    xy: Tensor
    yy: Tensor
    num_rows: int = 0

    @classmethod
    def empty(cls, features: int) -> "Statistics":
        size = features + 1
        zeros = torch.zeros(size, size, dtype=torch.float64)
        return cls(zeros, zeros[0].clone(), zeros[0, 0].clone())

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds rows x [B, D], y [B] of any dtype and device."""
        x, y = x.to(self.xx), y.to(self.xy)
        design = torch.cat([x.new_ones(len(x), 1), x], dim=1)
        self.xx += design.T @ design
        self.xy += design.T @ y
        self.yy += y @ y
        self.num_rows += len(x)


@dataclass(frozen=True)
class Exact:
    """The exact posterior of (intercept, weight) [1 + D] and its mean-field optimum, in nats where it is an ELBO."""

    mean: Tensor
    precision: Tensor
    log_evidence: float
    mean_field_sd: Tensor
    mean_field_elbo: float


def exact_posterior(statistics: Statistics, model: LinearRegression) -> Exact:
    """Of a model with a known ``noise_sd``; raises UserError for one that has to learn it.

    The residual is a difference of sums: the log evidence is good to about 1e-14 * sum(y^2) / noise_sd^2 nats, and at
    a million rows the mean to 1e-4 mean-field sds for columns 100 of their sds from the origin (0.1 at 1,000: centre).
    """
    if model.noise_sd is None:
        raise UserError("the posterior is exact only where the noise is known: add model.noise_sd=SD.")
    size, variance = len(statistics.xy), model.noise_sd**2
    prior = torch.full((size,), model.weight_sd**-2, dtype=torch.float64)
    prior[0] = model.intercept_sd**-2
    precision = statistics.xx / variance + prior.diag()
    mean = torch.linalg.solve(precision, statistics.xy / variance)
    residual = statistics.yy - 2 * mean @ statistics.xy + mean @ statistics.xx @ mean
    log_det = float(torch.linalg.slogdet(precision).logabsdet)
    log_evidence = -0.5 * (
        statistics.num_rows * math.log(2 * math.pi * variance)
        + float(residual) / variance
        + float((prior * mean**2).sum())
        - float(prior.log().sum())
        + log_det
    )
    diagonal = precision.diagonal()
    divergence = 0.5 * (float(diagonal.log().sum()) - log_det)
    return Exact(mean, precision, log_evidence, diagonal.rsqrt(), log_evidence - divergence)
