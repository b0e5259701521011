"""Latents of rows given what is observed, at draws of the globals: closed forms, and the mixture over the draws."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from svi_problems import F64

from trainer.inference.model.plates import Batch, PlatedModel
from trainer.inference.rows.marginal import Marginal
from trainer.inference.rows.posterior import RowPosterior, even_points, weighted
from trainer.inference.rows.sites import row_sites

N, LEVELS = 7, (0.05, 0.5, 0.95)
GENERATOR = torch.Generator().manual_seed(2)
Y = torch.randn(N, 3, dtype=F64, generator=GENERATOR)
ONE = torch.ones((), dtype=F64)
NORMAL = torch.distributions.Normal


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def posterior(model, at, **columns):
    """Of the model at draws ``at`` [R, ...]."""
    sites = row_sites(PlatedModel(model, columns), Batch.whole(columns))
    draws = len(next(iter(at.values()))) if at else 1
    return RowPosterior(Marginal(model, "data", sites), columns, at, draws)


def found(model, at, **columns):
    """Moments of the continuous latents and probabilities of the discrete ones."""
    made = posterior(model, at, **columns)
    nodes, shares = made.known()
    return {} if nodes is None else made.moments(nodes, LEVELS), shares


def gaussian(y, size=2):
    tau = pyro.sample("tau", dist.HalfNormal(ONE))
    with pyro.plate("data", len(y)):
        u = pyro.sample("u", dist.Normal(0 * ONE, tau).expand([size]).to_event(1))
        pyro.sample("y", dist.Normal(u @ LOADINGS[:size], 0.5).to_event(1), obs=y)


LOADINGS = torch.randn(3, 3, dtype=F64, generator=GENERATOR)
TAUS = tensor(0.7, 1.1, 0.9)


def of_gaussian(tau, size):
    """Mean [B, d] and covariance [d, d]."""
    loadings = LOADINGS[:size]
    covariance = torch.linalg.inv(torch.eye(size, dtype=F64) / tau**2 + loadings @ loadings.T / 0.25)
    return Y @ loadings.T @ covariance / 0.25, covariance


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gaussian_rows_are_exact(size):
    mean, covariance = of_gaussian(TAUS[0], size)
    moments, _ = found(lambda y: gaussian(y, size), {"tau": TAUS[:1]}, y=Y)
    torch.testing.assert_close(moments["u"].mean, mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(moments["u"].sd, covariance.diagonal().sqrt().expand(N, size), rtol=0, atol=1e-8)
    below = NORMAL(mean, covariance.diagonal().sqrt()).cdf(moments["u"].quantiles)
    levels = tensor(*LEVELS)[:, None, None].expand_as(below)
    torch.testing.assert_close(below, levels, rtol=0, atol=1e-6 if size == 1 else 0.02)


@pytest.mark.parametrize("size", [1, 2])
def test_draws_of_the_globals_are_mixed(size):
    """The law of total variance."""
    every = [of_gaussian(tau, size) for tau in TAUS]
    means = torch.stack([mean for mean, _ in every])
    within = torch.stack([covariance.diagonal() for _, covariance in every])
    moments, _ = found(lambda y: gaussian(y, size), {"tau": TAUS}, y=Y)
    torch.testing.assert_close(moments["u"].mean, means.mean(0), rtol=0, atol=1e-8)
    want = (within.mean(0) + means.var(0, unbiased=False)).sqrt()
    torch.testing.assert_close(moments["u"].sd, want, rtol=0, atol=1e-8)
    below = NORMAL(means, within.sqrt()[:, None]).cdf(moments["u"].quantiles[:, None]).mean(1)
    levels = tensor(*LEVELS)[:, None, None].expand_as(below)
    torch.testing.assert_close(below, levels, rtol=0, atol=1e-6 if size == 1 else 0.01)


def test_a_row_does_not_depend_on_the_others():
    at, model = {"tau": TAUS}, lambda y: gaussian(y, 1)
    whole, _ = found(model, at, y=Y)
    for some in (slice(0, 2), slice(2, 3), slice(3, 7)):
        part, _ = found(model, at, y=Y[some])
        torch.testing.assert_close(part["u"].mean, whole["u"].mean[some], rtol=0, atol=1e-12)
        torch.testing.assert_close(part["u"].quantiles, whole["u"].quantiles[:, some], rtol=0, atol=1e-10)


def test_counts_against_a_fine_grid():
    counts = tensor(0, 1, 2, 5, 20, 100, 3000)

    def model(count):
        tau = pyro.sample("tau", dist.HalfNormal(ONE))
        with pyro.plate("data", len(count)):
            u = pyro.sample("u", dist.Normal(0 * ONE, tau))
            pyro.sample("count", dist.Poisson(1.5 * u.exp()), obs=count)

    u = torch.linspace(-14, 14, 400_001, dtype=F64)[:, None]
    shares = torch.softmax(
        NORMAL(0 * ONE, 0.7).log_prob(u) + torch.distributions.Poisson(1.5 * u.exp()).log_prob(counts), 0
    )
    mean = (shares * u).sum(0)
    sd = (shares * (u - mean) ** 2).sum(0).sqrt()
    below = shares.cumsum(0) - shares / 2
    moments, _ = found(model, {"tau": tensor(0.7)}, count=counts)
    torch.testing.assert_close(moments["u"].mean, mean, rtol=0, atol=1e-7)
    torch.testing.assert_close(moments["u"].sd, sd, rtol=0, atol=1e-7)
    for level, quantile in zip(LEVELS, moments["u"].quantiles):
        want = u[(below < level).sum(0)].squeeze(1)
        torch.testing.assert_close(quantile, want, rtol=0, atol=1e-4)


COUNTS = tensor(0, 3, 10, 7)


def of_counts(count):
    a = pyro.sample("a", dist.Gamma(ONE, ONE))
    with pyro.plate("data", len(count)):
        p = pyro.sample("p", dist.Beta(a, 2.0))
        pyro.sample("count", dist.Binomial(10, p), obs=count)


def test_a_latent_on_an_interval_has_its_moments_there():
    exact = torch.distributions.Beta(3 + COUNTS, 2 + 10 - COUNTS)
    moments, _ = found(of_counts, {"a": tensor(3.0)}, count=COUNTS)
    torch.testing.assert_close(moments["p"].mean, exact.mean, rtol=0, atol=1e-7)
    torch.testing.assert_close(moments["p"].sd, exact.stddev, rtol=0, atol=1e-7)
    p = torch.linspace(0, 1, 1_000_001, dtype=F64)[1:-1, None]
    below = exact.log_prob(p).exp().cumsum(0) * 1e-6
    for level, quantile in zip(LEVELS, moments["p"].quantiles):
        want = p[(below < level).sum(0)].squeeze(1)
        torch.testing.assert_close(quantile, want, rtol=0, atol=1e-4)


def test_each_number_of_a_simplex_has_its_own_quantiles():
    """One number behind two: where the first rises, the second falls."""

    def model(count):
        a = pyro.sample("a", dist.Gamma(ONE, ONE))
        with pyro.plate("data", len(count)):
            p = pyro.sample("p", dist.Dirichlet(torch.stack([a, 2 * ONE])))
            pyro.sample("count", dist.Binomial(10, p[:, 0]), obs=count)

    one = found(of_counts, {"a": tensor(3.0)}, count=COUNTS)[0]["p"]
    two = found(model, {"a": tensor(3.0)}, count=COUNTS)[0]["p"]
    torch.testing.assert_close(two.mean, torch.stack([one.mean, 1 - one.mean], 1), rtol=0, atol=1e-7)
    want = torch.stack([one.quantiles, 1 - one.quantiles.flip(0)], 2)
    torch.testing.assert_close(two.quantiles, want, rtol=0, atol=1e-6)


def test_a_support_may_depend_on_the_globals():
    """u below ``top``, with nothing observed of it: uniform, whatever the draw."""

    def model(y):
        top = pyro.sample("top", dist.Gamma(ONE, ONE))
        with pyro.plate("data", len(y)):
            u = pyro.sample("u", dist.Uniform(0 * ONE, top))
            pyro.sample("y", dist.Normal(0 * u, 1.0), obs=y)

    tops = tensor(*torch.linspace(1, 2, 40).tolist())
    moments, _ = found(model, {"top": tops}, y=Y[:, 0])
    torch.testing.assert_close(moments["u"].mean, (tops / 2).mean().expand(N), rtol=0, atol=1e-5)
    below = (moments["u"].quantiles[..., None] / tops).clamp(max=1).mean(-1)
    torch.testing.assert_close(below, tensor(*LEVELS)[:, None].expand(3, N), rtol=0, atol=0.01)


def test_classes_have_their_responsibilities():
    def model(y):
        means = pyro.sample("means", dist.Normal(0 * ONE, 3.0).expand([2]).to_event(1))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(tensor(0.3, 0.7)))
            pyro.sample("y", dist.Normal(means[k], 1.0), obs=y)

    means = torch.stack([tensor(-1.0, 1.0), tensor(0.0, 2.0)])
    joint = tensor(0.3, 0.7) * NORMAL(means, 1.0).log_prob(Y[:, :1, None]).exp()  # [B, R, K]
    moments, shares = found(model, {"means": means}, y=Y[:, 0])
    assert moments == {}
    torch.testing.assert_close(shares["k"], (joint / joint.sum(-1, keepdim=True)).mean(1), rtol=0, atol=1e-10)


def test_a_class_beside_a_number():
    """Both by hand: given the class, y is normal with the number's variance in it."""

    def model(y):
        tau = pyro.sample("tau", dist.HalfNormal(ONE))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(0.3 * ONE))
            u = pyro.sample("u", dist.Normal(0 * ONE, tau))
            pyro.sample("y", dist.Normal(u + 2 * k, 0.5), obs=y)

    tau, y = 0.8, Y[:, 0]
    spread, kinds = (tau**2 + 0.25) ** 0.5, tensor(0, 2)
    joint = tensor(0.7, 0.3) * NORMAL(kinds, spread).log_prob(y[:, None]).exp()
    share = joint / joint.sum(1, keepdim=True)
    means, variance = (y[:, None] - kinds) * tau**2 / spread**2, tau**2 * 0.25 / spread**2
    mean = (share * means).sum(1)
    sd = ((share * means**2).sum(1) + variance - mean**2).sqrt()
    moments, shares = found(model, {"tau": tensor(tau)}, y=y)
    torch.testing.assert_close(shares["k"], share, rtol=0, atol=1e-6)
    torch.testing.assert_close(moments["u"].mean, mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(moments["u"].sd, sd, rtol=0, atol=1e-6)


def test_sites_in_nested_plates_have_the_axes_of_the_model_behind_the_rows():
    def model(y):
        tau = pyro.sample("tau", dist.HalfNormal(ONE))
        with pyro.plate("data", len(y)):
            a = pyro.sample("a", dist.Normal(0 * ONE, tau))
            with pyro.plate("entries", 3):
                u = pyro.sample("u", dist.Normal(0 * ONE, tau))
                k = pyro.sample("k", dist.Bernoulli(0.5 * ONE))
                pyro.sample("y", dist.Normal(u + a + 5 * k, 0.5), obs=y.T)

    moments, shares = found(model, {"tau": TAUS}, y=Y)
    assert moments["u"].mean.shape == (N, 3)
    assert moments["a"].quantiles.shape == (3, N)
    assert shares["k"].shape == (N, 2, 3)
    torch.testing.assert_close(shares["k"].sum(1), torch.ones(N, 3, dtype=F64), rtol=0, atol=1e-9)


def test_a_model_that_cannot_be_mapped_gives_the_same():
    def model(y):
        tau = pyro.sample("tau", dist.HalfNormal(ONE))
        scale = float(tau) if float(tau) > 0 else 0.0
        with pyro.plate("data", len(y)):
            u = pyro.sample("u", dist.Normal(0 * ONE, scale).expand([1]).to_event(1))
            pyro.sample("y", dist.Normal(u @ LOADINGS[:1], 0.5).to_event(1), obs=y)

    ours, _ = found(model, {"tau": TAUS}, y=Y)
    want, _ = found(lambda y: gaussian(y, 1), {"tau": TAUS}, y=Y)
    torch.testing.assert_close(ours["u"].mean, want["u"].mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(ours["u"].quantiles, want["u"].quantiles, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2])
def test_draws_given_the_row_have_its_moments(size):
    draws = 400
    made = posterior(lambda y: gaussian(y, size), {"tau": TAUS[:1].expand(draws)}, y=Y)
    nodes, _ = made.known()
    uniform = torch.rand(draws, N, dtype=F64, generator=torch.Generator().manual_seed(3))
    u = made.drawn(nodes, uniform)
    mean, covariance = of_gaussian(TAUS[0], size)
    sd = covariance.diagonal().sqrt()
    torch.testing.assert_close(u.mean(0), mean, rtol=0, atol=5 * float(sd.max()) / draws**0.5)
    torch.testing.assert_close(u.std(0), sd.expand(N, size), rtol=5 * (2 * draws) ** -0.5, atol=0)
    sites = made.sites(3, u[3])
    assert torch.equal(sites["u"], u[3])


def test_states_are_drawn_at_the_numbers_of_the_row():
    def model(y):
        tau = pyro.sample("tau", dist.HalfNormal(ONE))
        with pyro.plate("data", len(y)):
            u = pyro.sample("u", dist.Normal(0 * ONE, tau))
            k = pyro.sample("k", dist.Categorical(tensor(0.5, 0.5)))
            pyro.sample("y", dist.Normal(u + 100.0 * k, 1.0), obs=y)

    y = tensor(0, 100, 0)
    made = posterior(model, {"tau": TAUS}, y=y)
    sites = made.sites(0, torch.zeros(3, 1, dtype=F64))
    assert sites["k"].tolist() == [0, 1, 0]


def test_points_are_even_and_those_of_each_draw_a_standard_normal():
    points = even_points(4, 32, 3, ONE)
    assert points.shape == (4, 64, 3)
    torch.testing.assert_close(points.mean(1), torch.zeros(4, 3, dtype=F64), rtol=0, atol=1e-12)
    torch.testing.assert_close(points.mT @ points / 64, torch.eye(3, dtype=F64).expand(4, 3, 3), rtol=0, atol=1e-12)
    assert len(points.flatten(0, 1).unique(dim=0)) == 256


def test_weighted_points_have_their_quantiles():
    values = torch.arange(101, dtype=F64)[:, None, None, None].expand(-1, 2, 3, 1)
    found = weighted(values, torch.full((101, 2, 3), 1 / 101, dtype=F64), (0.25, 0.5))
    torch.testing.assert_close(found.mean, torch.full((3, 1), 50.0, dtype=F64))
    torch.testing.assert_close(found.quantiles, tensor(25, 50)[:, None, None].expand(2, 3, 1), rtol=0, atol=0.5)
