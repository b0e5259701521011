"""Run by test_ranks.py, not a test: four gloo processes that train the same problems as 1, 2 and 4 ranks.

`python ranks.py OUT STORE` writes OUT: {problem/W: theta, terms}. The processes are forked after the imports, and each
world size is a group of the same four, so torch and Pyro are imported once.
"""

import multiprocessing
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.distributed as distributed
from pyro.distributions import constraints

from trainer.inference.guides.full_rank import FullRank
from trainer.inference.guides.mean_field import MeanField
from trainer.inference.guides.pyro_guides import PyroGuide
from trainer.inference.model.plates import Batch, PlatedModel
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.optim.optimizers import SGD, Adam
from trainer.inference.optim.rounds import one_round
from trainer.inference.optim.schedules import Cosine
from trainer.inference.programs.local_steps import LocalSteps
from trainer.inference.programs.program import Eager
from trainer.inference.setup import set_up

GROUPS, ROWS, STEPS, N = 4, 6, 50, 5000
WORLDS = (1, 2, 4)


def regression(x: torch.Tensor, y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
    spread = pyro.sample("spread", dist.HalfNormal(x.new_tensor(1.0)))
    bias = pyro.param("bias", torch.zeros((), dtype=x.dtype))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.StudentT(4.0, x @ w + bias, spread), obs=y)


def with_local(x: torch.Tensor, y: torch.Tensor) -> None:
    m = pyro.sample("m", dist.Normal(x.new_zeros(()), 1.0))
    pyro.factor("once", -((m - 0.5) ** 2))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("y", dist.Normal(z + x.sum(-1), 0.5), obs=y)


def with_many_locals(x: torch.Tensor, y: torch.Tensor) -> None:
    """So many numbers of a row that an encoder holds them."""
    m = pyro.sample("m", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0).expand([17]).to_event(1))
        pyro.sample("y", dist.Normal(m + z.sum(-1) + x.sum(-1), 0.5), obs=y)


def local_guide(x: torch.Tensor, y: torch.Tensor) -> None:
    loc = pyro.param("loc", torch.zeros((), dtype=x.dtype))
    slope, spread = (pyro.param(n, torch.tensor(0.4, dtype=x.dtype), constraint=constraints.positive) for n in "ab")
    pyro.sample("m", dist.Normal(loc, 0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * (y - x.sum(-1)), spread))


PROBLEMS: dict[str, tuple[Any, Any, str, torch.dtype]] = {
    "mean_field, float64": (regression, MeanField, "analytic", torch.float64),
    "mean_field, float32": (regression, MeanField, "analytic", torch.float32),
    "full_rank, float64": (regression, FullRank, "sticking_the_landing", torch.float64),
    "full_rank, float32": (regression, FullRank, "analytic", torch.float32),
    "amortized, float64": (
        with_local,
        lambda _, batch: PyroGuide(PlatedModel(local_guide, batch.columns)),
        "monte_carlo",
        torch.float64,
    ),
    "encoder, float64": (with_many_locals, MeanField, "analytic", torch.float64),
}


def rows(dtype: torch.dtype) -> Batch:
    """All groups' chunk: uneven valid counts; group 2 empty at step 7, the second half of the groups at step 9."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS, GROUPS, ROWS, 3))
    y = x @ np.array([1.0, -1.0, 0.5]) + 0.3 + 0.2 * rng.standard_t(4, size=x.shape[:3])
    valid = rng.integers(1, ROWS + 1, size=(STEPS, GROUPS))
    valid[7, 2] = valid[9, 2:] = 0
    ids = np.arange(STEPS * GROUPS * ROWS).reshape(x.shape[:3])
    columns = {"x": torch.tensor(x).to(dtype), "y": torch.tensor(y).to(dtype)}
    return Batch(columns, torch.tensor(valid), torch.tensor(valid.sum(1)), torch.tensor(ids))


def train(name: str, rank: int, world: int, reduce: Any) -> dict[str, np.ndarray]:
    model, guide, kl, dtype = PROBLEMS[name]
    chunk = rows(dtype)
    first = {column: values[0, 0] for column, values in chunk.columns.items()}
    batch = Batch.whole(first, chunk.row_id[0, 0], N)
    inference, theta = set_up(model, guide, batch, N, ELBO(kl, pairs=2))
    held = list(range(rank * GROUPS // world, (rank + 1) * GROUPS // world))
    mine = Batch(
        {column: values[:, held] for column, values in chunk.columns.items()},
        chunk.valid[:, held],
        chunk.batch_rows,
        chunk.row_id[:, held],
    )
    update = one_round(Adam(lr=0.05), Cosine(), STEPS, 30)
    result = Eager(inference, update, 11, held, SimpleNamespace(size=world, sum=reduce)).run(
        update.init(theta), mine, STEPS
    )
    out = {
        "theta": result.state.theta,
        "average": result.state.average,
        "terms": result.terms,
        "norm": result.grad_norm,
    }
    return {key: value.double().numpy() for key, value in out.items()}


def train_locally(rank: int, reduce: Any) -> dict[str, np.ndarray]:
    """Two ranks, full batches: plain SGD with and without local steps, and 12 local steps taken apart by hand."""
    model, guide, kl, dtype = PROBLEMS["mean_field, float64"]
    chunk = rows(dtype)._replace(
        valid=torch.full((STEPS, GROUPS), ROWS), batch_rows=torch.full((STEPS,), GROUPS * ROWS)
    )
    first = {column: values[0, 0] for column, values in chunk.columns.items()}
    batch = Batch.whole(first, chunk.row_id[0, 0], N)
    inference, theta = set_up(model, guide, batch, N, ELBO(kl))
    held = [2 * rank, 2 * rank + 1]
    columns = {column: values[:, held] for column, values in chunk.columns.items()}
    mine = Batch(columns, chunk.valid[:, held], chunk.batch_rows, chunk.row_id[:, held])
    update = one_round(SGD(lr=0.01), Cosine(), STEPS, 30)
    common = (inference, update, 11, held, SimpleNamespace(size=2, sum=reduce))
    start = update.init(theta)
    together = Eager(*common).run(start, mine, STEPS)
    single = LocalSteps(*common, sync_every=1, program=Eager).run(start, mine, STEPS)
    state, alone = start, Eager(inference, update, 11, held)
    own = mine._replace(batch_rows=mine.valid.sum(1))
    for at, stop in ((0, 5), (5, 10), (10, 12)):
        state = alone.run(state, own.part(at, stop), stop - at).state
        mean = {name: reduce(each) / 2 for name, each in state.moments.items()}
        state = state._replace(theta=reduce(state.theta) / 2, moments=mean)
    several = LocalSteps(*common, sync_every=5, program=Eager)
    seven = several.run(start, mine, 10).state
    out = {"together": together.state.theta, "single": single.state.theta, "average": single.state.average,
           "together average": together.state.average, "terms": single.terms, "together terms": together.terms,
           "by hand": state.theta, "several": several.run(seven, mine.part(10, 12), 2).state.theta}  # fmt: skip
    return {f"local/{key}": value.numpy() for key, value in out.items()}


def process(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=max(WORLDS))
    results = {}
    for world in WORLDS:
        group = distributed.new_group(list(range(world)))
        if rank < world:

            def reduce(tensor: torch.Tensor, group: Any = group) -> torch.Tensor:
                total = tensor.clone()
                distributed.all_reduce(total, group=group)
                return total

            for name in PROBLEMS:
                results |= {f"{name}/{world}/{key}": value for key, value in train(name, rank, world, reduce).items()}
            if world == 2:
                results |= train_locally(rank, reduce)
    np.savez(out.replace(".npz", f".{rank}.npz"), **results)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=process, args=(rank, sys.argv[2], sys.argv[1])) for rank in range(max(WORLDS))]
    for child in children:
        child.start()
    for child in children:
        child.join()
    sys.exit(any(child.exitcode for child in children))
