"""summary.csv: exact where the map from u is element by element, from draws where it is not, and bits that survive."""

import csv
import math
from typing import ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from posterior_problems import F64, at, batch_of, build
from pyro.infer.autoguide import AutoMultivariateNormal
from scipy import integrate, stats
from torch.distributions import constraints, transforms

from trainer.inference.guides.pyro_guides import PyroGuide
from trainer.posterior import summary as summary_module
from trainer.posterior.summary import _moments, summarize, write_summary

X = {"x": torch.linspace(-1, 1, 6, dtype=F64), "y": torch.linspace(0, 2, 6, dtype=F64)}
LEVELS = (0.05, 0.5, 0.95)
NORMAL = stats.norm.ppf(LEVELS)


def summary_of(model, loc, scale, **options):
    inference, _ = build(model, X, **options)
    return {site.name: site for site in summarize(inference, at(loc, scale), batch_of(X))}


def latent(*sites):
    """A model with latents ``sites`` = (name, distribution), and data that ask nothing of them."""

    def model(x, y=None):
        values: dict[str, torch.Tensor] = {}
        for name, fn in sites:
            values[name] = pyro.sample(name, fn if isinstance(fn, dist.Distribution) else fn(values))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    return model


def of(value, *shape):
    return torch.full(shape, value, dtype=F64)


def test_a_real_site_is_the_guides_own_normal():
    w = summary_of(latent(("w", dist.Normal(of(0.0, 2, 3), 1.0).to_event(2))), torch.arange(6.0), of(0.5, 6))["w"]
    assert w.shape == (2, 3)
    loc = np.arange(6.0).reshape(2, 3)
    assert np.array_equal(w.mean, loc)
    assert np.array_equal(w.loc, loc)
    assert np.allclose(w.sd, 0.5, rtol=1e-15)
    assert np.allclose(w.quantiles, loc + 0.5 * NORMAL[:, None, None], rtol=1e-12)


@pytest.mark.parametrize(("loc", "scale"), [(0.3, 0.2), (-2.0, 1.5)])
def test_a_positive_site_is_log_normal(loc, scale):
    s = summary_of(latent(("s", dist.Gamma(of(2.0), 1.0))), [loc], [scale])["s"]
    exact = stats.lognorm(scale, scale=math.exp(loc))
    assert np.allclose([s.mean, s.sd], [exact.mean(), exact.std()], rtol=1e-12)
    assert np.allclose(s.quantiles, exact.ppf(LEVELS), rtol=1e-12)
    assert (s.loc, s.scale) == pytest.approx((loc, scale), rel=1e-15)


def expectation(g):
    return integrate.quad(lambda t: g(t) * stats.norm.pdf(t), -12, 12, limit=2000, epsabs=1e-14, points=(-1, 0, 1))[0]


@pytest.mark.parametrize(("loc", "scale"), [(0.0, 0.1), (1.0, 3.0), (-8.0, 3.0), (2.0, 10.0)])
def test_an_interval_by_quadrature_also_where_the_sigmoid_is_steep(loc, scale):
    p = summary_of(latent(("p", dist.Uniform(of(-1.0), 3.0))), [loc], [scale])["p"]

    def z(t):
        return -1.0 + 4.0 / (1.0 + math.exp(-(loc + scale * t)))

    mean = expectation(z)
    sd = math.sqrt(expectation(lambda t: (z(t) - mean) ** 2))
    assert np.allclose([p.mean, p.sd], [mean, sd], rtol=1e-6)
    assert np.allclose(p.quantiles, [z(t) for t in NORMAL], rtol=1e-12)
    assert float(p.loc) == loc


class Falling(dist.TorchDistribution):
    """A density on (-inf, 2], whose map from u falls."""

    arg_constraints: ClassVar = {}
    support = constraints.less_than(2.0)

    def expand(self, batch_shape, _instance=None):
        return self

    def log_prob(self, value):
        return value - 2.0


def test_quantiles_are_ordered_where_the_map_falls():
    z = summary_of(latent(("z", Falling(validate_args=False))), [0.5], [0.4])["z"]
    exact = stats.lognorm(0.4, scale=math.exp(0.5))
    assert np.allclose([z.mean, z.sd], [2 - exact.mean(), exact.std()], rtol=1e-12)
    assert np.allclose(z.quantiles, 2 - exact.ppf([0.95, 0.5, 0.05]), rtol=1e-12)


@pytest.mark.parametrize("map_", [transforms.SigmoidTransform(), transforms.SoftplusTransform()], ids=repr)
def test_moments_of_other_maps(map_):
    mean, sd = _moments(map_, of(0.7, 1), of(1.3, 1))

    def z(t):
        return float(map_(torch.tensor(0.7 + 1.3 * t, dtype=F64)))

    exact = expectation(z)
    assert math.isclose(float(mean), exact, rel_tol=1e-9)
    assert math.isclose(float(sd), math.sqrt(expectation(lambda t: (z(t) - exact) ** 2)), rel_tol=1e-9)


def test_a_simplex_comes_from_draws_and_is_followed_by_its_unconstrained_rows():
    model = latent(
        ("a", dist.Normal(of(0.0), 1.0)), ("p", dist.Dirichlet(of(1.0, 3))), ("b", dist.Normal(of(0.0), 1.0))
    )
    sites = summary_of(model, [5.0, 0.4, -0.3, 6.0], [0.1, 0.5, 0.8, 0.2])
    assert list(sites) == ["a", "p", "p@unconstrained", "b"]
    assert sites["p"].loc is None
    assert sites["p"].scale is None
    generator = torch.Generator().manual_seed(0)
    u = torch.tensor([0.4, -0.3], dtype=F64) + torch.tensor([0.5, 0.8], dtype=F64) * torch.randn(
        200_000, 2, dtype=F64, generator=generator
    )
    z = transforms.StickBreakingTransform()(u)
    error = 4 * (z.std(0) / math.sqrt(4000)).numpy()
    assert (abs(sites["p"].mean - z.mean(0).numpy()) < error).all()
    assert np.allclose(sites["p"].sd, z.std(0), rtol=0.1)
    exact = z.quantile(torch.tensor(LEVELS, dtype=F64), dim=0).numpy()
    assert (abs(sites["p"].quantiles - exact) < 3 * error).all()
    own = sites["p@unconstrained"]
    assert own.shape == (2,)
    assert np.allclose([own.loc, own.mean], [0.4, -0.3], rtol=1e-12)
    assert np.allclose(own.scale, [0.5, 0.8], rtol=1e-12)


@pytest.mark.parametrize(
    ("fn", "size"),
    [
        (dist.LKJCholesky(3, of(1.0)), 3),
        (dist.TransformedDistribution(dist.Normal(of(0.0, 4), 1.0).to_event(1), dist.transforms.OrderedTransform()), 4),
    ],
    ids=["cholesky", "ordered"],
)
def test_maps_that_mix_elements_come_from_draws(fn, size):
    sites = summary_of(latent(("z", fn)), of(0.2, size), of(0.3, size))
    assert sites["z"].loc is None
    assert sites["z"].shape == fn.event_shape
    assert sites["z@unconstrained"].shape == (size,)
    assert fn.support.check(torch.as_tensor(sites["z"].quantiles[1])) or sites["z"].mean.ndim == 2


def test_a_support_that_depends_on_a_latent_comes_from_the_whole_model(monkeypatch):
    """z = s sigmoid(u), s = exp(u'), independent: E z = E s E sigmoid."""
    monkeypatch.setattr(summary_module, "_DRAWS", 1000)
    model = latent(("s", dist.Gamma(of(2.0), 1.0)), ("z", lambda values: dist.Uniform(of(0.0), values["s"])))
    sites = summary_of(model, [0.5, 0.2], [0.6, 0.7])
    assert sites["s"].loc is not None
    assert list(sites) == ["s", "z", "z@unconstrained"]
    sigmoid, _ = _moments(transforms.SigmoidTransform(), of(0.2), of(0.7))
    assert abs(sites["z"].mean - sites["s"].mean * float(sigmoid)) < 4 * sites["z"].sd / math.sqrt(1000)


def test_a_support_that_hardly_moves_is_still_seen_to_move(monkeypatch):
    """Far out on the sigmoid the image is nearly 0 whatever the bound."""
    monkeypatch.setattr(summary_module, "_DRAWS", 200)
    model = latent(("s", dist.Gamma(of(2.0), 1.0)), ("z", lambda values: dist.Uniform(of(0.0), values["s"])))
    assert summary_of(model, [0.5, -60.0], [0.6, 0.7])["z"].loc is None


def test_pyros_guides_come_from_draws(monkeypatch):
    monkeypatch.setattr(summary_module, "_DRAWS", 600)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(of(0.0, 2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w[0] + x * w[1], 1.0), obs=y)

    inference, theta = build(model, X, lambda plated, _: PyroGuide(AutoMultivariateNormal(plated)), "monte_carlo")
    values = inference.parameters.unflatten(theta)
    (loc,) = [name for name in values if name.endswith("loc")]
    theta = inference.parameters.flatten({**values, loc: torch.tensor([3.0, -1.0], dtype=F64)})
    (w,) = summarize(inference, theta, batch_of(X))
    assert np.allclose(w.mean, [3.0, -1.0], atol=1e-6)  # antithetic draws: exact
    assert np.allclose(w.sd, 0.1, rtol=0.12)
    assert np.allclose(w.quantiles - w.mean, 0.1 * NORMAL[:, None], atol=0.03)
    assert w.loc is None
    assert summarize(inference, theta, batch_of(X))[0].sd.tolist() == w.sd.tolist()
    assert summarize(inference, theta, batch_of(X), seed=1)[0].sd.tolist() != w.sd.tolist()


def test_latents_of_rows_are_left_out(monkeypatch):
    monkeypatch.setattr(summary_module, "_DRAWS", 200)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(of(0.0), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(of(0.0), 1.0))
            pyro.sample("y", dist.Normal(w + z, 1.0), obs=y)

    def guide(batch):
        pyro.sample("w", dist.Normal(pyro.param("m", of(2.0)), 0.5))
        with pyro.plate("data", batch.size):
            pyro.sample("z", dist.Normal(of(0.0), 1.0))

    inference, theta = build(model, X, lambda *_: PyroGuide(guide), "monte_carlo")
    (w,) = summarize(inference, theta, batch_of(X))
    assert w.name == "w"
    assert math.isclose(w.mean, 2.0, rel_tol=1e-9)


def test_draws_of_a_large_model_keep_only_the_sites_that_need_them(monkeypatch):
    """A hundred thousand normals beside one simplex: nothing of the model is drawn more than a few times."""
    calls = []
    latents = summary_module._latents
    monkeypatch.setattr(summary_module, "_latents", lambda *given: calls.append(1) or latents(*given))
    model = latent(("u", dist.Normal(of(0.0, 100_000), 1.0).to_event(1)), ("p", dist.Dirichlet(of(1.0, 3))))
    sites = summary_of(model, torch.linspace(-1, 1, 100_002), of(0.1, 100_002))
    assert sites["u"].mean.shape == (100_000,)
    assert len(calls) == 4


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_file_is_row_major_and_its_floats_read_back_bit_by_bit(tmp_path):
    model = latent(
        ("w", dist.Normal(of(0.0, 2, 3), 1.0).to_event(2)),
        ("v", dist.Normal(of(0.0, 2), 1.0).to_event(1)),
        ("s", dist.Gamma(of(2.0), 1.0)),
        ("p", dist.Dirichlet(of(1.0, 3))),
    )
    loc = torch.randn(11, dtype=F64, generator=torch.Generator().manual_seed(0)) / 3
    inference, _ = build(model, X)
    sites = summarize(inference, at(loc, of(0.1, 11)), batch_of(X))
    for _ in range(2):  # the second run replaces the file of the first
        write_summary(tmp_path / "summary.csv", sites)
    rows = read(tmp_path / "summary.csv")
    assert list(rows[0]) == ["site", "index", "mean", "sd", "q05", "q50", "q95", "loc", "scale"]
    assert [(row["site"], row["index"]) for row in rows] == [
        *(("w", index) for index in ("0,0", "0,1", "0,2", "1,0", "1,1", "1,2")),
        *(("v", index) for index in ("0", "1")),
        ("s", ""),
        *(("p", index) for index in ("0", "1", "2")),
        *(("p@unconstrained", index) for index in ("0", "1")),
    ]
    at_rows = [row for row in rows if row["loc"]]
    assert [float(row["loc"]) for row in at_rows] == loc.tolist()
    for column, values in {
        "mean": [site.mean for site in sites],
        "sd": [site.sd for site in sites],
        "q05": [site.quantiles[0] for site in sites],
        "q95": [site.quantiles[2] for site in sites],
    }.items():
        assert [float(row[column]) for row in rows] == np.concatenate([v.ravel() for v in values]).tolist()
    assert all(not row["loc"] and not row["scale"] for row in rows if row["site"] == "p")
    assert [path.name for path in tmp_path.iterdir()] == ["summary.csv"]
