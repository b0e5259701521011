"""What a compiled step costs whose rows' latent is integrated out, beside that of the model without it.

B = 4,096 rows in memory, d = 1, 9 nodes; pairs of calls take turns, medians over rounds. Shapes: B rows, J ratings.
"""

import time
from collections.abc import Callable
from statistics import median

import pyro
import pyro.distributions as dist
import torch
from rich.table import Table
from torch import Tensor

from scripts.bench_first import processor
from trainer.inference.guides.mean_field import MeanField
from trainer.inference.model.plates import Batch
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.optim.optimizers import Adam
from trainer.inference.optim.rounds import one_round
from trainer.inference.optim.schedules import Constant
from trainer.inference.programs.fused import Fused
from trainer.inference.setup import set_up

BATCH, SLOTS, N, FOREVER = 4_096, 16, 10**6, 10**9
OBSERVED: dict[str, Callable[[Tensor], dist.Distribution]] = {
    "logistic": lambda eta: dist.Bernoulli(logits=eta),
    "Poisson": lambda eta: dist.Poisson(eta.exp()),
}


def model(kind: str, with_intercepts: bool) -> Callable[..., None]:
    """Of ratings x [B] or [B, J], with a random intercept a row or without."""

    def of_rows(x: Tensor, y: Tensor) -> None:
        a, b = (pyro.sample(name, dist.Normal(0.0, 5.0)) for name in "ab")
        sd = pyro.sample("sd", dist.HalfNormal(2.0)) if with_intercepts else None
        with pyro.plate("data", len(x)):
            u = 0.0 if sd is None else pyro.sample("u", dist.Normal(0.0, sd)).view(-1, *[1] * (x.dim() - 1))
            pyro.sample("y", OBSERVED[kind](a + b * x + u).to_event(x.dim() - 1), obs=y)

    return of_rows


def columns(kind: str, ratings: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH * SLOTS, ratings, generator=generator)
    eta = 0.3 + 0.5 * x + torch.randn(len(x), 1, generator=generator)
    bernoulli = kind == "logistic"
    y = torch.bernoulli(eta.sigmoid(), generator=generator) if bernoulli else torch.poisson(eta.exp(), generator)
    return {"x": x, "y": y} if ratings > 1 else {"x": x[:, 0], "y": y[:, 0]}


def caller(of_rows: Callable[..., None], rows: dict[str, Tensor]) -> Callable[[], float]:
    """CPU seconds of a step, of a chunk that it takes: those of the wall on a quiet machine."""
    first = Batch.whole({name: column[:BATCH] for name, column in rows.items()}, num_obs=N)
    inference, theta = set_up(of_rows, MeanField, first, N, ELBO())
    update, full = one_round(Adam(lr=0.001), Constant(), FOREVER, FOREVER), torch.full((SLOTS,), BATCH)
    program, state = Fused(inference, update, 0, [0]), update.init(theta)
    held = {name: column.view(SLOTS, 1, BATCH, *column.shape[1:]) for name, column in rows.items()}
    chunk = Batch(held, full[:, None], full, None)
    program.prepare(state, chunk, str)

    def call() -> float:
        nonlocal state
        began = time.thread_time()
        state = program.run(state, chunk, SLOTS).state
        return (time.thread_time() - began) / SLOTS

    return call


def steps(rounds: int) -> Table:
    torch.set_num_threads(1)
    table = Table(title=f"us a step of {BATCH:,} rows · {processor()}, one thread")
    for heading in ("", "ratings a row", "latent integrated out", "left out", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    for kind, ratings in (("logistic", 1), ("Poisson", 1), ("logistic", 10)):
        rows = columns(kind, ratings)
        pair = [caller(model(kind, each), rows) for each in (True, False)]
        taken = [[call() for call in pair] for _ in range(rounds + 1)][1:]
        with_it, without = (median(each[n] for each in taken) for n in (0, 1))
        ratio = median(one / other for one, other in taken)
        table.add_row(kind, str(ratings), f"{1e6 * with_it:.0f}", f"{1e6 * without:.0f}", f"{ratio:.1f}")
    return table
