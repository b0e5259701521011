"""Draws that go through the model together give what they give one by one, whatever the model."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from posterior_problems import F64, batch_of, build
from pyro.infer import autoguide
from torch import nn

from trainer.inference.estimates import many_draws as together_module
from trainer.inference.estimates.many_draws import Antithetic, Normals, Together, terms_together
from trainer.inference.guides.mean_field import MeanField
from trainer.inference.guides.pyro_guides import PyroGuide
from trainer.inference.model.plates import PlatedModel
from trainer.inference.model.ragged import Csr
from trainer.inference.setup import guide_factory
from trainer.models.hierarchical import VaryingSlopes
from trainer.models.linear import LinearRegression
from trainer.models.logistic import LogisticRegression
from trainer.posterior.draws import draw, latent_draws, latents_of

ROWS, PAIRS = 23, 9


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(before)


def table():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(ROWS, 3, generator=generator)
    return {
        "x": x,
        "y": x.sum(1) + torch.randn(ROWS, generator=generator),
        "group": torch.arange(ROWS) % 4,
        "weight": torch.arange(ROWS) % 3 + 0.5,
    }


def linear(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    s = pyro.sample("s", dist.HalfCauchy(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, s), obs=y)


def mixture(x, y=None):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(2)))
    w = pyro.sample("w", dist.MultivariateNormal(torch.zeros(3), torch.eye(3)))
    with pyro.plate("data", len(x)):
        places = (x @ w)[:, None] + torch.arange(2.0)
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(p), dist.Normal(places, 1.0)), obs=y)


class Network(pyro.nn.PyroModule):
    """A network of its own parameters, dropout, and a latent head."""

    def __init__(self):
        super().__init__()
        self.inner, self.dropout = nn.Linear(3, 4), nn.Dropout(0.3)

    def forward(self, x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 2.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.dropout(self.inner(x).tanh()) @ w, 1.0), obs=y)


def noisy(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    shift = torch.empty(()).normal_()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x + 0.1 * torch.randn_like(x)) @ w + shift, 1.0), obs=y)


def by_row(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x @ w + z, 1.0), obs=y)


def by_row_guide(x, y=None):
    pyro.sample("w", dist.Normal(pyro.param("loc", torch.zeros(3)), 0.3).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.4)) * y, 0.8))


def gamma_guide(x, y=None):
    pyro.sample("w", dist.Normal(pyro.param("loc", torch.zeros(3)), 0.3).to_event(1))
    pyro.sample("s", dist.Gamma(pyro.param("shape", torch.tensor(5.0)), 5.0))


def asking(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    factor = 1.0 if w.sum().item() > 0 else 2.0
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(factor * (x @ w), 1.0), obs=y)


def branching(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    factor = 1.0 if w.sum() > 0 else 2.0
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(factor * (x @ w), 1.0), obs=y)


def own(guide):
    return lambda model, batch: PyroGuide(PlatedModel(guide, batch.columns))


def auto(name):
    return guide_factory(getattr(autoguide, name), ("x", "y"), "data")


CASES = {
    "linear": (LinearRegression(), MeanField, "_mapped"),
    "logistic": (LogisticRegression(), MeanField, "_mapped"),
    "hierarchical": (VaryingSlopes(groups=4), MeanField, "_mapped"),
    "mixture": (mixture, MeanField, "_mapped"),
    "csr": (linear, MeanField, "_mapped"),
    "network": (Network, MeanField, "_traced"),
    "own noise": (noisy, MeanField, "_traced"),
    "latents of rows": (by_row, own(by_row_guide), "_traced"),
    "AutoNormal": (linear, auto("AutoNormal"), "_traced"),
    "AutoMultivariateNormal": (linear, auto("AutoMultivariateNormal"), "_traced"),
    "AutoDelta": (linear, auto("AutoDelta"), "_mapped"),
    "a Gamma draw": (linear, own(gamma_guide), "one_by_one"),
    ".item()": (asking, MeanField, "one_by_one"),
    "a branch": (branching, MeanField, "one_by_one"),
}


def problem(name):
    model, guide, way = CASES[name]
    columns = table()
    if name == "csr":
        columns["x"] = Csr(torch.arange(0, 3 * ROWS + 1, 3), columns["x"].flatten(), torch.arange(3).repeat(ROWS), 3)
    if name == "logistic":
        columns["y"] = (columns["y"] > 0).double()
    pyro.clear_param_store()
    inference, theta = build(model() if model is Network else model, columns, guide)
    generator = torch.Generator().manual_seed(1)
    batch = batch_of({column: columns[column] for column in inference.model.arguments})
    return inference, theta + 0.2 * torch.randn(theta.shape, generator=generator), batch, way


def both(inference, theta, batch, pairs=PAIRS):
    """What a new `Together` gives, its way, and the reference."""
    together, reference = terms_together(inference), terms_together(inference)
    reference.way = reference.one_by_one
    found = [list(Antithetic(each, theta, 3).pairs(batch, 7, 0, pairs)) for each in (together, reference)]
    parts = [[torch.cat([each[i] for each in slices]) for i in range(3)] for slices in found]
    return *parts, together.way.__name__


@pytest.mark.parametrize("name", CASES)
def test_draws_together_are_the_draws_one_by_one(name):
    inference, theta, batch, expected = problem(name)
    got, want, way = both(inference, theta, batch)
    assert way == expected
    assert len(want[1]) == PAIRS
    assert want[1].std() > 0 or name == "AutoDelta"
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_slices_and_their_size_change_nothing(monkeypatch):
    inference, theta, batch, _ = problem("own noise")
    whole, _, _ = both(inference, theta, batch)
    together = terms_together(inference)
    at = Antithetic(together, theta, 3)
    assert len(list(at.pairs(batch, 7, 0, PAIRS))) == 1
    monkeypatch.setattr(together_module, "_BYTES", 4 * 2 * together._written[ROWS, None])
    assert [len(each.inside) for each in at.pairs(batch, 7, 0, PAIRS)] == [4, 4, 1]
    sliced, _, way = both(inference, theta, batch)
    assert way == "_traced"
    for one, other in zip(whole, sliced):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_other_rows_than_the_first_go_the_same_way():
    """A trace is one of so many rows."""
    inference, theta, batch, _ = problem("latents of rows")
    together = terms_together(inference)
    at = Antithetic(together, theta, 3)
    list(at.pairs(batch, 0, 0, PAIRS))
    fewer = batch_of({name: column[:5] for name, column in batch.columns.items()})
    (got,) = at.pairs(fewer, 1, 0, PAIRS)
    together.way = together.one_by_one
    (want,) = at.pairs(fewer, 1, 0, PAIRS)
    torch.testing.assert_close(got.inside, want.inside, rtol=1e-12, atol=0.0)


def test_a_way_that_gives_other_numbers_is_not_taken(monkeypatch):
    inference, theta, batch, _ = problem("mixture")
    right = Together._mapped
    monkeypatch.setattr(Together, "_mapped", lambda *given: right(*given) * (1 + 1e-8))
    assert both(inference, theta, batch)[-1] == "_traced"
    monkeypatch.setattr(Together, "_traced", lambda *given: right(*given) * (1 + 1e-8))
    assert both(inference, theta, batch)[-1] == "one_by_one"


def test_draws_that_take_another_branch_go_one_by_one(monkeypatch):
    inference, theta, batch, _ = problem("mixture")
    right = Together._mapped

    def once(together, theta, batch, normals):
        if len(normals.seeds) > 2:
            raise RuntimeError("data-dependent control flow")
        return right(together, theta, batch, normals)

    monkeypatch.setattr(Together, "_mapped", once)
    got, want, way = both(inference, theta, batch)
    assert way == "once"
    assert torch.equal(got[1], want[1])


def test_few_draws_are_not_worth_a_decision():
    inference, theta, batch, _ = problem("mixture")
    together = terms_together(inference)
    list(Antithetic(together, theta, 3).pairs(batch, 0, 0, 3))
    assert together.way is None


def test_weights_and_padding_count():
    """Padded rows are masked, and rows count by their weight."""
    inference, theta, batch, _ = problem("mixture")
    assert inference.model.weighted
    short = batch._replace(valid=torch.tensor(11))
    got, want, way = both(inference, theta, short)
    assert way == "_mapped"
    torch.testing.assert_close(got[1], want[1], rtol=1e-12, atol=0.0)
    assert not torch.equal(got[1], both(inference, theta, batch)[0][1])


def gradient(loss, at):
    return torch.autograd.grad(loss, at)[0]


def product(loss, at):
    (grad,) = torch.autograd.grad(loss, at, create_graph=True)
    return torch.autograd.grad(grad @ torch.linspace(-1, 1, len(at)), at)[0]


@pytest.mark.parametrize("derivative", [gradient, product])
@pytest.mark.parametrize("name", [name for name in CASES if name != "a Gamma draw"])
def test_derivatives_of_draws_together_are_those_one_by_one(name, derivative):
    inference, theta, batch, expected = problem(name)
    together, reference = terms_together(inference), terms_together(inference)
    reference.way = reference.one_by_one
    size, per_row = inference.guide.noise_size
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(PAIRS, ROWS, per_row, generator=generator) if per_row else None
    normals = Normals.of(torch.randn(PAIRS, size, generator=generator), rows, range(2 * PAIRS), (1.0, -1.0))
    got, want = (
        each(at, batch, normals, lambda terms, at=at: derivative(terms.sum(), at))
        for each, at in ((each, theta.clone().requires_grad_()) for each in (together, reference))
    )
    assert want.abs().max() > 0.01
    assert together.way.__name__ == expected
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10 * float(want.abs().max()))


@pytest.mark.parametrize("name", ["hierarchical", "AutoNormal", "a Gamma draw", "latents of rows", "own noise"])
def test_draws_of_the_latents_are_those_one_by_one(name):
    inference, theta, batch, _ = problem(name)
    got = latent_draws(inference, theta, batch, 3, range(5, 45), (1.0, -1.0))
    for number, sign, place in ((5, 1.0, 0), (5, -1.0, 1), (44, -1.0, 79)):
        nodes = latents_of(draw(inference, theta, batch, 3, number, sign), "data")
        assert set(got) == set(nodes)
        for site, node in nodes.items():
            torch.testing.assert_close(got[site][place], node["value"], rtol=1e-12, atol=1e-13)
