"""Predictions of every kind of distribution: no nan without a word, class probabilities, bounded memory."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoHierarchicalNormalMessenger, AutoNormalMessenger, AutoRegressiveMessenger

from trainer.data.shards.index import Column, Index
from trainer.errors import UserError
from trainer.inference.guides.mean_field import MeanField
from trainer.inference.model.plates import Batch
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.setup import guide_factory, set_up
from trainer.posterior import predictive
from trainer.posterior.draws import counted_draws
from trainer.posterior.posterior import Posterior
from trainer.posterior.predictive import levels_of

F64 = torch.float64
N = 12
X = torch.linspace(-1, 1, N, dtype=F64)
PROBS = torch.tensor([0.5, 0.3, 0.2], dtype=F64)


def posterior_of(family, y, columns=(), **more):
    """Of a model whose one latent ``a`` has a sd of next to nothing around 0: predictions are those at a = 0."""

    def model(x, y=None, **rest):
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", family(a.expand(len(x)), x, **rest), obs=y)

    rows = Batch.whole({"x": X, "y": y, **more}, torch.arange(N))
    inference, theta = set_up(model, MeanField, rows, N, ELBO())
    theta = inference.parameters.flatten(
        {"guide.loc": theta.new_zeros(1), "guide.log_scale": theta.new_full((1,), -30.0)}
    )
    known = {
        "x": Column("x", "float64"),
        "y": Column("y", str(y.dtype)[6:], tuple(y.shape[1:])),
        "row_id": Column("row_id", "int64"),
    }
    known |= {each.name: each for each in columns}
    return Posterior(inference, theta, rows, Index(tuple(known.values()), (), 0, "train"))


def predict(posterior, rows=N, draws=40, **more):
    return posterior.predict({"x": X[:rows].numpy()}, draws, **more)["y"]


CODES = torch.arange(N) % 3
CLASSES = [
    (lambda a, x: dist.Categorical(PROBS).expand([len(x)]), CODES),
    (lambda a, x: dist.Categorical(logits=PROBS.log() + a[:, None]), CODES),
    (lambda a, x: dist.OneHotCategorical(PROBS.expand(len(x), 3)), torch.eye(3, dtype=F64)[CODES]),
    (lambda a, x: dist.Multinomial(4, PROBS.expand(len(x), 3)), 4 * torch.eye(3, dtype=F64)[CODES]),
    (lambda a, x: dist.OrderedLogistic(a, torch.logit(torch.tensor([0.5, 0.8], dtype=F64))), CODES),
]  # fmt: skip


@pytest.mark.parametrize(("family", "y"), CLASSES)
def test_classes_have_probabilities(family, y):
    found = predict(posterior_of(family, y))
    np.testing.assert_allclose(found.probabilities, np.tile(PROBS, (N, 1)), atol=1e-9)
    assert found.most_likely.tolist() == [0] * N
    assert found.words is None
    if y.dim() == 1:  # the codes 0, 1, 2
        np.testing.assert_allclose(found.mean, 0.3 + 2 * 0.2)
        np.testing.assert_allclose(found.sd, (0.3 + 4 * 0.2 - 0.7**2) ** 0.5)


def test_classes_have_the_words_of_their_column():
    family, y = CLASSES[0]
    words = Column("y", "int64", vocabulary=["setosa", "versicolor", "virginica"])
    found = predict(posterior_of(family, y, [words]))
    assert found.words == ("setosa", "versicolor", "virginica")
    assert found.most_likely.tolist() == ["setosa"] * N
    too_few = Column("y", "int64", vocabulary=["setosa", "versicolor"])
    assert predict(posterior_of(family, y, [too_few])).words is None


def of_two(a, x):
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(len(a), 2)), dist.Categorical(torch.ones(len(a), 2, 3)))


ONES, COUNTS = torch.ones(N, dtype=F64), CODES.to(F64)
OTHERS = [
    (lambda a, x: dist.Bernoulli(logits=a + x), (CODES > 1).to(F64)),
    (lambda a, x: dist.Binomial(7, logits=a), COUNTS),
    (lambda a, x: dist.BetaBinomial(2 * ONES[0], ONES[0], 7).expand([len(x)]), COUNTS),
    (lambda a, x: dist.NegativeBinomial(3.0, logits=a), COUNTS),
    (lambda a, x: dist.ZeroInflatedPoisson(a.exp(), gate=0.3 * torch.ones_like(a)), COUNTS),
    (lambda a, x: dist.Geometric(logits=a), COUNTS),
    (lambda a, x: dist.StudentT(5.0, a, 1.0), X),
    (lambda a, x: dist.VonMises(a, 2.0), X),
    (lambda a, x: dist.Dirichlet(torch.ones(len(a), 3, dtype=F64)), torch.full((N, 3), 1 / 3, dtype=F64)),
    (of_two, CODES),
    (lambda a, x: dist.Normal(a[:, None], torch.ones(2, dtype=F64)).to_event(1), torch.stack([X, X], 1)),
    (lambda a, x: dist.TransformedDistribution(dist.Normal(a, 1.0), dist.transforms.SigmoidTransform()), 0.5 * ONES),
    (lambda a, x: dist.LogNormal(a, 1.0).mask(x > 0), ONES),
]  # fmt: skip


@pytest.mark.parametrize(("family", "y"), OTHERS)
def test_other_families_have_finite_moments(family, y):
    found = predict(posterior_of(family, y))
    assert found.probabilities is None
    assert found.most_likely is None
    assert found.mean.shape == found.sd.shape == tuple(y.shape)
    assert np.isfinite(found.mean).all()
    assert (found.sd > 0).all()
    assert np.isfinite(found.quantiles).all()


@pytest.mark.parametrize("family", [lambda a, x: dist.Cauchy(a, 1.0), lambda a, x: dist.StudentT(1.0, a, 1.0)])
def test_what_has_no_mean_says_so(family):
    with pytest.warns(UserWarning, match='site "y" has no mean') as seen:
        found = predict(posterior_of(family, X))
    assert len(seen) == 1
    assert np.isnan(found.mean).all()
    assert np.isfinite(found.quantiles).all()


def test_an_infinite_mean_is_infinite():
    found = predict(posterior_of(lambda a, x: dist.HalfCauchy(a.exp()), ONES))
    assert np.isposinf(found.mean).all()
    assert np.isposinf(found.sd).all()


def wide(a, x):
    return dist.Normal((a + x)[:, None], torch.ones(50, dtype=F64)).to_event(1)


def test_few_numbers_are_held_at_a_time(monkeypatch):
    """A hundred draws of fifty numbers, five rows at a time; moments do not depend on how many."""
    posterior, sizes = posterior_of(wide, X[:, None].expand(N, 50)), []
    whole = predict(posterior, draws=100)
    made = predictive.predicted
    monkeypatch.setattr(predictive, "MOST_NUMBERS", 5 * 100 * 50)
    monkeypatch.setattr(
        "trainer.posterior.posterior.predicted", lambda *more: (sizes.append(more[2].size), made(*more))[1]
    )
    found = predict(posterior, draws=100)
    assert sizes == [5, 5, 2]
    np.testing.assert_array_equal(found.mean, whole.mean)
    np.testing.assert_array_equal(found.sd, whole.sd)
    np.testing.assert_allclose(found.mean, X.numpy()[:, None].repeat(50, 1))
    assert found.quantiles.shape == (3, N, 50)
    # 600 medians of 100 draws: each has a standard error of 1.2533 / 10
    error = found.quantiles[1] - found.mean
    assert abs(error.mean()) < 4 * 0.12533 / 600**0.5
    assert abs(error.std() / 0.12533 - 1) < 4 / 1200**0.5


def test_quantiles_are_those_of_all_draws(monkeypatch):
    site = {"value": torch.zeros(N, dtype=F64), "fn": dist.Normal(torch.zeros(N, dtype=F64), 1.0)}
    site |= {"cond_indep_stack": ()}
    gathered = predictive._Gathered(site, 7, "data")
    drawn = torch.randn(7, N, dtype=F64, generator=torch.Generator().manual_seed(0))
    for number, value in enumerate(drawn):
        gathered.add(number, {"value": value, "fn": dist.Normal(value, 2.0)})
    monkeypatch.setattr(predictive, "_SORTED", 21)  # three columns at a time
    found = gathered.prediction([0.1, 0.5])
    np.testing.assert_allclose(found.quantiles, np.quantile(drawn.numpy(), [0.1, 0.5], axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.mean, drawn.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.sd, (4 + drawn.var(0, correction=0)).sqrt(), rtol=1e-12)


@pytest.mark.parametrize("wrong", [3, -1, 99])
def test_an_index_out_of_range_is_named(wrong):
    def family(a, x, level):
        return dist.Normal(torch.arange(3, dtype=F64)[level] + a, 1.0)

    posterior = posterior_of(family, X, [Column("level", "int64")], level=CODES)
    level = CODES.numpy().copy()
    level[7] = wrong
    with pytest.raises(UserError, match=f'column "level" is {wrong} in row 7 .*table of 3'):
        posterior.predict({"x": X.numpy(), "level": level})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.predict({"x": X.numpy(), "level": CODES.numpy()}, 2)


@pytest.mark.parametrize("quantiles", [[5, 95], [-0.1], [float("nan")], 5])
def test_quantiles_beyond_0_to_1_are_refused(quantiles):
    with pytest.raises(UserError, match="give numbers from 0 to 1"):
        levels_of(quantiles)


def test_one_quantile_is_a_list_of_one():
    assert levels_of(0.5) == [0.5]
    assert levels_of(np.array([0.0, 1.0])) == [0.0, 1.0]


@pytest.mark.parametrize("number", [0, -3, 2.5, "ten"])
def test_a_number_of_draws_is_a_whole_one(number):
    assert counted_draws(np.int64(3)) == 3
    with pytest.raises(UserError, match=f"num_draws={number}: give a whole number from 1 up"):
        counted_draws(number)


def line(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros((), dtype=F64), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, 0.1), obs=y)


@pytest.mark.parametrize("kind", [AutoNormalMessenger, AutoHierarchicalNormalMessenger, AutoRegressiveMessenger])
@pytest.mark.parametrize("nested", [False, True])
def test_a_guide_that_runs_the_model_predicts_what_it_does_not_see(kind, nested):
    auto = kind(line)
    rows = Batch.whole({"x": X, "y": 2 * X}, torch.arange(N))
    guide = guide_factory((lambda x, y=None: auto(x, y)) if nested else kind, rows.columns)
    inference, theta = set_up(line, guide, rows, N, ELBO())
    columns = {name: Column(name, "int64" if name == "row_id" else "float64") for name in ("x", "y", "row_id")}
    posterior = Posterior(inference, theta, rows, Index(tuple(columns.values()), (), 0, "train"))
    seen, unseen = ({"x": X.numpy(), **more} for more in ({"y": 2 * X.numpy()}, {}))
    np.testing.assert_array_equal(posterior.predict(unseen, 5)["y"].mean, posterior.predict(seen, 5)["y"].mean)
