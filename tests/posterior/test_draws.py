"""Draws of latents and of observations: what decides them, and their moments in closed form."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from posterior_problems import F64, at, batch_of, build

from trainer.inference.model.plates import Batch
from trainer.inference.setup import guide_factory
from trainer.posterior.draws import draw, dtype_of, latent_draws, latents_of, observations, parameters_of, predicts_by

N = 400
X = torch.linspace(-2, 2, N, dtype=F64)
COLUMNS = {"x": X, "y": 0.5 * X}
LOC, SD = [0.3, -1.0, 2.0], [0.1, 0.4, 0.01]


def line(x, y=None):
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), 3.0).to_event(1))
    s = pyro.sample("s", dist.LogNormal(x.new_zeros(()), 1.0))
    pyro.deterministic("twice", 2 * w)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w[0] + w[1] * x, s), obs=y)


def per_row(x, y=None):
    """A latent of each row, drawn by an amortized guide."""
    b = pyro.sample("b", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(b, 1.0 + 0 * x))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def amortized(x, y=None):
    loc = pyro.param("loc", torch.tensor(0.5, dtype=F64))
    pyro.sample("b", dist.Normal(loc, 0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(3 * x, 0.2))


@pytest.fixture(scope="module")
def fitted():
    inference, _ = build(line, COLUMNS)
    return inference, at(LOC, SD)


def some(rows, ids=None):
    columns = {name: column[rows] for name, column in COLUMNS.items()}
    return Batch.whole(columns, torch.arange(N)[rows] if ids is None else ids)


def values_of(inference, drawn):
    return {name: node["value"] for name, node in latents_of(drawn, inference.model.plate).items()}


def test_the_antithetic_draw_is_the_mirror_image(fitted):
    inference, theta = fitted
    one, other = (values_of(inference, draw(inference, theta, batch_of(COLUMNS), 5, 3, sign)) for sign in (1.0, -1.0))
    torch.testing.assert_close(one["w"] + other["w"], 2 * torch.tensor(LOC[:2], dtype=F64))
    torch.testing.assert_close(one["s"] * other["s"], torch.tensor(2 * LOC[2], dtype=F64).exp())


def test_a_draw_depends_on_seed_and_number_and_not_on_the_rows(fitted):
    inference, theta = fitted

    def w(rows=slice(None), seed=5, number=3):
        return values_of(inference, draw(inference, theta, some(rows), seed, number))["w"]

    assert torch.equal(w(), w(slice(7, 9)))
    assert not torch.equal(w(), w(seed=6))
    assert not torch.equal(w(), w(number=4))


def test_draws_together_are_the_single_ones_in_turn(fitted):
    """Each number with each sign, one after the other; what the model derives from them too."""
    inference, theta = fitted
    batch = some(slice(0, 3))
    found = latent_draws(inference, theta, batch, 5, range(2, 5), (1.0, -1.0))
    single = [values_of(inference, draw(inference, theta, batch, 5, k, sign)) for k in range(2, 5) for sign in (1, -1)]
    assert list(found) == ["w", "s", "twice"]
    for name in ("w", "s"):
        torch.testing.assert_close(found[name], torch.stack([each[name] for each in single]))
    assert torch.equal(found["twice"], 2 * found["w"])
    assert latent_draws(inference, theta, batch, 5, range(2, 5))["s"].shape == (3,)


def test_many_draws_have_the_guides_moments(fitted):
    """Antithetic: the mean of w is exact; 2,000 pairs give its sd to a few parts in a hundred."""
    inference, theta = fitted
    w = latent_draws(inference, theta, some(slice(0, 2)), 0, range(2000), (1.0, -1.0))["w"]
    torch.testing.assert_close(w.mean(0), torch.tensor(LOC[:2], dtype=F64), rtol=1e-12, atol=1e-12)
    assert (w.std(0) / torch.tensor(SD[:2], dtype=F64) - 1).abs().max() < 5 / math.sqrt(2 * 2000)


def test_latents_of_rows_depend_on_their_number_alone():
    inference, theta = build(per_row, COLUMNS, guide_factory(amortized, COLUMNS), "monte_carlo")

    def z(rows):
        return draw(inference, theta, some(rows), 5, 3).trace.nodes["z"]["value"]

    whole = z(slice(None))
    assert torch.equal(z(torch.tensor([9, 2, 300])), whole[[9, 2, 300]])
    eps = (whole - 3 * X) / 0.2
    assert abs(float(eps.mean())) < 5 / N**0.5
    assert abs(float(eps.std()) - 1) < 5 / (2 * N) ** 0.5
    drawn = draw(inference, theta, some(slice(0, 4)), 5, 3)
    assert list(latents_of(drawn, "data")) == ["b"]
    assert parameters_of(inference, theta, batch_of(COLUMNS)) == {}  # loc is the guide's


def test_observations_are_the_models_given_the_draw(fitted):
    """y = w0 + w1 x + s eps at the draw's own w and s: eps is standard normal over the rows."""
    inference, theta = fitted
    without = Batch.whole({"x": X}, torch.arange(N))  # what is observed need not be there
    drawn = values_of(inference, draw(inference, theta, without, 5, 3))
    found = observations(inference, theta, without, 5, 3)
    assert list(found) == ["y"]
    eps = (found["y"]["value"] - drawn["w"][0] - drawn["w"][1] * X) / drawn["s"]
    assert abs(float(eps.mean())) < 5 / N**0.5
    assert abs(float(eps.std()) - 1) < 5 / (2 * N) ** 0.5
    again = observations(inference, theta, batch_of(COLUMNS), 5, 3)["y"]["value"]
    assert torch.equal(again, found["y"]["value"])
    assert not torch.equal(observations(inference, theta, without, 5, 4)["y"]["value"], again)


def test_torchs_generator_and_default_type_stay(fitted):
    inference, theta = fitted
    before = torch.get_rng_state()
    observations(inference, theta, some(slice(0, 5)), 5, 3)
    draw(inference, theta, some(slice(0, 5)), 5, 3)
    assert torch.equal(torch.get_rng_state(), before)
    with dtype_of(theta):
        assert torch.get_default_dtype() == F64
    assert torch.get_default_dtype() == torch.float32


def test_parameters_are_as_the_model_sees_them():
    def model(x, y=None):
        scale = pyro.param("scale", torch.tensor(2.0, dtype=F64), constraint=dist.constraints.positive)
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, scale), obs=y)

    inference, theta = build(model, COLUMNS)
    found = parameters_of(inference, theta.requires_grad_(), batch_of(COLUMNS))
    assert {name: float(value) for name, value in found.items()} == {"scale": pytest.approx(2.0)}
    assert not found["scale"].requires_grad


@pytest.mark.parametrize(("name", "expected"), [("x", True), ("y", False), ("unused", False)])
def test_a_likelihood_depends_on_what_it_is_given_and_not_on_what_it_observes(name, expected):
    def model(x, unused, y=None):
        line(x, y)

    inference, theta = build(model, {**COLUMNS, "unused": X.exp()})
    assert predicts_by(inference, theta, batch_of({**COLUMNS, "unused": X.exp()}), name) == expected
