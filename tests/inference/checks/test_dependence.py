"""What stands outside the data plate: it counts once where the latents alone decide its value, and is refused where the
rows do."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import AutoReparam, HaarReparam, LocScaleReparam, TransformReparam
from svi_problems import F64, build, noise_of, one_group
from torch.distributions import transforms

from trainer.errors import UserError

GENERATOR = torch.Generator().manual_seed(0)
X, Y = (torch.randn(12, dtype=F64, generator=GENERATOR) for _ in range(2))
FLAG = torch.tensor([0.0, 1.0], dtype=F64).repeat(6)
GROUP = torch.arange(12) % 3
COLUMNS = {"x": X, "y": Y, "flag": FLAG, "group": GROUP}
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def likelihood(mean, y):
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def with_term(term):
    """A model with `term(w, level, columns)` outside the data plate."""

    def model(x, y, flag, group):
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("groups", 3):
            level = pyro.sample("level", dist.Normal(w, 1.0))
        term(w, level, {"x": x, "y": y, "flag": flag, "group": group})
        likelihood(w * x + level[group], y)

    return model


def factor(of):
    return lambda w, level, c: pyro.factor("term", of(w, level, c))


def in_groups(w, level, c):
    with pyro.plate("known", 3):
        pyro.sample("term", dist.Normal(level, 2.0), obs=torch.tensor([1.0, 2.0, 3.0], dtype=F64))


def by_param(w, level, c):
    pyro.factor("term", -((w - pyro.param("centre", torch.tensor(0.5, dtype=F64))) ** 2))


ONCE = {
    "a penalty": factor(lambda w, level, c: -0.5 * (level.sum() / 3.0) ** 2),
    "of a tensor made like a column": factor(lambda w, level, c: -((w - c["x"].new_ones(())) ** 2)),
    "a known total": lambda w, level, c: pyro.sample("term", dist.Normal(w, 1.0), obs=torch.tensor(0.3, dtype=F64)),
    "known values of groups": in_groups,
    "a value as an integer": lambda w, level, c: pyro.sample("term", dist.Bernoulli(logits=w), obs=torch.tensor(1)),
    "a parameter": by_param,
    "scaled by its author": lambda w, level, c: poutine.scale(pyro.factor, 3.0)("term", -(w**2)),
    "masked, whatever it holds": lambda w, level, c: poutine.mask(pyro.factor, torch.tensor(True))("term", -(w**2)),
}


@pytest.mark.parametrize("kind", ONCE)
def test_a_term_that_latents_alone_decide_counts_once(kind):
    inference, theta = build(with_term(ONCE[kind]), num_obs=1200, **COLUMNS)
    assert dict(zip(inference.sites, inference.kinds))["term"] == "kl_global"
    eps = torch.full((1, 1, inference.guide.noise_size[0]), 0.3, dtype=F64)
    place = inference.sites.index("term")
    two = {name: torch.cat([column, column]) for name, column in COLUMNS.items()}
    whole = inference.terms(theta, noise_of(eps), one_group(**COLUMNS), 1.0)
    copies = inference.terms(theta, noise_of(eps), one_group(**two), 1.0)
    half = inference.terms(theta, noise_of(eps), one_group(**COLUMNS), 0.5)  # as on each of two ranks
    assert float(whole[place]) != 0
    assert float(copies[place]) == float(whole[place]) == 2 * float(half[place])


def test_the_value_of_terms_by_hand():
    """At z = 0 where level = w = 0, N = 1,200 for 12 rows."""
    inference, theta = build(with_term(ONCE["known values of groups"]), num_obs=1200, **COLUMNS)
    eps = torch.zeros(1, 1, inference.guide.noise_size[0], dtype=F64)
    terms = dict(zip(inference.sites, inference.terms(theta, noise_of(eps), one_group(**COLUMNS), 1.0).tolist()))
    assert terms["term"] == pytest.approx(-0.5 * 14 / 4 - 3 * (math.log(2) + HALF_LOG_2PI), abs=1e-12)
    assert terms["y"] == pytest.approx(100 * float(-0.5 * (Y**2).sum() - 12 * HALF_LOG_2PI), rel=1e-12)


DEPENDENT = {
    "a sum over the rows": (factor(lambda w, level, c: -((w - c["y"]) ** 2).sum()), '"term"\\) stands outside'),
    "a mean of the rows": (factor(lambda w, level, c: -((w - c["y"].mean()) ** 2)), "one value for each row"),
    "for many rows": (lambda w, level, c: len(c["y"]) > 9 and pyro.factor("term", -(w**2)), "depends on the rows"),
    "their number": (factor(lambda w, level, c: -(w**2) * len(c["y"])), 'factor\\("term"\\).*depends on the rows'),
    "through numpy": (factor(lambda w, level, c: -(w**2) * float(c["y"].numpy().max())), "depends on the rows"),
    "two values only": (factor(lambda w, level, c: -(w**2) * c["flag"][0]), "depends on the rows"),
    "their least": (factor(lambda w, level, c: -(w**2) * c["group"].min()), "depends on the rows"),
    "a total": (lambda w, level, c: pyro.sample("t", dist.Normal(w, 1.0), obs=c["y"].sum()), 'site "t" stands outside'),
    "a column": (lambda w, level, c: pyro.sample("t", dist.Normal(w, 1.0), obs=c["x"]), 'move it into `with'),
    "a prior": (lambda w, level, c: pyro.sample("t", dist.Normal(c["y"].mean(), 1.0)), 'prior of latent "t".*a number'),
    "the width of a prior": (lambda w, level, c: pyro.sample("t", dist.Uniform(-9.0, c["x"].max())), 'latent "t"'),
    "a mask": (lambda w, level, c: poutine.mask(pyro.factor, c["flag"][0] > 0)("term", -(w**2)), "depends on the rows"),
    "a scale": (lambda w, level, c: poutine.scale(pyro.factor, 1.0 * len(c["x"]))("term", -(w**2)), "on the rows"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DEPENDENT)
def test_a_term_that_the_rows_decide_is_refused(kind):
    term, words = DEPENDENT[kind]
    with pytest.raises(UserError, match=words):
        build(with_term(term), **COLUMNS)


def test_a_column_that_is_the_same_in_the_first_rows_is_seen_to_matter():
    term = factor(lambda w, level, c: -(w**2) * c["flag"].sum())
    with pytest.raises(UserError, match="depends on the rows"):
        build(with_term(term), **{**COLUMNS, "flag": torch.zeros(12, dtype=F64)})


def rows_in_a_loop(x, y, rows=None):
    w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
    for i in range(rows or len(y)):
        pyro.sample(f"toss_{i}", dist.Normal(w, 1.0), obs=y[i])


def jointly(x, y):
    w = pyro.sample("w", dist.LogNormal(x.new_zeros(()), 1.0))
    pyro.sample("f", dist.MultivariateNormal(torch.zeros_like(x), w * torch.eye(len(x), dtype=F64)), obs=y)


def as_one_event(x, y):
    w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
    pyro.sample("f", dist.Normal(w * x, 1.0).to_event(1), obs=y)


def other_plate(x, y):
    w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("people", len(x)):
        pyro.sample("f", dist.Normal(w, 1.0), obs=y)


def selected(x, y, size=len):
    w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", size(y[y > 0])):
        pyro.sample("f", dist.Normal(w, 1.0), obs=y[y > 0])


def lagged(x, y):
    w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x) - 1):
        pyro.sample("f", dist.Normal(w * y[:-1], 1.0), obs=y[1:])


def selected_within(x, y):
    w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("f", dist.Normal(w, 1.0).expand([len(y[y > 0])]), obs=y[y > 0])


def selected_beside(x, y):
    w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
    likelihood(w, y)
    with pyro.plate("late", len(y[y > 0])):
        pyro.sample("f", dist.Normal(w, 1.0), obs=y[y > 0])


def known(x, y):
    w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
    pyro.sample("f", dist.Normal(w, 1.0), obs=torch.tensor(1.0))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (rows_in_a_loop, 'a site for each row \\("toss_0", "toss_1".*pyro.plate\\("data", len\\(x\\)\\)'),
        (functools.partial(rows_in_a_loop, rows=2000), 'a site for each row \\("toss_0"'),
        (jointly, '"f" is one MultivariateNormal over all rows.*pyro.plate.*group_by'),
        (as_one_event, 'site "f" stands outside plate "data".*move it into `with pyro.plate'),
        (other_plate, 'plate "people", which has a member for each row.*plate=people'),
        (selected, "its size changes with the data.*poutine.mask"),
        (functools.partial(selected, size=lambda y: 5), 'takes 5 rows.* 12: write pyro.plate\\("data"'),
        (lagged, "takes 11 rows where the batch has 12.*not exchangeable.*group_by"),
        (selected_within, "Shape mismatch inside plate.*poutine.mask"),
        (selected_beside, 'plate "late".*poutine.mask'),
        (known, 'no plate "data" with an observed site in it'),
    ],
    ids=lambda value: getattr(value, "__name__", "") or None,
)
def test_each_case_has_its_remedy(model, words):
    with pytest.raises(UserError, match=words):
        build(model, x=X, y=Y)


def centered(group, y):
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 2.0))
    spread = pyro.sample("spread", dist.LogNormal(y.new_zeros(()), 1.0))
    with pyro.plate("groups", 3):
        effect = pyro.sample("effect", dist.Normal(mean, spread))
    pyro.deterministic("total", effect.sum())
    pyro.deterministic("fitted", effect[group])
    likelihood(effect[group], y)


def by_hand(group, y):
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 2.0))
    spread = pyro.sample("spread", dist.LogNormal(y.new_zeros(()), 1.0))
    with pyro.plate("groups", 3):
        effect = mean + spread * pyro.sample("effect_decentered", dist.Normal(y.new_zeros(()), 1.0))
    likelihood(effect[group], y)


def transformed(group, y):
    base = dist.Normal(y.new_zeros(()), 1.0)
    level = pyro.sample("level", dist.TransformedDistribution(base, transforms.AffineTransform(1.0, 3.0)))
    with pyro.plate("groups", 3):
        effect = pyro.sample("effect", dist.Normal(level, 1.0))
    likelihood(effect[group], y)


def correlated(group, y):
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 1.0))
    effect = pyro.sample("effect", dist.MultivariateNormal(y.new_zeros(4), torch.eye(4, dtype=F64)))
    likelihood(mean + effect[group], y)


def terms_at(model, elements, **columns):
    inference, theta = build(model, num_obs=1200, **columns)
    eps = torch.linspace(-1, 1, elements, dtype=F64)[None, None]
    return inference, inference.terms(theta, noise_of(eps), one_group(**columns), 1.0)


def test_a_reparameterized_model_is_the_one_written_by_hand():
    columns = {"group": GROUP, "y": Y}
    _, wanted = terms_at(by_hand, 5, **columns)
    config = {"effect": LocScaleReparam(0.0)}
    for model in (poutine.reparam(centered, config=config), poutine.reparam(config=config)(centered)):
        inference, terms = terms_at(model, 5, **columns)
        assert torch.equal(terms, wanted)
        assert inference.sites == ("mean", "spread", "effect_decentered", "y")
        assert inference.derived == ("effect", "total")


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (poutine.reparam(transformed, config={"level": TransformReparam()}), ("level",)),
        (poutine.reparam(correlated, config={"effect": HaarReparam(-1)}), ("effect",)),  # keeps a density
        (AutoReparam(centered=0.0)(transformed), ("level", "effect")),
        (AutoReparam()(centered), ("effect", "total")),  # with a parameter between centered and not
    ],
)
def test_other_reparameterizations(model, names):
    inference, terms = terms_at(model, 4 if "level" in names else 5, group=GROUP, y=Y)
    assert set(names) <= set(inference.derived)
    assert torch.isfinite(terms).all()


def test_a_condition_counts_once():
    def free(x, y):
        sigma = pyro.sample("sigma", dist.HalfNormal(x.new_ones(())))
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, sigma), obs=y)

    inference, terms = terms_at(poutine.condition(free, {"sigma": torch.tensor(0.5, dtype=F64)}), 1, x=X, y=Y)
    assert inference.sites == ("sigma", "w", "y")
    assert float(terms[0]) == pytest.approx(0.5 * math.log(2 / math.pi) - 0.125, abs=1e-12)


def test_a_size_that_follows_the_codes_is_named():
    def model(group, y):
        with pyro.plate("groups", int(group.max()) + 1):
            level = pyro.sample("level", dist.Normal(y.new_zeros(()), 1.0))
        likelihood(level[group], y)

    with pytest.raises(UserError, match=r'"level" has shape \[3\] on 12 rows and \[1\].*size as a number'):
        build(model, group=torch.arange(12) // 4, y=Y)


def test_the_generator_is_where_the_model_left_it():
    """A guide's random first values are those of a model without these checks."""
    seen = []

    def guide(model, batch):
        seen.append(torch.rand(()))
        raise UserError("enough")

    for model in (with_term(ONCE["a penalty"]), with_term(lambda w, level, c: None)):
        with pytest.raises(UserError, match="enough"):
            build(model, guide, **COLUMNS)
    assert seen[0] == seen[1]


def test_a_model_that_can_be_evaluated_near_its_start_alone_is_checked_there():
    def narrow(x, y):
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        share = torch.linalg.cholesky((0.1 - w.abs()).reshape(1, 1)).sum()
        pyro.factor("once", -share)
        likelihood(w, y)

    inference, _ = build(narrow, x=X, y=Y)
    assert inference.sites == ("w", "once", "y")
