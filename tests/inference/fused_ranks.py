"""Run by test_fused.py, not a test: models of the zoo and others, 200 steps eagerly and fused, on W gloo ranks.

`python fused_ranks.py OUT STORE W MODEL ...` writes OUT.RANK.npz: {model/program/key: array}.
"""

import multiprocessing
import sys
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.distributed as distributed
from pyro.distributions import constraints

from trainer.distributed.comm import ALONE, Group
from trainer.inference.guides.arrow import Arrow
from trainer.inference.guides.full_rank import FullRank
from trainer.inference.guides.low_rank import LowRank
from trainer.inference.guides.mean_field import MeanField
from trainer.inference.guides.pyro_guides import PyroGuide
from trainer.inference.model.plates import Batch, PlatedModel
from trainer.inference.model.ragged import Csr, Ragged
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.optim.optimizers import Adam
from trainer.inference.optim.rounds import one_round
from trainer.inference.optim.schedules import Cosine
from trainer.inference.programs.fused import Fused
from trainer.inference.programs.program import Program
from trainer.inference.setup import is_family, set_up
from trainer.models.hierarchical import VaryingSlopes
from trainer.models.linear import LinearRegression
from trainer.models.logistic import LogisticRegression
from trainer.models.poisson import PoissonRegression

GROUPS, ROWS, STEPS, CUT, N = 2, 64, 200, 77, 100_000
WIDTH, MOST = 7, 4 * 64 + 3


def with_local(x: torch.Tensor, y: torch.Tensor) -> None:
    m = pyro.sample("m", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("y", dist.Normal(z + x.sum(-1), 0.5), obs=y)


def local_guide(x: torch.Tensor, y: torch.Tensor) -> None:
    slope, spread = (pyro.param(n, torch.tensor(0.4, dtype=x.dtype), constraint=constraints.positive) for n in "ab")
    pyro.sample("m", dist.Normal(pyro.param("loc", torch.zeros((), dtype=x.dtype)), 0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * (y - x.sum(-1)), spread))


def of_words(words: Any, tokens: Any, y: torch.Tensor) -> None:
    """On a csr and a ragged column, or the same ones dense."""
    w = pyro.sample("w", dist.Normal(y.new_zeros(WIDTH), 1.0).to_event(1))
    t = pyro.sample("t", dist.Normal(y.new_zeros(WIDTH), 1.0).to_event(1))
    of_tokens = tokens.total(t[tokens.values]) if isinstance(tokens, Ragged) else tokens @ t
    with pyro.plate("data", len(words)):
        pyro.sample("y", dist.Normal(words @ w + of_tokens, 1.0), obs=y)


def amortized(_: PlatedModel, batch: Batch) -> PyroGuide:
    return PyroGuide(PlatedModel(local_guide, batch.columns))


PROBLEMS: dict[str, tuple[Any, Any, torch.dtype]] = {
    "linear": (LinearRegression(features=4), MeanField, torch.float32),
    "logistic": (LogisticRegression(features=4), MeanField, torch.float32),
    "poisson": (PoissonRegression(features=4), MeanField, torch.float32),
    "hierarchical": (VaryingSlopes(groups=30, slopes=2), MeanField, torch.float32),
    "full rank": (LogisticRegression(features=4), FullRank, torch.float32),
    "low rank": (LogisticRegression(features=4), LowRank, torch.float32),
    "arrow": (VaryingSlopes(groups=30, slopes=2), Arrow, torch.float32),
    "amortized": (with_local, amortized, torch.float64),
    "dense words": (of_words, MeanField, torch.float64),
    "words": (of_words, MeanField, torch.float64),
}


def all_rows(model: Any, dtype: torch.dtype) -> Batch:
    """The chunk of both groups, with uneven valid counts and a group that is empty at step 3."""
    generator = np.random.default_rng(0)
    count = STEPS * GROUPS * ROWS
    zoo = model if hasattr(model, "rows") else LinearRegression(features=2, noise_sd=1.0)
    columns = zoo.rows(zoo.truth(generator), generator, 0, count)
    valid = generator.integers(ROWS // 2, ROWS + 1, size=(STEPS, GROUPS))
    valid[3, 1] = 0
    tensors = {name: torch.as_tensor(c).view(STEPS, GROUPS, ROWS, *c.shape[1:]) for name, c in columns.items()}
    floats = {name: t.to(dtype) if t.is_floating_point() else t.long() for name, t in tensors.items()}
    ids = torch.arange(count).view(STEPS, GROUPS, ROWS)
    return Batch(floats, torch.tensor(valid), torch.tensor(valid.sum(1)), ids)


def word_rows(varying: bool) -> Batch:
    """The chunk of rows of 0 to 4 words, as csr and ragged or dense; each slot has room for ``MOST`` entries."""
    generator = torch.Generator().manual_seed(0)
    shape, other = (STEPS, GROUPS), all_rows(None, torch.float64)
    lengths = torch.randint(0, 5, (*shape, ROWS), generator=generator)
    offsets = torch.cat([torch.zeros(*shape, 1, dtype=torch.long), lengths.cumsum(-1)], dim=-1)
    used = torch.arange(MOST) < offsets[..., -1:]
    words = torch.randint(0, WIDTH, (*shape, MOST), generator=generator)
    times = torch.where(used, torch.rand(*shape, MOST, dtype=torch.float64, generator=generator), 0)
    given: dict[str, Any] = {
        "words": Csr(offsets, times, torch.where(used, words, 0), WIDTH),
        "tokens": Ragged(offsets, torch.where(used, words, words[..., :1])),
        "y": other.columns["y"],
    }
    if not varying:
        row = (torch.arange(MOST)[..., None] >= offsets[..., None, 1:-1]).sum(-1)
        hot = torch.nn.functional.one_hot(words).double() * used[..., None]
        of_row = torch.nn.functional.one_hot(row, ROWS).double().transpose(-1, -2)
        given |= {"words": of_row @ (hot * times[..., None]), "tokens": of_row @ hot}
    return other._replace(columns=given)


def train(name: str, rank: int, world: int) -> dict[str, np.ndarray]:
    model, guide, dtype = PROBLEMS[name]
    torch.set_default_dtype(dtype)
    chunk = word_rows(name == "words") if model is of_words else all_rows(model, dtype)
    first = {column: values[0][0] for column, values in chunk.columns.items()}
    batch = Batch.whole(first, chunk.row_id[0, 0], N)
    inference, theta = set_up(model, guide, batch, N, ELBO("analytic" if is_family(guide) else "monte_carlo"))
    held = list(range(rank * GROUPS // world, (rank + 1) * GROUPS // world))
    mine = chunk.map(lambda each: each[:, held].contiguous() if each.dim() > 1 else each)
    mine = mine if inference.guide.noise_size[1] else mine._replace(row_id=None)
    update = one_round(Adam(lr=0.01), Cosine(), STEPS, 150)
    fused = Fused(inference, update, 11, held, Group(rank, world) if world > 1 else ALONE)
    start = update.init(theta)
    programs: list[tuple[str, Program]] = [("eager", fused.reference)]
    if name != "dense words":  # what the other is compared with
        fused.prepare(start, mine.part(0, 4))
        programs.append(("fused", fused))
    out = {}
    for kind, program in programs:
        whole = program.run(start, mine, STEPS)
        cut = program.run(start, mine.part(0, CUT + 5), CUT)  # five slots more than are used
        rest = program.run(cut.state, mine.part(CUT, STEPS), STEPS - CUT)
        found = {"theta": whole.state.theta, "average": whole.state.average, "terms": whole.terms,
                 "norm": whole.grad_norm, "theta cut": rest.state.theta, "average cut": rest.state.average,
                 "square cut": rest.state.moments["square"], "square": whole.state.moments["square"],
                 "terms cut": torch.cat([cut.terms, rest.terms])}  # fmt: skip
        out |= {f"{name}/{kind}/{key}": value.double().numpy() for key, value in found.items()}
    return out


def process(rank: int, world: int, store: str, out: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    if world > 1:
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    results: dict[str, np.ndarray] = {}
    for name in names:
        results |= train(name, rank, world)
    np.savez(f"{out}.{rank}.npz", **results)
    if world > 1:
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    out, store, world, names = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=process, args=(rank, world, store, out, names)) for rank in range(world)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    sys.exit(any(child.exitcode for child in children))
