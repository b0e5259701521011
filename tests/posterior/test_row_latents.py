"""`Posterior.latents`, and predictions given what is observed: closed forms at globals that are all but known."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from trainer.data.shards.index import Column, Index
from trainer.errors import UserError
from trainer.inference.guides.mean_field import MeanField
from trainer.inference.guides.pyro_guides import PyroGuide
from trainer.inference.model.plates import Batch, PlatedModel
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.setup import set_up
from trainer.posterior import latents as module
from trainer.posterior.posterior import Posterior

F64 = torch.float64
N = 25
GENERATOR = torch.Generator().manual_seed(5)
X = torch.randn(N, dtype=F64, generator=GENERATOR)
Y = 2 * torch.randn(N, dtype=F64, generator=GENERATOR)
TAU, NOISE = 1.5, 0.5
TABLE = {"x": X.numpy(), "y": Y.numpy()}
NORMAL = torch.distributions.Normal


def posterior_of(model, at, guide=MeanField, **columns):
    """Of a model whose globals have next to no spread around ``at``, unconstrained."""
    columns = columns or {"x": X, "y": Y}
    rows = Batch.whole(columns, torch.arange(len(next(iter(columns.values())))))
    inference, theta = set_up(model, guide, rows, rows.size, ELBO())
    if "guide.loc" in inference.parameters.shapes:
        values = inference.parameters.unflatten(theta)
        values |= {"guide.loc": torch.tensor(at, dtype=F64), "guide.log_scale": theta.new_full((len(at),), -40.0)}
        theta = inference.parameters.flatten(values)
    known = [Column(name, str(each.dtype)[6:], tuple(each.shape[1:])) for name, each in columns.items()]
    return Posterior(inference, theta, rows, Index((*known, Column("row_id", "int64")), (), 0, "train"))


def effects(x, y=None):
    b = pyro.sample("b", dist.Normal(torch.zeros((), dtype=F64), 1.0))
    tau = pyro.sample("tau", dist.LogNormal(torch.zeros((), dtype=F64), 1.0))
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0 * x, tau))
        pyro.sample("y", dist.Normal(b * x + u, NOISE), obs=y)


SHARE = TAU**2 / (TAU**2 + NOISE**2)
MEAN = SHARE * (Y - 0.7 * X)
SD = math.sqrt(SHARE) * NOISE


@pytest.fixture(scope="module")
def fitted():
    return posterior_of(effects, [0.7, math.log(TAU)])


def test_latents_of_gaussian_rows_are_exact(fitted):
    found = fitted.latents(TABLE)
    assert list(found) == ["u"]
    np.testing.assert_allclose(found["u"].mean, MEAN, atol=1e-8)
    np.testing.assert_allclose(found["u"].sd, SD, atol=1e-8)
    want = NORMAL(MEAN, SD).icdf(torch.tensor([[0.05], [0.5], [0.95]], dtype=F64))
    np.testing.assert_allclose(found["u"].quantiles, want, atol=1e-6)
    assert found.row_id.tolist() == list(range(N))


def test_the_rows_latents_do_not_depend_on_how_rows_are_cut(fitted, monkeypatch):
    whole = fitted.latents(TABLE)
    for rows in (1, 7):
        monkeypatch.setattr(module.RowLatents, "together", lambda self, batch, rows=rows: rows)
        cut = fitted.latents(TABLE)
        assert np.array_equal(cut.row_id, whole.row_id)
        for one, two in zip(cut["u"][:3], whole["u"][:3]):
            np.testing.assert_allclose(one, two, rtol=0, atol=1e-10)


def test_the_size_of_a_part_follows_from_what_a_row_takes(fitted, monkeypatch):
    find = module.RowLatents(fitted.inference, fitted.theta, fitted.rows, module.Asked(8))
    assert find.together(fitted.rows) == N
    monkeypatch.setattr(module, "_BYTES", 2**20)
    assert 1 < find.together(fitted.rows) < N
    monkeypatch.setattr(module, "_BYTES", 1)
    assert find.together(fitted.rows) == 1


def test_twice_is_the_same_and_the_table_has_a_column_of_each(fitted):
    one, two = fitted.latents(TABLE, quantiles=[0.1]).table(), fitted.latents(TABLE, quantiles=[0.1]).table()
    assert list(one) == ["row_id", "u_mean", "u_sd", "u_q10"]
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_new_rows_have_their_own(fitted):
    found = fitted.latents({"x": np.array([0.0, 1.0]), "y": np.array([4.0, 0.7])})
    np.testing.assert_allclose(found["u"].mean, [SHARE * 4, 0.0], atol=1e-8)
    assert found.row_id.tolist() == [0, 1]


def test_a_spread_of_the_globals_is_in_the_latents(fitted):
    """u given b is Normal(SHARE (y - b x), SD), so a spread of b by 0.2 adds SHARE |x| 0.2 to the sd."""
    values = fitted.inference.parameters.unflatten(fitted.theta)
    values |= {"guide.log_scale": torch.tensor([math.log(0.2), -40.0], dtype=F64)}
    theta = fitted.inference.parameters.flatten(values)
    found = Posterior(fitted.inference, theta, fitted.rows, fitted.index).latents(TABLE, draws=400)["u"]
    np.testing.assert_allclose(found.mean, MEAN, atol=1e-8)  # pairs of draws lie opposite each other
    want = (SD**2 + (SHARE * X * 0.2) ** 2).sqrt()
    np.testing.assert_allclose(found.sd, want, rtol=0.05)


def test_a_weight_counts_rows_and_does_not_sharpen_one():
    weighted = posterior_of(effects, [0.7, math.log(TAU)], x=X, y=Y, weight=torch.full((N,), 3.0, dtype=F64))
    np.testing.assert_allclose(weighted.latents(TABLE)["u"].sd, SD, atol=1e-8)


def mixture(y=None):
    means = pyro.sample("means", dist.Normal(torch.zeros(2, dtype=F64), 3.0).to_event(1))
    with pyro.plate("data", N if y is None else len(y)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7], dtype=F64)))
        pyro.sample("y", dist.Normal(means[k], 1.0), obs=y)


def test_classes_have_probabilities_and_the_most_likely_one():
    found = posterior_of(mixture, [-1.0, 2.0], y=Y).latents({"y": TABLE["y"]})
    joint = (
        torch.tensor([0.3, 0.7], dtype=F64)
        * NORMAL(torch.tensor([-1.0, 2.0], dtype=F64), 1.0).log_prob(Y[:, None]).exp()
    )
    want = joint / joint.sum(1, keepdim=True)
    np.testing.assert_allclose(found["k"].probabilities, want, atol=1e-10)
    assert found["k"].most_likely.tolist() == want.argmax(1).tolist()
    np.testing.assert_allclose(found["k"].mean, want[:, 1], atol=1e-10)
    assert list(found.table()) == ["row_id", "k_class", "k_p0", "k_p1"]


def counted(y, per=3):
    share = pyro.sample("share", dist.Beta(torch.ones((), dtype=F64), 1.0))
    with pyro.plate("data", len(y)):
        hits = pyro.sample("hits", dist.Binomial(per, share))
        pyro.sample("y", dist.Normal(2 * hits, 1.0), obs=y)


def test_counts_have_moments_too():
    found = posterior_of(counted, [0.0], y=Y).latents({"y": TABLE["y"]})["hits"]
    states = torch.arange(4, dtype=F64)
    joint = torch.tensor([1, 3, 3, 1.0], dtype=F64) * NORMAL(2 * states, 1.0).log_prob(Y[:, None]).exp()
    shares = joint / joint.sum(1, keepdim=True)
    mean = shares @ states
    np.testing.assert_allclose(found.mean, mean, atol=1e-9)
    np.testing.assert_allclose(found.sd, (shares @ states**2 - mean**2).sqrt(), atol=1e-7)
    np.testing.assert_array_equal(found.quantiles[1], (shares.cumsum(1) < 0.5).sum(1))


def beside(y):
    b = pyro.sample("b", dist.Normal(torch.zeros((), dtype=F64), 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(b.expand(len(y)), 1.0))
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))
        pyro.sample("y", dist.Normal(z + 3 * k, 1.0), obs=y)


def guide_of_beside(y):
    pyro.sample("b", dist.Delta(pyro.param("b_at", torch.tensor(0.1, dtype=F64))))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(0.5 * y, 0.7))


def test_a_guide_of_the_users_gives_the_latents_that_it_holds():
    """z by draws of the guide, the class beside it summed at each of them."""
    fitted = posterior_of(beside, [], lambda plated, _: PyroGuide(PlatedModel(guide_of_beside, ("y",))), y=Y)
    found = fitted.latents({"y": TABLE["y"]}, draws=1000)
    assert list(found) == ["z", "k"]
    np.testing.assert_allclose(found["z"].mean, Y / 2, atol=1e-9)  # draws come in pairs
    np.testing.assert_allclose(found["z"].sd, 0.7, rtol=0.1)
    np.testing.assert_allclose(found["z"].quantiles[2], Y / 2 + 1.645 * 0.7, atol=0.15)
    x, w = (torch.tensor(each) for each in np.polynomial.hermite_e.hermegauss(60))
    z = Y[:, None] / 2 + 0.7 * x
    odds = math.log(0.3 / 0.7) + NORMAL(z + 3, 1.0).log_prob(Y[:, None]) - NORMAL(z, 1.0).log_prob(Y[:, None])
    np.testing.assert_allclose(found["k"].probabilities[:, 1], (w * odds.sigmoid()).sum(1) / w.sum(), atol=0.03)


def test_latents_of_a_guide_alone():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y), 2, dtype=F64), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)

    def guide(y):
        slope = pyro.param("slope", torch.tensor(0.3, dtype=F64))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(slope * y[:, None].expand(-1, 2), 0.5).to_event(1))

    found = posterior_of(model, [], lambda plated, _: PyroGuide(PlatedModel(guide, ("y",))), y=Y).latents(
        {"y": TABLE["y"]}
    )
    np.testing.assert_allclose(found["z"].mean, np.stack([0.3 * Y, 0.3 * Y], 1), atol=1e-9)
    assert found["z"].quantiles.shape == (3, N, 2)


def test_targets_that_are_given_are_predicted_given_the_row(fitted):
    """y again: normal around b x + E u with the variances of u and of y; from the prior where y is not given."""
    given = fitted.predict(TABLE, 600)["y"]
    np.testing.assert_allclose(given.mean, 0.7 * X + MEAN, atol=5 * SD / math.sqrt(600))
    np.testing.assert_allclose(given.sd, math.sqrt(SD**2 + NOISE**2), rtol=0.1)
    prior = fitted.predict(TABLE, 600, latents="prior")["y"]
    np.testing.assert_allclose(prior.mean, 0.7 * X, atol=5 * TAU / math.sqrt(600))
    with pytest.warns(UserWarning, match="no column y"):
        new = fitted.predict({"x": TABLE["x"]}, 600)["y"]
    np.testing.assert_allclose(new.sd, math.sqrt(TAU**2 + NOISE**2), rtol=0.1)


def test_classes_are_drawn_given_the_row_for_predictions():
    fitted = posterior_of(mixture, [-20.0, 20.0], y=torch.where(torch.arange(N) % 2 == 0, -20.0, 20.0).to(F64))
    y = np.where(np.arange(N) % 2 == 0, -20.0, 20.0)
    found = fitted.predict({"y": y}, 50)["y"]
    np.testing.assert_allclose(found.mean, y, atol=1e-9)


def test_predictions_of_more_numbers_given_the_row():
    loadings = torch.tensor([[1.0, 0.5, -1.0], [0.3, 1.0, 1.0]], dtype=F64)
    y = torch.randn(N, 3, dtype=F64, generator=GENERATOR)

    def model(y):
        tau = pyro.sample("tau", dist.LogNormal(torch.zeros((), dtype=F64), 1.0))
        with pyro.plate("data", len(y)):
            u = pyro.sample("u", dist.Normal(torch.zeros(len(y), 2, dtype=F64), tau).to_event(1))
            pyro.sample("y", dist.Normal(u @ loadings, 0.5).to_event(1), obs=y)

    fitted = posterior_of(model, [0.0], y=y)
    covariance = torch.linalg.inv(torch.eye(2, dtype=F64) + loadings @ loadings.T / 0.25)
    mean = y @ loadings.T @ covariance / 0.25
    found = fitted.latents({"y": y.numpy()})["u"]
    np.testing.assert_allclose(found.mean, mean, atol=1e-8)
    np.testing.assert_allclose(found.sd, covariance.diagonal().sqrt().expand(N, 2), atol=1e-8)
    again = fitted.predict({"y": y.numpy()}, 400)["y"]
    np.testing.assert_allclose(again.mean, mean @ loadings, atol=5 * 0.5 / math.sqrt(400))


def nested(y, kinds=None):
    b = pyro.sample("b", dist.Normal(torch.zeros((), dtype=F64), 1.0))
    with pyro.plate("data", len(y)):
        a = pyro.sample("a", dist.Normal(b.expand(len(y)), TAU))
        with pyro.plate("entries", y.shape[1]):
            pyro.sample("y", dist.Normal(a.expand(y.shape[1], -1), NOISE), obs=y.T)
            logits = torch.stack([torch.zeros_like(y.T), a.expand(y.shape[1], -1)], -1)
            pyro.sample("kinds", dist.Categorical(logits=logits), obs=None if kinds is None else kinds.T)


def test_predictions_have_the_rows_first_where_plates_are_nested():
    y = torch.arange(N, dtype=F64)[:, None].expand(-1, 3).clone()
    kinds = torch.ones(N, 3, dtype=torch.int64)
    fitted = posterior_of(nested, [0.0], y=y, kinds=kinds)
    found = fitted.predict({"y": y.numpy(), "kinds": kinds.numpy()}, 100)
    assert found["y"].quantiles.shape == (3, N, 3)
    np.testing.assert_allclose(found["y"].mean, y * TAU**2 / (TAU**2 + NOISE**2 / 3), atol=0.5)
    assert found["kinds"].probabilities.shape == (N, 3, 2)
    assert found["kinds"].probabilities[-1, :, 1].min() > 0.99


LENGTH = torch.arange(N) % 4


def of_entries(y, length, kinds=None):
    b = pyro.sample("b", dist.Normal(torch.zeros((), dtype=F64), 1.0))
    with pyro.plate("data", len(y), dim=-2):
        a = pyro.sample("a", dist.Normal(b, TAU))
        with pyro.plate("entries", y.shape[1], dim=-1):
            group = pyro.sample("group", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))
            pyro.sample("y", dist.Normal(a + group, NOISE), obs=y)
            logits = torch.stack([torch.zeros_like(a), a], -1)
            pyro.sample("kinds", dist.Categorical(logits=logits), obs=kinds)


def test_places_that_fill_rows_up_stay_blank():
    y = torch.arange(N, dtype=F64)[:, None].expand(-1, 3).clone()
    columns = {"y": y, "length": LENGTH, "kinds": torch.ones(N, 3, dtype=torch.int64)}
    fitted, real = posterior_of(of_entries, [0.0], **columns), np.arange(3) < LENGTH.numpy()[:, None]
    table = {name: column.numpy() for name, column in columns.items()}
    found = fitted.predict({name: table[name] for name in ("y", "length")} | {"kinds": table["kinds"]}, 20)
    for each in (found["y"].mean, found["y"].sd, *found["y"].quantiles, found["kinds"].probabilities[..., 1]):
        assert np.array_equal(np.isfinite(each), real)
    assert np.array_equal(found["y"].entries, real)
    classes = module.table_columns("kinds", found["kinds"], (0.5,))["kinds_class"]
    assert (classes[real] >= 0).all()
    assert all(each is None for each in classes[~real])
    latents = fitted.latents(table, draws=2)
    assert latents["a"].mean.shape == (N,)
    assert np.array_equal(np.isfinite(latents["group"].probabilities[..., 0]), real)


def plain(x, y=None):
    b = pyro.sample("b", dist.Normal(torch.zeros((), dtype=F64), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


def test_what_cannot_be_is_one_sentence(fitted):
    with pytest.raises(UserError, match='the model has no latents of rows: all of them stand outside plate "data"'):
        posterior_of(plain, [0.0]).latents(TABLE)
    with pytest.warns(UserWarning, match="no column y"), pytest.raises(UserError, match="no column y, and what is obs"):
        fitted.latents({"x": TABLE["x"]})
    with pytest.raises(UserError, match="num_draws=0: give a whole number"):
        fitted.latents(TABLE, draws=0)
    with pytest.raises(UserError, match="latents=guess is unknown: give auto, posterior, prior"):
        fitted.predict(TABLE, latents="guess")
    with pytest.warns(UserWarning, match="no column y"), pytest.raises(UserError, match="no column y, and what is obs"):
        fitted.predict({"x": TABLE["x"]}, latents="posterior")
