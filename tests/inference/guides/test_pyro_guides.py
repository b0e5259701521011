"""Pyro's autoguides and users' own, under given noise: repeatable, antithetic, by row, and trained by the same step."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from svi_problems import (
    F64,
    batch_of,
    build,
    chunk_of,
    noise_of,
    one_group,
    regression,
    regression_data,
    regression_posterior,
    trace_at,
    with_objective,
)
from torch import nn

from trainer.inference.guides.pyro_guides import PyroGuide
from trainer.inference.model.latents import is_latent
from trainer.inference.model.plates import Batch, PlatedModel
from trainer.inference.optim.optimizers import Adam
from trainer.inference.optim.rounds import one_round
from trainer.inference.optim.schedules import Cosine
from trainer.inference.programs.program import Eager


class VAE(nn.Module):
    """Pyro's tutorial on variational autoencoders, at width 4."""

    def __init__(self, z_dim=2):
        super().__init__()
        self.z_dim = z_dim
        self.decoder = nn.Sequential(nn.Linear(z_dim, 5), nn.Softplus(), nn.Linear(5, 4), nn.Sigmoid()).double()
        self.encoder = nn.Sequential(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 2 * z_dim)).double()

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = x.new_zeros((x.shape[0], self.z_dim))
            z_scale = x.new_ones((x.shape[0], self.z_dim))
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
            pyro.sample("obs", dist.Bernoulli(self.decoder(z), validate_args=False).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(z_loc, z_log_scale.exp()).to_event(1))


def amortized(guide):
    return lambda _, batch: PyroGuide(PlatedModel(guide, batch.columns))


def auto(kind, **options):
    return lambda model, _: PyroGuide(kind(model, **options))


def both(x):
    """A global and a local latent, with the data plate at dim -2."""
    a = pyro.sample("a", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x), dim=-2), pyro.plate("parts", 4, dim=-1):
        z = pyro.sample("z", dist.Normal(a.sum(), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def both_guide(x):
    loc = pyro.param("a_loc", torch.zeros(2, dtype=F64))
    pyro.sample("a", dist.MultivariateNormal(loc, torch.eye(2, dtype=F64) * 0.1))
    slope = pyro.param("slope", torch.tensor(0.5, dtype=F64))
    spread = pyro.param("spread", torch.tensor(0.3, dtype=F64), constraint=constraints.positive)
    with pyro.plate("data", len(x), dim=-2):
        parts = pyro.plate("parts", 4, dim=-1)  # made inside the data plate
        with parts:
            pyro.sample("z", dist.Normal(slope * x, spread))


torch.manual_seed(0)
IMAGES = (torch.rand(10, 4) < 0.4).double()
DATA = regression_data(orthogonal=False)
GUIDES = {
    "AutoNormal": (regression, auto(AutoNormal), DATA, (3, 0)),
    "AutoDiagonalNormal": (regression, auto(AutoDiagonalNormal), DATA, (3, 0)),
    "AutoMultivariateNormal": (regression, auto(AutoMultivariateNormal), DATA, (3, 0)),
    "AutoLowRankMultivariateNormal": (regression, auto(AutoLowRankMultivariateNormal, rank=2), DATA, (5, 0)),
    "AutoDelta": (regression, auto(AutoDelta), DATA, (0, 0)),
    "VAE": (None, None, {"x": IMAGES}, (0, 2)),
    "global and local": (both, amortized(both_guide), {"x": IMAGES}, (2, 4)),
}


def problem(name):
    model, guide, data, size = GUIDES[name]
    torch.manual_seed(0)
    if name == "VAE":
        vae = VAE()
        model, guide = vae.model, amortized(vae.guide)
    inference, theta = build(model, guide, **data)
    assert inference.guide.noise_size == size
    return inference, theta, data


def random_noise(inference, rows, seed=1):
    generator = torch.Generator().manual_seed(seed)
    elements, per_row = inference.guide.noise_size
    return torch.randn(elements, dtype=F64, generator=generator), torch.randn(
        rows, per_row, dtype=F64, generator=generator
    )


def values_at(inference, theta, data, elements, rows):
    trace = trace_at(inference, theta, elements, batch_of(**data), rows).trace
    return {name: site["value"] for name, site in trace.nodes.items() if is_latent(site)}


@pytest.mark.parametrize("name", GUIDES)
def test_given_noise_decides_the_draw(name):
    """The same noise, the same bits, whatever torch's generator did between; -noise mirrors it."""
    inference, theta, data = problem(name)
    elements, rows = random_noise(inference, len(data["x"]))
    first = values_at(inference, theta, data, elements, rows)
    torch.randn(17)
    again = values_at(inference, theta, data, elements, rows)
    mirrored = values_at(inference, theta, data, -elements, -rows)
    middle = values_at(inference, theta, data, 0 * elements, 0 * rows)
    for site, value in first.items():
        assert torch.equal(value, again[site])
        torch.testing.assert_close(value + mirrored[site], 2 * middle[site], rtol=1e-12, atol=1e-12)
        assert name == "AutoDelta" or (value - middle[site]).abs().min() > 1e-6


@pytest.mark.parametrize("name", ["VAE", "global and local"])
def test_a_rows_noise_goes_where_the_row_goes(name):
    inference, theta, data = problem(name)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    elements, rows = random_noise(inference, 10)
    here = values_at(inference, theta, data, elements, rows)
    there = values_at(inference, theta, {"x": IMAGES[order]}, elements, rows[order])
    local = "latent" if name == "VAE" else "z"
    torch.testing.assert_close(there[local], here[local][order], rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["VAE", "global and local"])
def test_a_run_does_not_depend_on_the_order_of_the_rows(name):
    """Eager takes a row's noise from its id: rows permuted within their group, the same path."""
    inference, theta, _ = problem(name)
    chunk = chunk_of(6, 2, 5, x=(4,))
    chunk = chunk._replace(columns={"x": (chunk.columns["x"] > 0).double()})
    order = torch.tensor([3, 0, 4, 1, 2])
    turned = chunk._replace(columns={"x": chunk.columns["x"][:, :, order]}, row_id=chunk.row_id[:, :, order])
    moved = chunk._replace(row_id=chunk.row_id + 1)
    update = one_round(Adam(lr=0.05), Cosine(), 6, 6)
    inference = with_objective(inference, 60, antithetic=True, pairs=2)
    ends = [
        Eager(inference, update, 3, [0, 1]).run(update.init(theta), c, 6).state.theta for c in (chunk, turned, moved)
    ]
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-12)
    assert (ends[2] - ends[0]).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["AutoNormal", "AutoMultivariateNormal", "VAE", "global and local"])
def test_the_elbo_agrees_with_pyros_on_the_full_data(name):
    """The mean of many of our draws and of Pyro's Trace_ELBO, within both standard errors."""
    inference, theta, data = problem(name)
    pairs = 600
    generator = torch.Generator().manual_seed(2)
    (e, n), rows = inference.guide.noise_size, len(data["x"])
    ours = []
    for _ in range(pairs // 10):
        flat = torch.randn(1, 10, e, dtype=F64, generator=generator)
        local = torch.randn(1, 10, rows, n, dtype=F64, generator=generator)
        with torch.no_grad():
            terms = with_objective(inference, pairs=10).terms(theta, noise_of(flat, local), one_group(**data), 1.0)
        ours.append(float(terms.sum()))

    def theirs(_):
        torch.manual_seed(5)
        plated = lambda: inference.model(batch_of(**data))  # noqa: E731
        guide = lambda: inference.guide.guide(batch_of(**data))  # noqa: E731
        with torch.no_grad():
            return torch.tensor([-Trace_ELBO().loss(plated, guide) for _ in range(pairs)], dtype=F64)

    theirs = inference.parameters.call(inference.parameters.unflatten(theta), theirs)
    ours = torch.tensor(ours, dtype=F64)
    error = (theirs.var() / pairs + ours.var() / len(ours)).sqrt()
    assert abs(float(ours.mean() - theirs.mean())) < 4 * float(error) + 1e-9


@pytest.mark.parametrize("name", ["AutoNormal", "AutoMultivariateNormal", "AutoLowRankMultivariateNormal", "AutoDelta"])
def test_autoguides_are_trained_to_the_posterior_mean(name):
    inference, theta, data = problem(name)
    steps = 300
    update = one_round(Adam(lr=0.05), Cosine(), steps, steps)
    columns = {k: v.expand(steps, 1, *v.shape) for k, v in data.items()}
    chunk = Batch(columns, torch.full((steps, 1), 12), torch.full((steps,), 12), None)
    inference = with_objective(inference, antithetic=True)
    state = Eager(inference, update, 0, [0]).run(update.init(theta), chunk, steps).state
    elements = torch.zeros(inference.guide.noise_size[0], dtype=F64)
    w = values_at(inference, state.theta, data, elements, None)["w"]
    torch.testing.assert_close(w, regression_posterior(**data)[0], rtol=0, atol=0.03)


def test_a_vae_learns_and_both_its_networks_move():
    inference, theta, _ = problem("VAE")
    steps = 150
    images = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]], dtype=F64).repeat(5, 1)
    update = one_round(Adam(lr=0.03), Cosine(), steps, steps)
    chunk = Batch(
        {"x": images.expand(steps, 1, 10, 4)},
        torch.full((steps, 1), 10),
        torch.full((steps,), 10),
        torch.arange(10).expand(steps, 1, 10),
    )
    inference = with_objective(inference, antithetic=True)
    result = Eager(inference, update, 0, [0]).run(update.init(theta), chunk, steps)
    elbo = result.terms.sum(1) / 10
    assert float(elbo[:5].mean()) < -2.5  # about 4 log 2
    assert float(elbo[-5:].mean()) > -1.5  # near log 2: which of the two images
    start, end = (inference.parameters.unflatten(t) for t in (theta, result.state.theta))
    assert {name.split(".")[0] for name in start} == {"decoder", "encoder"}
    assert all((end[name] - start[name]).abs().max() > 1e-3 for name in start)


# Draws of other kinds, on a support that the model shares.
def gamma_guide(x):
    pyro.sample("a", dist.Gamma(pyro.param("k", torch.tensor(3.0, dtype=F64), constraint=constraints.positive), 2.0))


def uniform_guide(x):
    width = pyro.param("width", torch.tensor(2.0, dtype=F64), constraint=constraints.positive)
    pyro.sample("a", dist.Uniform(0.5, 0.5 + width))


def shifted(x):
    a = pyro.sample("a", dist.Gamma(x.new_tensor(2.0), 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(a, 1.0), obs=x)


@pytest.mark.parametrize(("guide", "mirrors"), [(gamma_guide, False), (uniform_guide, True)])
def test_draws_that_are_not_normal_are_repeatable_too(guide, mirrors):
    """A uniform is a normal's distribution function, so it mirrors; a Gamma comes from torch's seeded generator."""
    data = {"x": IMAGES[:, 0]}
    inference, theta = build(shifted, amortized(guide), **data)
    elements = torch.full((inference.guide.noise_size[0],), 0.7, dtype=F64)
    first = values_at(inference, theta, data, elements, None)["a"]
    torch.rand(3)
    assert torch.equal(values_at(inference, theta, data, elements, None)["a"], first)
    if mirrors:
        mirrored = values_at(inference, theta, data, -elements, None)["a"]
        assert float(first) == pytest.approx(0.5 + 2 * float(torch.special.ndtr(torch.tensor(0.7, dtype=F64))))
        assert float(first + mirrored) == pytest.approx(2 * 0.5 + 2, abs=1e-12)
    else:
        chunk = chunk_of(8, 1, 5, x=())
        update = one_round(Adam(lr=0.05), Cosine(), 8, 8)
        ends = [Eager(inference, update, s, [0]).run(update.init(theta), chunk, 8).state.theta for s in (3, 3, 4)]
        assert torch.equal(ends[0], ends[1])
        assert not torch.equal(ends[0], ends[2])
