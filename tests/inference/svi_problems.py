"""What the tests of inference share: small models with results in closed form, batches, noise. float64 throughout."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from trainer.inference.guides.mean_field import MeanField, Noise
from trainer.inference.model.plates import Batch
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.setup import set_up
from trainer.inference.step import Inference, StepNoise

F64 = torch.float64


def batch_of(valid: int | None = None, num_obs: float | None = None, **columns: Tensor) -> Batch:
    """One group's rows, `valid` of which count, at scale num_obs / valid."""
    rows = len(next(iter(columns.values())))
    valid = rows if valid is None else valid
    return Batch(columns, torch.tensor(valid), torch.tensor(valid), torch.arange(rows), num_obs or valid)


def build(
    model: Any, guide: Any = MeanField, kl: str = "monte_carlo", num_obs: float | None = None, **columns: Tensor
) -> tuple[Inference, Tensor]:
    """`set_up` on one batch of all rows, single draws."""
    batch = batch_of(**columns)
    objective = ELBO(kl=kl, antithetic=False)
    return set_up(model, guide, batch, num_obs or batch.size, objective)


def with_objective(inference: Inference, num_obs: float | None = None, **changes: Any) -> Inference:
    return replace(
        inference, objective=replace(inference.objective, **changes), num_obs=float(num_obs or inference.num_obs)
    )


def one_group(**columns: Tensor) -> Batch:
    """Every row of `columns` as the one lane group of a step."""
    rows = len(next(iter(columns.values())))
    lifted = {name: column[None] for name, column in columns.items()}
    return Batch(lifted, torch.tensor([rows]), torch.tensor(rows), torch.arange(rows)[None])


def noise_of(elements: Tensor, rows: Tensor | None = None) -> StepNoise:
    """Noise [A, R, E] and [A, R, B, n]."""
    return StepNoise(elements, rows, tuple((0,) * elements.shape[1] for _ in elements))


def grad(inference: Inference, theta: Tensor, noise: StepNoise, batch: Batch, share: float = 1.0) -> Tensor:
    """The ELBO's gradient [P], in full-data nats."""
    theta = theta.detach().clone().requires_grad_()
    (out,) = torch.autograd.grad(inference.terms(theta, noise, batch, share).sum(), theta)
    return out


def trace_at(inference: Inference, theta: Tensor, elements: Tensor, batch: Batch, rows: Tensor | None = None) -> Any:
    """The guide's `Draw` at theta and the given noise."""

    def draw(values: dict[str, Tensor]) -> Any:
        kl = inference.objective.kl
        return inference.guide.draw(inference.model, values, Noise(elements, rows, 3), batch, kl)

    return inference.parameters.call(inference.parameters.unflatten(theta), draw)


def chunk_of(slots: int, groups: int, rows: int, dtype: torch.dtype = F64, **shapes: Sequence[int]) -> Batch:
    """A chunk of random columns, each [slots, groups, rows, *shape], all rows valid."""
    torch.manual_seed(0)
    columns = {name: torch.randn(slots, groups, rows, *shape, dtype=F64).to(dtype) for name, shape in shapes.items()}
    ids = torch.arange(slots * groups * rows).view(slots, groups, rows)
    valid = torch.full((slots, groups), rows)
    return Batch(columns, valid, valid.sum(1), ids)


def regression(x: Tensor, y: Tensor | None = None) -> None:
    """y ~ Normal(x w, 0.5), w ~ Normal(0, 2): conjugate."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[-1]), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def regression_posterior(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean [D], covariance [D, D], log evidence []) of `regression`."""
    precision = x.T @ x / 0.25 + torch.eye(x.shape[1], dtype=F64) / 4.0
    covariance = torch.linalg.inv(precision)
    marginal = 0.25 * torch.eye(len(x), dtype=F64) + 4.0 * x @ x.T
    evidence = torch.distributions.MultivariateNormal(torch.zeros(len(x), dtype=F64), marginal).log_prob(y)
    return covariance @ x.T @ y / 0.25, covariance, evidence


def regression_data(rows: int = 12, width: int = 3, orthogonal: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, width, dtype=F64, generator=generator)
    if orthogonal:
        x = torch.linalg.qr(x).Q * torch.arange(1.0, width + 1, dtype=F64)
    return {
        "x": x,
        "y": x @ torch.linspace(-1, 1, width, dtype=F64) + torch.randn(rows, dtype=F64, generator=generator),
    }


def effects(x, y):
    """An effect of each row, whose integral has no closed form."""
    one = torch.ones((), dtype=F64)
    b = pyro.sample("b", dist.Normal(0 * one, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(one))
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, tau))
        pyro.sample("y", dist.StudentT(4.0, b * x + u, 0.8), obs=y)
