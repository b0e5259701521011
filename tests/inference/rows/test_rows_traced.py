"""A step with latents of rows as one traced graph: the numbers of the eager one, for chunks of any rows."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from svi_problems import F64, batch_of, chunk_of, effects

from trainer.inference.guides.mean_field import MeanField
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.optim.optimizers import Adam
from trainer.inference.optim.rounds import one_round
from trainer.inference.optim.schedules import Constant
from trainer.inference.programs import fused as fused_module
from trainer.inference.programs.fused import Fused
from trainer.inference.programs.program import Eager
from trainer.inference.programs.replay import Replay
from trainer.inference.rows.options import DEFAULT, RowOptions
from trainer.inference.setup import set_up

ONE = torch.ones((), dtype=F64)


def slopes(x, y):
    tau = pyro.sample("tau", dist.HalfNormal(ONE))
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, tau).expand([2]).to_event(1))
        pyro.sample("y", dist.Normal(u[:, 0] + u[:, 1] * x, 0.8), obs=y)


def kinds(x, y):
    """Multinomial puts zeros by a mask, which cannot be batched over nodes."""
    tau = pyro.sample("tau", dist.HalfNormal(ONE))
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, tau).expand([2]).to_event(1))
        logits = torch.stack([u[:, 0], x * u[:, 1], torch.zeros_like(x)], -1)
        first = y.abs().round().clamp(max=3)
        counts = torch.stack([first, 3 - first, torch.zeros_like(y)], -1)
        pyro.sample("counts", dist.Multinomial(3, logits=logits, validate_args=False), obs=counts)


def factors(x, y):
    w = pyro.sample("w", dist.Normal(0 * ONE, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0 * ONE, 1.0).expand([3]).to_event(1))
        pyro.sample("y", dist.Normal(torch.tanh(u @ w) * x, 0.8), obs=y)


def mixture(x, y):
    share = pyro.sample("share", dist.Beta(ONE, ONE))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(share))
        pyro.sample("y", dist.Normal(x + 2 * k, 1.0), obs=y)


def indicator(x, y):
    """One state for all rows, of which every one is evaluated."""
    b = pyro.sample("b", dist.Normal(0 * ONE, 1.0))
    on = pyro.sample("on", dist.Bernoulli(0.5 * ONE))
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, 0.5))
        pyro.sample("y", dist.StudentT(4.0, on * b * x + u, 0.8), obs=y)


def chain(x, y):
    stay = pyro.sample("stay", dist.Beta(2 * ONE, ONE))
    move = torch.stack([torch.stack([stay, 1 - stay]), torch.stack([1 - stay, stay])])
    with pyro.plate("data", len(x)):
        state = 0
        for t in pyro.markov(range(3)):
            state = pyro.sample(f"z_{t}", dist.Categorical(move[state]))
            pyro.sample(f"y_{t}", dist.Normal(2.0 * state + x, 1.0), obs=y)


def many(x, y):
    """So many numbers of a row that an encoder holds them."""
    b = pyro.sample("b", dist.Normal(0 * ONE, 1.0))
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, ONE).expand([17]).to_event(1))
        pyro.sample("y", dist.Normal(b * x + u.sum(-1), 0.8), obs=y)


MODELS = [effects, slopes, kinds, factors, mixture, indicator, chain, many]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_the_traced_step_is_the_eager_one(model, monkeypatch):
    same_steps(model, chunk_of(3, 2, 9, x=(), y=()), monkeypatch)


def same_steps(model, chunk, monkeypatch, options=DEFAULT):
    first = batch_of(**{name: each[0, 0] for name, each in chunk.columns.items()})
    objective = ELBO("monte_carlo", antithetic=False)
    inference, theta = set_up(model, MeanField, first, 100, objective, rows=options)
    update = one_round(Adam(lr=0.05), Constant(), 10, 5)
    state, eager, traced = update.init(theta), Eager(inference, update, 3, [0, 1]), Fused(inference, update, 3, [0, 1])
    monkeypatch.setattr(fused_module.Fused, "_made", made)
    traced.prepare(state, chunk, lambda said: None)
    want, got = eager.run(state, chunk, 3), traced.run(state, chunk, 3)
    torch.testing.assert_close(got.state.theta, want.state.theta, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got.terms, want.terms, rtol=1e-10, atol=1e-10)


def persons(x, y):
    """Entries beyond the length of a row are masked."""
    b = pyro.sample("b", dist.Normal(0 * ONE, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(ONE))
    with pyro.plate("data", len(x), dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, tau))
        with pyro.plate("entries", x.shape[1], dim=-1):
            k = pyro.sample("k", dist.Bernoulli(0.3 * ONE))
            pyro.sample("y", dist.StudentT(4.0, b * x + u + k, 0.8), obs=y)


def test_the_traced_step_takes_rows_of_any_lengths(monkeypatch):
    chunk = chunk_of(3, 2, 9, x=(3,), y=(3,))
    chunk.columns["length"] = torch.arange(54).view(3, 2, 9) % 4
    same_steps(persons, chunk, monkeypatch)


def test_the_traced_step_of_a_bound_by_row_is_the_eager_one(monkeypatch):
    same_steps(effects, chunk_of(3, 2, 9, x=(), y=()), monkeypatch, RowOptions("mean_field", nodes=5))


def made(self, traced, rates, state, chunk, say):
    """The traced graph itself, which Python calls."""
    module = fused_module.Scan(traced.graph, rates.graph, len(rates.constants))
    return lambda: Replay(module.before, module.step, lambda work: work)
