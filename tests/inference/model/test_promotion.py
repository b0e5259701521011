"""Columns of whole numbers and truth values in products, as in NumPy."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from svi_problems import F64, batch_of, build, noise_of, one_group
from torch import nn

from trainer.errors import UserError
from trainer.inference.model.plates import PlatedModel

WHOLE = torch.arange(15).reshape(5, 3) % 4 - 1
FLAGS = WHOLE > 0
W = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
M = torch.linspace(-1, 1, 6, dtype=F64).reshape(3, 2)
LINEAR = nn.Linear(3, 2, dtype=F64)
CONVOLUTION = nn.Conv1d(1, 2, 2, dtype=F64)

PRODUCTS = {
    "x @ w": lambda x: x @ W,
    "w @ x.T": lambda x: W @ x.mT,
    "matmul": lambda x: torch.matmul(x, M),
    "x.mv": lambda x: x.mv(W),
    "x.mm": lambda x: x.mm(M),
    "bmm": lambda x: torch.bmm(x[None], M[None]),
    "addmm": lambda x: torch.addmm(M[0], x, M),
    "einsum": lambda x: torch.einsum("bi,ij->bj", x, M),
    "tensordot": lambda x: torch.tensordot(x, M, dims=1),
    "inner": lambda x: torch.inner(x, W),
    "dot": lambda x: x[0].dot(W),
    "linear": lambda x: F.linear(x, M.mT),
    "a module": LINEAR,
    "modules": nn.Sequential(LINEAR, nn.Tanh()),
    "convolution": lambda x: CONVOLUTION(x[:, None]),
    "mean": lambda x: x.mean(-1) * W[0],
    "stacked columns": lambda x: torch.stack([torch.ones_like(x[:, 0]), x[:, 1], x[:, 2]], -1) @ W,
}


def through(value, x):
    """What a model makes of its column ``x``."""
    return PlatedModel(lambda x: value(x), ["x"])(batch_of(x=x))


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("x", [WHOLE, FLAGS], ids=["whole", "truth values"])
def test_a_product_is_that_of_the_same_floats(kind, x):
    torch.set_default_dtype(F64)
    try:
        assert torch.equal(through(PRODUCTS[kind], x), PRODUCTS[kind](x.double()))
    finally:
        torch.set_default_dtype(torch.float32)


def test_differences_of_truth_values_count():
    flags = FLAGS[:, 0]
    assert torch.equal(through(lambda x: 1 - x, flags), (~flags).long())
    assert torch.equal(through(lambda x: W[0] - x, flags), W[0] - flags.double())
    assert torch.equal(through(lambda x: x - x.double().mean(), flags), flags.double() - flags.double().mean())


def test_what_indexes_counts_or_chooses_is_as_it_was():
    seen = through(lambda x: (x, W[x[:, 0]], F.embedding(x.abs(), M), x.sum(), x + 1), WHOLE.abs() % 3)
    assert seen[0].dtype == seen[3].dtype == seen[4].dtype == torch.int64
    assert torch.equal(seen[1], W[(WHOLE.abs() % 3)[:, 0]])
    chosen = through(lambda x: (torch.where(x[:, 0], 1.0, 2.0), ~x), FLAGS)
    assert torch.equal(chosen[0], torch.where(FLAGS[:, 0], 1.0, 2.0))
    assert torch.equal(chosen[1], ~FLAGS)


def model(x, seen, treated, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1))
    effect = pyro.sample("effect", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
    with pyro.plate("data", len(x)), poutine.mask(mask=seen):
        mean = x @ w + torch.where(treated, effect[0], effect[1])
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def test_the_step_is_that_of_the_same_floats():
    def by_floats(x, seen, treated, y):
        model(x.double(), seen > 0, treated > 0, y)

    flags, y = FLAGS[:, 0], torch.linspace(-1, 1, 5, dtype=F64)
    kept = {"x": WHOLE, "seen": ~FLAGS[:, 1], "treated": flags, "y": y}
    floats = {name: column.double() for name, column in kept.items()}
    eps = torch.linspace(-1, 1, 5, dtype=F64)[None, None]
    both = [build(fn, **columns) for fn, columns in ((model, kept), (by_floats, floats))]
    terms = [
        inference.terms(theta, noise_of(eps), one_group(**columns), 1.0)
        for (inference, theta), columns in zip(both, (kept, floats))
    ]
    assert torch.equal(*terms)


def test_truth_values_as_an_index_are_told_apart_from_codes():
    def indexed(treated, y):
        effect = pyro.sample("effect", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(effect[treated], 1.0), obs=y)

    with pytest.raises(UserError, match=r"effect\[treated.long\(\)\]"):
        build(indexed, treated=FLAGS[:, 0], y=torch.zeros(5, dtype=F64))
