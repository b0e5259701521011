"""The traced step: what a graph holds equals what the function computes; what Python decides is never frozen."""

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from svi_problems import F64, build, chunk_of
from torch import nn

from trainer.errors import UserError
from trainer.inference.optim.optimizers import Adam
from trainer.inference.optim.rounds import one_round
from trainer.inference.optim.schedules import Cosine
from trainer.inference.programs.fused import Fused
from trainer.inference.programs.tracing import Traced, Untraceable, trace


def plated(x, y):
    """A model by its likelihood alone: w ~ N(0, 1), then what the test adds."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[-1]), 1.0).to_event(1))
    return w, pyro.plate("data", len(x))


def nested(x, y):
    w, data = plated(x, y)
    groups = pyro.plate("groups", 4, dim=-2)
    with groups:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with data, groups:
        pyro.sample("y", dist.Normal(x @ w + level, 1.0), obs=y.expand(4, -1))


def gathered(x, y):
    w, data = plated(x, y)
    with pyro.plate("groups", 5):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with data:
        pyro.sample("y", dist.Normal(x @ w + level[(y.abs() * 10).long() % 5], 1.0), obs=y)


def factors(x, y):
    w, data = plated(x, y)
    pyro.deterministic("twice", 2 * w)
    with data:
        pyro.factor("tilt", -((y - x @ w) ** 4))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def supports(x, y):
    share = pyro.sample("share", dist.Dirichlet(x.new_ones(3)))
    rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
    tilt = pyro.sample("tilt", dist.Beta(x.new_tensor(2.0), 3.0))
    cuts = pyro.sample("cuts", dist.Normal(x.new_zeros(2), 1.0).to_event(1).mask(False))
    with pyro.plate("data", len(x)):
        pyro.sample("kind", dist.Categorical(share), obs=(y.abs() * 10).long() % 3)
        pyro.sample("count", dist.Poisson(rate), obs=(y.abs() * 10).floor())
        pyro.sample("hits", dist.Binomial(10, tilt), obs=(y.abs() * 10).long() % 10)
        pyro.sample("y", dist.Normal(cuts.sum(), 1.0), obs=y)


def correlated(x, y):
    chol = pyro.sample("chol", dist.LKJCholesky(2, x.new_tensor(2.0)))
    cov = chol @ chol.mT + 0.1 * torch.eye(2, dtype=x.dtype)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MultivariateNormal(x.new_zeros(2), cov), obs=x)


class Network(PyroModule):
    def __init__(self):
        super().__init__()
        self.inner = PyroModule[nn.Linear](2, 3).double()
        self.outer = PyroModule[nn.Linear](3, 1).double()
        self.outer.weight = PyroSample(dist.Normal(torch.zeros(1, 3, dtype=F64), 1.0).to_event(2))

    def forward(self, x, y):
        mean = self.outer(torch.tanh(self.inner(x))).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


LOOKUP = torch.linspace(0, 1, 7, dtype=F64)


def captured(x, y):
    w, data = plated(x, y)
    with data:
        pyro.sample("y", dist.Normal(x @ w + LOOKUP[(y.abs() * 10).long() % 7], 1.0), obs=y)


def traced(model):
    """(the step's graph, the flat step, its inputs on a third batch)."""
    chunk = chunk_of(3, 1, 8, F64, x=(2,), y=())
    inference, theta = build(model, num_obs=1000, **{name: c[0, 0] for name, c in chunk.columns.items()})
    update = one_round(Adam(lr=0.1), Cosine(), 10, 5)
    program = Fused(inference, update, 3, [0])
    step, (first, second, third) = program.flat(update.init(theta), chunk)
    return trace(step, first, second), step, third


@pytest.mark.parametrize(
    "model", [nested, gathered, factors, supports, correlated, Network(), captured], ids=lambda m: type(m).__name__
)
def test_the_graph_computes_the_step_on_rows_it_never_saw(model):
    graph, step, inputs = traced(model)
    assert isinstance(graph, Traced)
    got, want = graph.graph(*inputs, *graph.constants), step(*inputs)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=0) for a, b in zip(got, want, strict=True))
    assert not any("_linalg_check" in str(node.target) for node in graph.graph.graph.nodes)
    held = [node for node in graph.graph.graph.nodes if node.op == "get_attr"]
    assert held == []
    if model is captured:
        assert [constant.tolist() for constant in graph.constants] == [LOOKUP.tolist()]


def with_noise(value):
    """A model whose mean has ``value(x)`` added."""

    def model(x, y):
        w, data = plated(x, y)
        with data:
            pyro.sample("y", dist.Normal(x @ w + value(x), 1.0), obs=y)

    return model


counter = iter(range(1000))


@pytest.mark.parametrize(
    "value",
    [
        lambda x: random.random() * 1e-12,
        lambda x: np.random.normal() * 1e-12,
        lambda x: torch.from_numpy(np.random.normal(size=x.shape[0])) * 1e-12,
        lambda x: next(counter) * 1e-12,
        lambda x: sum([x[:, 0]] * (next(counter) % 7)) * 0.0,
    ],
    ids=["python's number", "numpy's number", "numpy's array", "a counter", "a loop of another length"],
)
def test_what_python_decides_is_refused(value):
    with pytest.raises(UserError, match=r"two traces of the model .* program=eager"):
        traced(with_noise(value))


@pytest.mark.parametrize(
    ("value", "operation"),
    [
        (lambda x: x.mean().item() * 0, "aten._local_scalar_dense"),
        (lambda x: 0.0 if x.mean() > 0 else -0.0, "aten._local_scalar_dense"),
        (lambda x: torch._standard_gamma(x[:, 0].abs() + 1) * 0, "aten._standard_gamma"),
    ],
    ids=["item", "branch", "gamma"],
)
def test_what_cannot_be_traced_is_named_with_its_site(value, operation):
    with pytest.raises(Untraceable, match=rf'{operation}.* after site "w"'):
        traced(with_noise(value))


@pytest.mark.parametrize("counts", [[3.0, 5.0, 0.0], [3.0, 5.0, 2.0]])
def test_a_number_put_by_a_mask_can_be_batched(counts):
    """Multinomial's log density puts 0 where neither a count nor a probability is."""
    given = torch.tensor([counts] * 4, dtype=F64)

    def density(u, given):
        logits = torch.cat([u, torch.full((len(u), 1), -torch.inf, dtype=F64)], 1)
        return (dist.Multinomial(1, logits=logits, validate_args=False).log_prob(given),)

    draws = torch.randn(3, 4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    graph, constants = trace(density, [draws[0], given], [draws[1], given])
    mapped = torch.vmap(torch.func.functionalize(graph), in_dims=(0, None, *(None for _ in constants)))
    found = mapped(draws, given, *constants)[0]
    torch.testing.assert_close(found, torch.stack([density(u, given)[0] for u in draws]))
