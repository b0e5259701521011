"""The variance of the gradient of each objective on three models, at the Laplace start and half a guide sd away.

Of 8 draws each, summed over the parameters in units of the guide's sds, relative to that of objective.kl=analytic.
"""

from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trainer.inference.guides.mean_field import MeanField
from trainer.inference.model.plates import Batch
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.objectives.objective import Objective
from trainer.inference.objectives.renyi import Renyi
from trainer.inference.recipe.laplace import laplace_start
from trainer.inference.setup import set_up
from trainer.inference.step import Inference, StepNoise

DRAWS, REPEATS, ROWS, WIDTH = 8, 400, 200, 3
OBJECTIVES: dict[str, Objective] = {
    "elbo, analytic": ELBO("analytic", False, DRAWS),
    "elbo, monte_carlo": ELBO("monte_carlo", False, DRAWS),
    "elbo, sticking_the_landing": ELBO("sticking_the_landing", False, DRAWS),
    "iw": Renyi(0.0, DRAWS),
    "iw, doubly=false": Renyi(0.0, DRAWS, False),
    "renyi, alpha=0.5": Renyi(0.5, DRAWS),
}


def linear(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(WIDTH), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def logistic(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(WIDTH), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=(y > 0).to(x.dtype))


def scaled(x: Tensor, y: Tensor) -> None:
    spread = pyro.sample("spread", dist.HalfNormal(x.new_tensor(1.0)))
    w = pyro.sample("w", dist.Normal(x.new_zeros(WIDTH), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.StudentT(4.0, x @ w, spread), obs=y)


def variance(inference: Inference, theta: Tensor, batch: Batch) -> float:
    """The sum of the variances of the gradient's elements, those of locations times the guide's variances."""
    view, generator = inference.gaussian, torch.Generator().manual_seed(0)
    assert view is not None
    units, found = torch.cat([view.sd(theta), torch.ones(view.size, dtype=theta.dtype)]), []
    for _ in range(REPEATS):
        at = theta.detach().clone().requires_grad_()
        eps = torch.randn(1, DRAWS, view.size, dtype=theta.dtype, generator=generator)
        terms = inference.terms(at, StepNoise(eps, None, ((0,) * DRAWS,)), batch, 1.0)
        found.append(torch.autograd.grad(terms.sum(), at)[0] * units)
    return float(torch.stack(found).var(0).sum())


def measured(model: Any) -> dict[str, tuple[float, float]]:
    """Of each objective, at the start and away from it, relative to the first one."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=generator)
    y = x @ x.new_tensor([1.0, -0.5, 0.2]) + torch.randn(ROWS, dtype=torch.float64, generator=generator)
    inference, theta = set_up(model, MeanField, Batch.whole({"x": x, "y": y}), ROWS, ELBO())
    batch = Batch({"x": x[None], "y": y[None]}, torch.tensor([ROWS]), torch.tensor(ROWS), None)
    start = laplace_start(inference, theta, batch)
    assert start is not None
    theta, view = start[0], inference.gaussian
    assert view is not None
    away = torch.cat([theta[: view.size] + 0.5 * view.sd(theta), theta[view.size :]])
    all_of = {
        name: [variance(replace(inference, objective=each), at, batch) for at in (theta, away)]
        for name, each in OBJECTIVES.items()
    }
    first = all_of["elbo, analytic"]
    return {name: (one / first[0], two / first[1]) for name, (one, two) in all_of.items()}


def main() -> None:
    results = {each.__name__: measured(each) for each in (linear, logistic, scaled)}
    table = Table(title=f"variance of the gradient, {DRAWS} draws: at the start / away", title_justify="left")
    for heading in ("objective", *results):
        table.add_column(heading, justify="left" if heading == "objective" else "right")
    for name in OBJECTIVES:
        table.add_row(name, *(f"{each[name][0]:.2g} / {each[name][1]:.2g}" for each in results.values()))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
