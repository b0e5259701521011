"""Models with latents in their rows, by `fit`: the optimum of the marginal posterior, and predictions at new rows."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from trainer import Posterior, UserError, fit

QUICK = {"program": "eager"}
GENERATOR = np.random.default_rng(0)
N = 300
X = GENERATOR.normal(size=N)
COUNTS = GENERATOR.poisson(np.exp(0.5 + 0.3 * X + GENERATOR.normal(0.0, 0.7, N))).astype(float)


def counts(x, y=None):
    a = pyro.sample("a", dist.Normal(0.0, 5.0))
    b = pyro.sample("b", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, tau))
        pyro.sample("y", dist.Poisson((a + b * x + u).exp()), obs=y)


def mode_and_sds():
    """Of (a, b, log tau), by 60 nodes and Newton's method; the sds are those of a factorized Gaussian."""
    nodes, weights = (torch.tensor(each) for each in np.polynomial.hermite_e.hermegauss(60))
    x, y = torch.tensor(X), torch.tensor(COUNTS)

    def minus(at):
        rate = ((at[0] + at[1] * x)[:, None] + at[2].exp() * nodes).exp()
        rows = torch.logsumexp(dist.Poisson(rate).log_prob(y[:, None]) + (weights / weights.sum()).log(), 1)
        prior = dist.Normal(0.0, 5.0).log_prob(at[:2]).sum() + dist.HalfNormal(2.0).log_prob(at[2].exp()) + at[2]
        return -(rows.sum() + prior)

    at = torch.tensor([0.5, 0.3, -0.4], dtype=torch.float64)
    for _ in range(20):
        hessian = torch.autograd.functional.hessian(minus, at)
        at = at - torch.linalg.solve(hessian, torch.autograd.functional.jacobian(minus, at))
    return at.numpy(), hessian.diagonal().rsqrt().numpy()


@pytest.fixture(scope="module")
def fitted():
    return fit(counts, {"x": X, "y": COUNTS}, progress=False, held_out=0, max_steps=60, dtype="float64", options=QUICK)


def test_the_optimum_is_that_of_the_marginal_posterior(fitted):
    mode, sds = mode_and_sds()
    found = {site.name: site for site in fitted.summary()}
    for number, name in enumerate(("a", "b", "tau")):
        assert abs(float(found[name].loc) - mode[number]) < 0.15 * sds[number]
        assert float(found[name].scale) == pytest.approx(sds[number], rel=0.1)
    assert set(found) == {"a", "b", "tau"}


def test_new_rows_draw_theirs_from_the_prior(fitted):
    """E y = exp(a + b x + tau^2 / 2), with the spread of the posterior."""
    with pytest.warns(UserWarning, match="the data has no column y"):
        found = fitted.predict({"x": np.array([0.0, 1.0])}, num_draws=4000)["y"]
    drawn = fitted.sample(4000)
    for row, x in enumerate((0.0, 1.0)):
        want = np.exp(drawn["a"] + drawn["b"] * x + drawn["tau"] ** 2 / 2).mean()
        assert found.mean[row] == pytest.approx(want, rel=0.1)
        assert found.sd[row] > np.sqrt(want)  # a Poisson's own would be that


def test_a_saved_posterior_is_read_again(fitted, tmp_path):
    fitted.save(tmp_path / "a.pt")
    again = Posterior.load(tmp_path / "a.pt", counts)
    assert np.array_equal(again.sample(3)["tau"], fitted.sample(3)["tau"])


@pytest.mark.parametrize("guide", ["full_rank", AutoNormal])
def test_any_guide_of_the_others_says_how_rows_are_integrated(guide, tmp_path):
    data, options = {"x": X, "y": COUNTS}, {**QUICK, "guide.rows": "integrate", "guide.nodes": 3}
    fitted = fit(counts, data, guide, progress=False, max_steps=1, options=options)
    fitted.save(tmp_path / "a.pt")
    loaded = Posterior.load(tmp_path / "a.pt", counts, guide)
    assert loaded.inference.rows == fitted.inference.rows
    assert fitted.inference.rows.given() == ("rows", "nodes")
    assert loaded.inference.model.fineness == fitted.inference.model.fineness
    assert fitted.inference.model.fineness.points >= 3


def test_classes_of_rows_are_summed_out_and_said(capsys):
    y = np.concatenate([GENERATOR.normal(-2.0, 0.5, 200), GENERATOR.normal(1.0, 0.5, 400)])

    def mixture(y):
        share = pyro.sample("share", dist.Beta(1.0, 1.0))
        mean = pyro.sample("mean", dist.Normal(torch.tensor([-1.0, 1.0]), 2.0).to_event(1))
        with pyro.plate("data", len(y)):
            kind = pyro.sample("kind", dist.Bernoulli(share)).long()
            pyro.sample("y", dist.Normal(mean[kind], 0.5), obs=y)

    posterior = fit(mixture, {"y": y}, max_steps=60, options=QUICK)
    found = {site.name: site.mean for site in posterior.summary()}
    assert float(found["share"]) == pytest.approx(2 / 3, abs=0.03)
    np.testing.assert_allclose(found["mean"], [-2.0, 1.0], atol=0.15)
    assert "latents of rows: kind of each row summed out" in " ".join(capsys.readouterr().out.split())


def of_persons(x, y=None):
    a = pyro.sample("a", dist.Normal(0.0, 5.0))
    spread = pyro.sample("spread", dist.HalfNormal(2.0))
    with pyro.plate("data", len(x), dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, spread))
        with pyro.plate("entries", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(a + x + u, 1.0), obs=y)


def exact_persons(person, z):
    """The log joint's mode (a, log spread) and the sds of a factorized Gaussian, each person's answers a normal."""

    def minus(at):
        a, spread = at[0], at[1].exp()
        found = -dist.Normal(0.0, 5.0).log_prob(a) - dist.HalfNormal(2.0).log_prob(spread) - at[1]
        for who in range(person.max() + 1):
            own = torch.tensor(z[person == who])
            covariance = torch.eye(len(own), dtype=torch.float64) + spread**2
            found = found - dist.MultivariateNormal(a.expand(len(own)), covariance).log_prob(own)
        return found

    at = torch.tensor([0.5, 0.0], dtype=torch.float64)
    for _ in range(10):
        hessian = torch.autograd.functional.hessian(minus, at)
        at = at - torch.linalg.solve(hessian, torch.autograd.functional.jacobian(minus, at))
    return at.numpy(), hessian.diagonal().rsqrt().numpy()


def test_persons_are_rows_of_the_entries_that_they_have():
    """A long table by `group_by`, and the same in memory as columns [persons, entries] with `length`."""
    generator, persons = np.random.default_rng(1), 40
    counts_of = generator.integers(1, 5, persons)
    person = np.repeat(np.arange(persons), counts_of)
    x = generator.normal(size=len(person))
    y = 0.5 + x + generator.normal(size=persons)[person] + generator.normal(size=len(person))
    common = {"progress": False, "dtype": "float64", "options": QUICK}
    long = fit(of_persons, {"person": person, "x": x, "y": y}, group_by="person", max_steps=30, **common)
    real = np.arange(4) < counts_of[:, None]
    wide = {"x": np.zeros((persons, 4)), "y": np.full((persons, 4), 99.0), "length": counts_of}
    wide["x"][real], wide["y"][real] = x, y
    mode, sds = exact_persons(person, y - x)
    for site, at, sd in zip(long.summary(), mode, sds):
        assert abs(float(site.loc) - at) < 0.15 * sd
        assert float(site.scale) == pytest.approx(sd, rel=0.1)
    found = fit(of_persons, wide, max_steps=1, **common).predict(wide, 50)["y"]
    assert np.array_equal(np.isfinite(found.mean), real)
    with pytest.raises(UserError, match="packed with group_by=: pack the new rows so too"):
        long.predict({"x": x, "y": y})
