"""Models without their latents of rows: the densities of rows against closed forms, and the ELBO on top of them."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from svi_problems import F64, build, noise_of, one_group

from trainer.errors import UserError
from trainer.inference.guides.mean_field import MeanField
from trainer.inference.guides.pyro_guides import PyroGuide
from trainer.inference.model.latents import FromUnconstrained
from trainer.inference.model.plates import Batch, PlatedModel
from trainer.inference.rows.integral import Fineness
from trainer.inference.rows.marginal import Marginal, without_latents_of_rows
from trainer.inference.rows.sites import row_sites
from trainer.posterior.draws import latent_draws

N = 11
GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(N, dtype=F64, generator=GENERATOR)
Y = torch.randn(N, 4, dtype=F64, generator=GENERATOR)
ONE = torch.ones((), dtype=F64)


def densities(model, at, nodes=None, draws=None, **columns):
    """log p(row | at) [B]."""
    sites = row_sites(PlatedModel(model, columns), Batch.whole(columns))
    fineness = Fineness.at_first(sites.size, nodes, draws)._replace(steps=12)
    return Marginal(model, "data", sites, fineness).log_density(columns, at)


def mixture(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3, dtype=F64)))
    means = pyro.sample("means", dist.Normal(0 * ONE, 3.0).expand([3]).to_event(1))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(means[k], 1.0), obs=y)


MIXED = {
    "weights": torch.tensor([0.2, 0.3, 0.5], dtype=F64),
    "means": torch.tensor([-1.0, 0.0, 2.0], dtype=F64),
}


def of_mixture(y):
    return dist.MixtureSameFamily(dist.Categorical(MIXED["weights"]), dist.Normal(MIXED["means"], 1.0)).log_prob(y)


def test_a_mixture_is_summed_out():
    torch.testing.assert_close(densities(mixture, MIXED, y=Y[:, 0]), of_mixture(Y[:, 0]), rtol=0, atol=1e-12)


def test_one_row_is_a_row():
    torch.testing.assert_close(densities(mixture, MIXED, y=Y[:1, 0]), of_mixture(Y[:1, 0]), rtol=0, atol=1e-12)


def test_a_discrete_site_in_a_nested_plate_is_summed_out_of_each_entry():
    def model(y):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3, dtype=F64)))
        means = pyro.sample("means", dist.Normal(0 * ONE, 3.0).expand([3]).to_event(1))
        with pyro.plate("data", len(y)), pyro.plate("entries", y.shape[1]):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(means[k], 1.0), obs=y.T)

    torch.testing.assert_close(densities(model, MIXED, y=Y), of_mixture(Y).sum(1), rtol=0, atol=1e-12)


def test_a_class_of_the_row_beside_those_of_its_entries():
    """Two layers: a row's class chooses the weights of its entries' classes."""
    weights = torch.tensor([[0.7, 0.3], [0.1, 0.9]], dtype=F64)

    def model(y):
        share = pyro.sample("share", dist.Beta(ONE, ONE))
        with pyro.plate("data", len(y)):
            group = pyro.sample("group", dist.Bernoulli(share)).long()
            with pyro.plate("entries", y.shape[1]):
                k = pyro.sample("k", dist.Categorical(weights[group]))
                pyro.sample("y", dist.Normal(3.0 * k, 1.0), obs=y.T)

    share = torch.tensor(0.4, dtype=F64)
    of_entries = [dist.MixtureSameFamily(dist.Categorical(w), dist.Normal(torch.tensor([0.0, 3.0], dtype=F64), 1.0))
                  .log_prob(Y).sum(1) for w in weights]  # fmt: skip
    want = torch.logsumexp(torch.stack([(1 - share).log() + of_entries[0], share.log() + of_entries[1]]), 0)
    torch.testing.assert_close(densities(model, {"share": share}, y=Y), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_hidden_markov_chain_is_the_forward_recursion(length):
    def model(y):
        move = pyro.sample("move", dist.Dirichlet(torch.ones(2, 2, dtype=F64)).to_event(1))
        means = pyro.sample("means", dist.Normal(0 * ONE, 3.0).expand([2]).to_event(1))
        with pyro.plate("data", len(y)):
            state = 0
            for t in pyro.markov(range(length)):
                state = pyro.sample(f"z_{t}", dist.Categorical(move[state]))
                pyro.sample(f"y_{t}", dist.Normal(means[state], 1.0), obs=y[:, t])

    move = torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=F64)
    means = torch.tensor([-1.0, 1.0], dtype=F64)
    alpha = move[0].log() + dist.Normal(means, 1.0).log_prob(Y[:, :1])
    for t in range(1, length):
        step = torch.logsumexp(alpha[:, :, None] + move.log(), 1)
        alpha = step + dist.Normal(means, 1.0).log_prob(Y[:, t, None])
    found = densities(model, {"move": move, "means": means}, y=Y)
    torch.testing.assert_close(found, torch.logsumexp(alpha, 1), rtol=0, atol=1e-12)


def test_a_masked_latent_keeps_its_distribution():
    """Its sum over the states is 1, whatever the mask; what it leads to counts where that is observed."""
    seen = torch.arange(N) % 2 == 0

    def model(y):
        share = pyro.sample("share", dist.Beta(ONE, ONE))
        with pyro.plate("data", len(y)), poutine.mask(mask=seen[: len(y)]):
            k = pyro.sample("k", dist.Bernoulli(share))
            pyro.sample("y", dist.Normal(k, 1.0), obs=y)

    share = torch.tensor(0.3, dtype=F64)
    kinds = dist.Categorical(torch.stack([1 - share, share]))
    want = dist.MixtureSameFamily(kinds, dist.Normal(torch.tensor([0.0, 1.0], dtype=F64), 1.0)).log_prob(Y[:, 0])
    found = densities(model, {"share": share}, y=Y[:, 0])
    torch.testing.assert_close(found, torch.where(seen, want, 0.0), rtol=0, atol=1e-12)


def factors(y, size=3):
    loadings = pyro.sample("loadings", dist.Normal(0 * ONE, 1.0).expand([size, 4]).to_event(2))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0 * ONE, 1.0).expand([size]).to_event(1))
        pyro.sample("y", dist.Normal(z @ loadings, 0.5).to_event(1), obs=y)


@pytest.mark.parametrize(("size", "nodes", "draws"), [(1, 1, 0), (2, 2, 0), (3, 0, 1), (3, 0, 8)])
def test_the_evidence_of_gaussian_rows_is_exact(size, nodes, draws):
    def model(y):
        factors(y, size)

    loadings = torch.randn(size, 4, dtype=F64, generator=GENERATOR)
    found = densities(model, {"loadings": loadings}, nodes, draws, y=Y)
    covariance = loadings.T @ loadings + 0.25 * torch.eye(4, dtype=F64)
    want = dist.MultivariateNormal(torch.zeros(4, dtype=F64), covariance).log_prob(Y)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-9)


def test_a_latent_on_an_interval_goes_through_its_bijection():
    counts = torch.tensor([0.0, 3.0, 10.0, 7.0], dtype=F64)

    def model(count):
        a = pyro.sample("a", dist.Gamma(ONE, ONE))
        with pyro.plate("data", len(count)):
            p = pyro.sample("p", dist.Beta(a, 2.0))
            pyro.sample("count", dist.Binomial(10, p), obs=count)

    want = dist.BetaBinomial(3 * ONE, 2 * ONE, 10).log_prob(counts)
    torch.testing.assert_close(densities(model, {"a": 3 * ONE}, 60, count=counts), want, rtol=0, atol=1e-8)
    torch.testing.assert_close(densities(model, {"a": 3 * ONE}, 9, count=counts), want, rtol=0, atol=2e-3)


def test_a_latent_on_a_simplex_too():
    counts = torch.tensor([[3.0, 1.0, 2.0], [6.0, 0.0, 0.0], [2.0, 2.0, 2.0]], dtype=F64)
    alpha = torch.tensor([2.0, 1.5, 3.0], dtype=F64)

    def model(counts):
        scale = pyro.sample("scale", dist.Gamma(ONE, ONE))
        with pyro.plate("data", len(counts)):
            p = pyro.sample("p", dist.Dirichlet(scale * alpha))
            pyro.sample("counts", dist.Multinomial(6, p, validate_args=False), obs=counts)

    want = dist.DirichletMultinomial(alpha, 6).log_prob(counts)
    torch.testing.assert_close(densities(model, {"scale": ONE}, 40, counts=counts), want, rtol=0, atol=1e-6)


def test_a_class_beside_a_number_is_summed_within_the_integral():
    """Student's t of two scales, as a normal whose mean has a class: a mixture of two normals."""

    def model(y):
        tau = pyro.sample("tau", dist.HalfNormal(2 * ONE))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(0.3 * ONE))
            u = pyro.sample("u", dist.Normal(0.0, tau))
            pyro.sample("y", dist.Normal(u + 0.5 * k, 1.0), obs=y)

    spread = (1 + 0.8**2) ** 0.5
    kinds = dist.Categorical(torch.tensor([0.7, 0.3], dtype=F64))
    want = dist.MixtureSameFamily(kinds, dist.Normal(torch.tensor([0.0, 0.5], dtype=F64), spread)).log_prob(Y[:, 0])
    torch.testing.assert_close(densities(model, {"tau": 0.8 * ONE}, 25, y=Y[:, 0]), want, rtol=0, atol=1e-8)


def test_several_sites_of_a_row_are_one_integral():
    def model(y):
        tau = pyro.sample("tau", dist.HalfNormal(2 * ONE))
        with pyro.plate("data", len(y)):
            a = pyro.sample("a", dist.Normal(0.0, tau))
            b = pyro.sample("b", dist.Normal(0 * ONE, 0.5))
            pyro.sample("y", dist.Normal(torch.stack([a, a + b], -1), 1.0).to_event(1), obs=y)

    tau = 0.8 * ONE
    covariance = torch.tensor([[1 + 0.64, 0.64], [0.64, 1 + 0.64 + 0.25]], dtype=F64)
    want = dist.MultivariateNormal(torch.zeros(2, dtype=F64), covariance).log_prob(Y[:, :2])
    torch.testing.assert_close(densities(model, {"tau": tau}, y=Y[:, :2]), want, rtol=0, atol=1e-9)


def test_a_latent_whose_distribution_tells_no_mean():
    """As one that a transform makes: its place in the first run of the model comes from its support alone."""

    def model(y):
        tau = pyro.sample("tau", dist.HalfNormal(2 * ONE))
        with pyro.plate("data", len(y)):
            moved = dist.transforms.AffineTransform(0.5, tau)
            u = pyro.sample("u", dist.TransformedDistribution(dist.Normal(torch.zeros(len(y), dtype=F64), 1.0), moved))
            pyro.sample("y", dist.Normal(u, 1.0), obs=y)

    inference, _ = build(model, y=Y[:, 0])
    assert inference.sites == ("tau", "y")
    want = dist.Normal(0.5 * ONE, (1 + 0.8**2) ** 0.5 * ONE).log_prob(Y[:, 0])
    torch.testing.assert_close(densities(model, {"tau": 0.8 * ONE}, y=Y[:, 0]), want, rtol=0, atol=1e-9)


def effects(x, y):
    b = pyro.sample("b", dist.Normal(0 * ONE, 1.0))
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0 * ONE, 0.6))
        pyro.sample("y", dist.Normal(b * x + u, 0.8), obs=y)


def collapsed(x, y):
    b = pyro.sample("b", dist.Normal(0 * ONE, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


@pytest.mark.parametrize("kl", ["analytic", "monte_carlo"])
def test_the_elbo_and_its_gradient_are_those_of_the_collapsed_model(kl):
    data, eps = {"x": X, "y": Y[:, 0]}, noise_of(torch.full((1, 1, 1), 0.7, dtype=F64))
    values = []
    for model in (effects, collapsed):
        inference, theta = build(model, kl=kl, num_obs=50, **data)
        at = theta.clone().requires_grad_()
        terms = inference.terms(at, eps, one_group(**data), 1.0)
        values.append((terms.detach(), torch.autograd.grad(terms.sum(), at)[0]))
        assert inference.sites == ("b", "y")
        assert inference.kinds == ("kl_global", "likelihood")
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-8)


def test_weights_and_padding_count_as_ever():
    weight = torch.arange(N, dtype=F64)
    data = {"x": X, "y": Y[:, 0], "weight": weight}
    eps = noise_of(torch.zeros(1, 1, 1, dtype=F64))
    rows = one_group(**data)._replace(valid=torch.tensor([7]), batch_rows=torch.tensor(7))
    found = [build(model, num_obs=N, **data)[0] for model in (effects, collapsed)]
    theta = torch.tensor([0.2, -1.0], dtype=F64)
    one, two = (each.terms(theta, eps, rows, 1.0) for each in found)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-8)


def test_batches_add_up_to_the_whole():
    data = {"x": X, "y": Y[:, 0]}
    inference, theta = build(effects, **data)
    eps = noise_of(torch.full((1, 1, 1), 0.7, dtype=F64))
    whole = inference.terms(theta, eps, one_group(**data), 1.0)
    parts = [one_group(x=X[some], y=Y[some, 0]) for some in (slice(0, 4), slice(4, N))]
    sizes = [4 / N, 1 - 4 / N]
    found = sum(size * inference.terms(theta, eps, part, 1.0) for size, part in zip(sizes, parts, strict=True))
    torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-10)


def test_the_guides_own_latents_of_rows_stay_its_own():
    """A guide that holds z of each row: the class beside it is summed out, z is not."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0 * ONE, 1.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.3 * ONE))
            pyro.sample("y", dist.Normal(z + k, 1.0), obs=y)

    def guide(y):
        pyro.sample("mu", dist.Normal(pyro.param("m", 0.1 * ONE), 0.2))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(0.5 * y, 0.7))

    y = Y[:, 0]
    batch = Batch.whole({"y": y}, torch.arange(N))
    plated = without_latents_of_rows(PlatedModel(model, {"y": y}), batch, guide_holds=True)
    assert plated.sites.kept == ("z",)
    with FromUnconstrained({"mu": 0.1 * ONE, "z": X}):
        trace = poutine.trace(plated).get_trace(batch)
    trace.compute_log_prob()
    kinds = dist.Categorical(torch.tensor([0.7, 0.3], dtype=F64))
    want = dist.MixtureSameFamily(kinds, dist.Normal(torch.stack([X, X + 1], -1), 1.0)).log_prob(y)
    torch.testing.assert_close(trace.nodes["y"]["log_prob"], want, rtol=0, atol=1e-12)
    inference, _ = build(model, lambda plated, _: PyroGuide(PlatedModel(guide, {"y": y})), y=y)
    assert inference.model.sites is not None


def test_a_model_without_latents_of_rows_is_left_as_it_is():
    plated = PlatedModel(collapsed, ("x", "y"))
    assert without_latents_of_rows(plated, Batch.whole({"x": X, "y": Y[:, 0]})) is plated


def endless(y):
    rate = pyro.sample("rate", dist.Gamma(ONE, ONE))
    with pyro.plate("data", len(y)):
        n = pyro.sample("n", dist.Poisson(rate))
        pyro.sample("y", dist.Normal(n, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (endless, r'latent site "n" is a Poisson, which has no end of states'),
    ],
)
def test_what_cannot_be_integrated_is_one_sentence(model, said):
    with pytest.raises(UserError, match=said):
        build(model, MeanField, y=Y[:, 0])


def test_the_row_sites_are_said_in_words():
    sites = row_sites(PlatedModel(effects, ("x", "y")), Batch.whole({"x": X, "y": Y[:, 0]}))
    assert sites.sentence() == "u of each row integrated out (1 number)"
    sites = row_sites(PlatedModel(mixture, ("y",)), Batch.whole({"y": Y[:, 0]}))
    assert sites.sentence() == "k of each row summed out"


def test_math_of_the_oracles():
    """A closed form by hand, so that the comparisons above cannot be wrong together."""
    by_hand = np.log(0.2 * math.exp(-0.5) + 0.3 + 0.5 * math.exp(-2.0)) - 0.5 * math.log(2 * math.pi)
    assert float(of_mixture(torch.zeros(1, dtype=F64))) == pytest.approx(by_hand, abs=1e-12)


def test_what_globals_alone_decide_asks_for_no_density_of_a_row(monkeypatch):
    inference, theta = build(mixture, num_obs=N, y=Y[:, 0])
    monkeypatch.setattr(Marginal, "log_density", lambda *_: pytest.fail("a density of the rows"))
    drawn = latent_draws(inference, theta, Batch.whole({"y": Y[:, 0]}), 0, range(3))
    assert {name: value.shape for name, value in drawn.items()} == {"weights": (3, 3), "means": (3, 3)}


def counts(y):
    w = pyro.sample("w", dist.Normal(0 * ONE, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson((w + pyro.sample("u", dist.Normal(0 * ONE, 1.0))).exp()), obs=y)


def mixed_up(y):
    """Gaussian given a class that is summed out."""
    w = pyro.sample("w", dist.Normal(0 * ONE, 1.0))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Bernoulli(0.5 * ONE))
        pyro.sample("y", dist.Normal(pyro.sample("u", dist.Normal(w, 1.0)) + k, 1.0), obs=y)


SEEN = {
    "factors": (factors, Y, True),
    "counts": (counts, Y[:, 0].abs().round(), False),
    "mixed up": (mixed_up, Y[:, 0], False),
}


@pytest.mark.parametrize(("model", "y", "gaussian"), SEEN.values(), ids=SEEN)
def test_gaussian_rows_are_found_and_take_no_nodes(model, y, gaussian):
    found = without_latents_of_rows(PlatedModel(model, ("y",)), Batch.whole({"y": y}))
    assert found.fn.gaussian is gaussian
    assert (found.fineness is None) is gaussian


def test_gaussian_rows_of_many_numbers_are_exact():
    """Where 16 even points would not be."""
    inference, theta = build(factors, num_obs=N, y=Y)
    noise = torch.randn(1, 1, 12, dtype=F64, generator=GENERATOR)
    found = inference.terms(theta, noise_of(noise), one_group(y=Y), 1.0)[list(inference.sites).index("y")]
    loadings = (theta[:12] + theta[12:].exp() * noise.flatten()).view(3, 4)
    covariance = loadings.T @ loadings + 0.25 * torch.eye(4, dtype=F64)
    want = dist.MultivariateNormal(torch.zeros(4, dtype=F64), covariance).log_prob(Y).sum()
    assert float(found.detach()) == pytest.approx(float(want), abs=1e-9)


def test_a_long_chain_counts_as_several_rows_where_memory_is_shared_out():
    """What the derivatives of a chain keep grows with its length, although each of its tensors is small."""

    def copies(length):
        def model(y):
            share = pyro.sample("share", dist.Beta(ONE, ONE))
            with pyro.plate("data", len(y)):
                state = torch.zeros(len(y), dtype=F64)
                for t in pyro.markov(range(length)):
                    state = pyro.sample(f"z_{t}", dist.Bernoulli(0.5 * share + 0.3 * state))
                    pyro.sample(f"y_{t}", dist.Normal(state, 1.0), obs=y[:, 0])

        return without_latents_of_rows(PlatedModel(model, ("y",)), Batch.whole({"y": Y})).copies

    short, long = copies(5), copies(60)
    assert long > 5 * short


def test_a_row_takes_as_much_as_its_nodes_write():
    found = without_latents_of_rows(PlatedModel(SEEN["counts"][0], ("y",)), Batch.whole({"y": SEEN["counts"][1]}))
    few = found.copies
    found.refine(Fineness(1, 90))
    assert found.copies == pytest.approx(10 * few, rel=0.2)
