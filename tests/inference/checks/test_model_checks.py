"""What `set_up` refuses before the first step: each sentence names the site and the remedy."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from svi_problems import F64, batch_of, build, regression

from trainer.errors import UserError
from trainer.inference.checks.model_checks import finite_or_raise
from trainer.inference.guides.mean_field import MeanField
from trainer.inference.guides.pyro_guides import PyroGuide
from trainer.inference.model.plates import PlatedModel
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.setup import guide_factory, set_up

GENERATOR = torch.Generator().manual_seed(0)
X, Y = (torch.randn(12, dtype=F64, generator=GENERATOR) for _ in range(2))


def normal(x, name="y", mean=0.0, **options):
    return pyro.sample(name, dist.Normal(mean + torch.zeros_like(x), 1.0), **options)


def weight(x, name="w"):
    return pyro.sample(name, dist.Normal(x.new_zeros(()), 1.0))


def outside(x, y):
    weight(x)
    normal(x, obs=y)


def beside(x, y):
    w = weight(x)
    with pyro.plate("data", len(x)):
        normal(x, mean=w, obs=y)
    pyro.sample("total", dist.Normal(w, 1.0), obs=y.sum())


def unseen(x, y):
    w = weight(x)
    with pyro.plate("data", len(x)):
        pyro.deterministic("f", w * x)


def unlabeled(x, label=None):
    w = weight(x)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, 1.0), obs=label)


def local(x, y):
    w = weight(x)
    with pyro.plate("data", len(x)):
        z = normal(x, "z", w)
        normal(x, mean=z, obs=y)


def missing(x, y):
    w = weight(x)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, 1.0), obs=y, obs_mask=y > 0)


def discrete(x, y, where="outside"):
    w = weight(x)
    k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.3))) if where == "outside" else 0.0
    with pyro.plate("data", len(x)):
        if where == "inside":
            k = pyro.sample("k", dist.Categorical(x.new_ones(3)))
        normal(x, mean=w + k, obs=y)


def subsampled(x, y):
    with pyro.plate("groups", 50, subsample_size=5):
        w = weight(x)
    with pyro.plate("data", len(x)):
        normal(x, mean=w.sum(), obs=y)


def square(x, y):
    w = weight(x)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((w * x)[:, None], 1.0), obs=y)


def column(x, y):
    w = weight(x)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, 1.0), obs=y[:, None])


def several(x, y, axis=0):
    w = weight(x)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(torch.stack([w * x] * 2, axis), 1.0), obs=torch.stack([y] * 2, axis))


def captured(x, y):
    w = weight(x)
    with pyro.plate("data", len(x)):
        normal(x, mean=w, obs=Y)


def centered(x, y):
    w = weight(x)
    with pyro.plate("data", len(x)):
        normal(x, mean=w * (x - x.mean()), obs=y)


def walk(x, y):
    w = weight(x)
    with pyro.plate("data", len(x)):
        normal(x, mean=w * x.cumsum(0), obs=y)


def chain(x, y):
    w = weight(x)
    with pyro.plate("data", len(x)):
        normal(x, mean=w * torch.cat([y[:1], y[:-1]]), obs=y)


def nothing_latent(x, y):
    with pyro.plate("data", len(x)):
        normal(x, obs=y)


def logarithm(x, y):
    w = weight(x)
    with pyro.plate("data", len(x)):
        pyro.factor("penalty", (w * x).log())


def looked_up(x, y, how="[]"):
    w = weight(x)
    table, where = w + torch.zeros(3, 1, dtype=F64), x.abs() * 0
    with pyro.plate("data", len(x)):
        found = {
            "[]": lambda: table[where, 0],
            "embedding": lambda: torch.nn.functional.embedding(where, table)[:, 0],
            "one_hot": lambda: (torch.nn.functional.one_hot(where, 3) @ table)[:, 0],
        }[how]()
        pyro.sample("y", dist.Normal(found, 1.0), obs=y)


def root(x, y):
    w = weight(x)
    with pyro.plate("data", len(x)):
        normal(x, mean=w + x.sqrt(), obs=y)


def wordless(x, y):
    raise ValueError


def negative_scale(x, y):
    w = weight(x)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, w - 1.0), obs=y)


def infinite(x, y):
    weight(x)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x.new_zeros(()), 1.0, validate_args=False), obs=y / 0)


def counts(x, y):
    w = weight(x)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson(w.exp()), obs=y)


def selecting(x, y, mean="all", kind="rows"):
    w = weight(x)
    with pyro.plate("data", len(x)):
        chosen = x > 0
        observed = torch.stack([y, y], 1)[chosen] if kind == "pairs" else y[chosen]
        likelihood = dist.Normal(w if mean == "one" else x * w, 1.0)
        pyro.sample("y", likelihood.expand([2]).to_event(1) if kind == "pairs" else likelihood, obs=observed)


def drawing(x, y):
    w = weight(x)
    with pyro.plate("data", 100, subsample_size=5):
        pyro.sample("y", dist.Normal(w, 1.0), obs=y[:5])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (selecting, r'site "y" observes \d+ rows? of the 12 in plate "data": keep all rows.*poutine.mask'),
        (functools.partial(selecting, mean="one"), r'site "y" observes \d+ rows? of the 12 in plate "data"'),
        (functools.partial(selecting, mean="one", kind="pairs"), r'site "y" observes \d+ rows? of the 12 in plate'),
        (drawing, r'plate\("data", ..., subsample_size=5\) draws its own rows: write pyro.plate'),
        (outside, 'observed site "y" stands outside plate "data" and depends on the rows.*with pyro.plate'),
        (beside, 'observed site "total" stands outside plate "data".*global_sites=\\[total\\]'),
        (unseen, "the model observes nothing: pass a column as obs="),
        (unlabeled, "observes nothing: its argument label is not a column of the data .x, y.; .* columns.label=NAME"),
        (subsampled, 'latent site "w" stands in plate "groups", which takes 5 of its 50'),
        (square, r'site "y" has densities of shape \[12, 12\].*is \[12, 12\] and its value \[12\]; give both one.*\.$'),
        (column, r'site "y" has densities of shape \[12, 12\].*is \[12\] and its value \[12, 1\]; give both one.*\.$'),
        (several, r'site "y" has densities of shape \[2, 12\].*is \[2, 12\] and its value \[2, 12\].*to_event'),
        (functools.partial(several, axis=1), r"inside plate\('data'\) at site y.*12 vs 2.*to_event\(1\)"),
        (captured, 'site "y" has no density'),
        (centered, "not exchangeable over rows"),
        (walk, "not exchangeable over rows"),
        (chain, "not exchangeable over rows"),
        (nothing_latent, "no latent site"),
        (logarithm, 'on its first batch after site "data": Expected parameter log_factor'),
        (looked_up, r"indexes with a column that is not of whole numbers .*astype.int.*effect\[group.long"),
        (functools.partial(looked_up, how="embedding"), "indexes with a column that is not of whole numbers"),
        (functools.partial(looked_up, how="one_hot"), "indexes with a column that is not of whole numbers"),
        (root, 'log density of site "y" is nan at .* in row \\d+ .row_id. where training starts.*takes the log'),
        (wordless, "cannot be evaluated on its first batch: ValueError.$"),
        (
            negative_scale,
            "Expected parameter scale .*to satisfy .*GreaterThan.*: give what it is made of a prior or a transform",
        ),
        (infinite, 'log density of site "y" is -inf at -?inf in row 0 .row_id. where training starts'),
        (counts, 'site "y" observes .* in row 0 .row_id., outside the support of Poisson .whole numbers from 0.'),
    ],
    ids=lambda value: getattr(value, "__name__", "") or None,
)
def test_refused(model, words):
    with pytest.raises(UserError, match=words):
        build(model, x=X, y=Y)


@pytest.mark.parametrize("model", [local, missing, functools.partial(discrete, where="inside")])
def test_latents_of_rows_are_integrated_out(model):
    assert build(model, x=X, y=Y)[0].guide.sites[0].name == "w"


@pytest.mark.parametrize("autoguide", [AutoNormal, AutoDiagonalNormal])
def test_an_autoguide_has_no_parameter_of_a_row(autoguide):
    assert len(build(local, guide_factory(autoguide, ("x", "y")), x=X, y=Y)[1]) == 2
    with pytest.raises(UserError, match='latent site "z" stands inside plate "data"'):
        build(local, lambda model, _: PyroGuide(autoguide(model)), x=X, y=Y)


class NoRsample(dist.Normal):
    has_rsample = False


def guide_of(kind):
    def guide(x, y):
        w = pyro.param("m", torch.zeros((), dtype=F64))
        if kind != "forgets w":
            w = pyro.sample("w", dist.Normal(w, 0.1))
        if kind == "outside":
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 0.5).to_event(1))
            return
        with pyro.plate("data", len(x)):
            family = NoRsample if kind == "not reparameterized" else dist.Normal
            pyro.sample("z", family(y * 0.1 + w, 0.5))

    return guide


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("fine", None),
        ("forgets w", '"w" of the model is missing from the guide'),
        ("outside", 'site "z" stands inside plate "data" in only one of model and guide'),
        ("not reparameterized", 'site "z" \\(NoRsample\\) has no reparameterized gradient'),
    ],
)
def test_a_users_guide_must_hold_what_the_model_holds(kind, words):
    make = lambda _, batch: PyroGuide(PlatedModel(guide_of(kind), batch.columns))  # noqa: E731
    if words is None:
        assert build(local, make, x=X, y=Y)[0].kinds == ("kl_global", "kl_local", "likelihood")
    else:
        with pytest.raises(UserError, match=words):
            build(local, make, x=X, y=Y)


def test_a_guides_plate_of_another_size_is_refused():
    def guide(x, y):
        pyro.sample("w", dist.Normal(x.new_zeros(()), 0.1))
        with pyro.plate("data", 5 * len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 0.5))

    with pytest.raises(UserError, match="takes 60 rows where the batch has 12"):
        build(local, lambda _, batch: PyroGuide(PlatedModel(guide, batch.columns)), x=X, y=Y)


def test_what_is_named_as_global_may_stand_outside():
    inference, _ = set_up(beside_without_sum, MeanField, batch_of(x=X, y=Y), 100, ELBO(), global_sites=["total"])
    assert inference.sites == ("w", "total", "y")


def beside_without_sum(x, y):
    w = weight(x)
    pyro.sample("total", dist.Normal(w, 1.0), obs=x.new_ones(()))
    with pyro.plate("data", len(x)):
        normal(x, mean=w, obs=y)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("far", [0.0, 1e3])
def test_an_exchangeable_model_passes_in_either_precision_and_weak_centring_does_not(dtype, far):
    """A weak effect in a wide model: centring shows in the fifth digit of 256 rows' log-likelihood."""
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(400, 2, dtype=F64, generator=generator) + far).to(dtype)
    y = (torch.rand(400, dtype=F64, generator=generator) < 0.5).to(dtype)

    def logistic(x, y, centre):
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=(x - x.mean(0) if centre else x) @ w), obs=y)

    build(functools.partial(logistic, centre=False), x=x, y=y)
    with pytest.raises(UserError, match="not exchangeable"):
        build(functools.partial(logistic, centre=True), x=x, y=y)


@pytest.mark.parametrize("family", [dist.Gamma, dist.Beta], ids=["Gamma", "Beta"])
def test_a_guide_may_draw_rows_by_torchs_own_generator(family):
    """Its draws follow each other in the order of the rows, which is no dependence of one row on another."""

    def shares(x, y):
        with pyro.plate("data", len(x)):
            share = pyro.sample("share", dist.Beta(x.new_tensor(2.0), 3.0))
            normal(x, mean=share, obs=y)

    def guide(x, y):
        power = pyro.param("power", x.new_tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("share", dist.Beta((power * x).exp(), 2.0))

    def rates(x, y):
        with pyro.plate("data", len(x)):
            normal(x, mean=pyro.sample("share", dist.Gamma(x.new_tensor(2.0), 3.0)), obs=y)

    def of_rates(x, y):
        power = pyro.param("power", x.new_tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("share", dist.Gamma((power * x).exp(), 2.0))

    model, own = (rates, of_rates) if family is dist.Gamma else (shares, guide)
    build(model, guide_factory(own, ("x", "y")), x=X, y=Y)


def test_one_row_is_enough_to_start():
    build(centered, x=X[:1], y=Y[:1])


def test_batch_norm_in_a_network_is_refused():
    """It lets a row depend on the others. (Dropout is fine: test_noise_mode.py.)"""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(1, dtype=F64)

        def forward(self, x, y):
            w = weight(x)
            with pyro.plate("data", len(x)):
                normal(x, mean=w + self.norm(x[:, None])[:, 0], obs=y)

    with pytest.raises(UserError, match="not exchangeable"):
        build(Net(), x=X, y=Y)


def test_a_scaled_and_masked_model_passes():
    build(poutine.scale(poutine.mask(regression, mask=True), scale=0.5), x=X[:, None], y=Y)


def test_finite_or_raise_names_site_and_step():
    finite_or_raise({"w": 1.0, "y": torch.tensor([1.0])}, 7)
    with pytest.raises(FloatingPointError, match="not finite at step 7: y, theta"):
        finite_or_raise({"w": 1.0, "y": float("nan"), "theta": torch.tensor([1.0, float("inf")])}, 7)


def test_nothing_to_train_is_said():
    guide = lambda x, y: pyro.sample("w", dist.Normal(x.new_zeros(()), 0.1))  # noqa: E731
    with pytest.raises(UserError, match="neither guide nor model has a parameter"):
        build(centered, lambda _, batch: PyroGuide(PlatedModel(guide, batch.columns)), x=X, y=Y)
