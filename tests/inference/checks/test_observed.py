"""Rows that cannot be right are named: values outside supports, indices outside tables, weights, densities."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from svi_problems import F64, batch_of, build

from trainer.errors import UserError
from trainer.inference.checks.observed import RowCheck, with_parameters
from trainer.inference.model.plates import PlatedModel

N, BAD = 40, 23
X = torch.linspace(-1, 1, N, dtype=F64)
COUNTS = torch.arange(N, dtype=F64) % 3
SHARES = torch.softmax(torch.stack([X, -X, X**2], -1), -1)
HOT = torch.eye(3, dtype=F64)[(COUNTS).long()]


def observing(family):
    """A model that observes y from ``family(a)``, with one latent a, given as [B]."""

    def model(y):
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", family(a.expand(len(y))), obs=y)

    return model


def mixture(a):
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(len(a), 2)), dist.Poisson(torch.stack([a, a], -1).exp()))


FAMILIES = [
    (lambda a: dist.Bernoulli(logits=a), COUNTS.clamp(max=1), 9, "9 .* Bernoulli .0 or 1"),
    (lambda a: dist.Bernoulli(logits=a), COUNTS.clamp(max=1), 0.5, "0.5 .* Bernoulli"),
    (lambda a: dist.Exponential(a.exp()), COUNTS + 1, -5, "-5 .* Exponential .from 0"),
    (lambda a: dist.Poisson(a.exp()), COUNTS, 2.5, "2.5 .* Poisson .whole numbers from 0"),
    (lambda a: dist.NegativeBinomial(2.0, logits=a), COUNTS, -1, "-1 .* NegativeBinomial"),
    (lambda a: dist.Binomial(5, logits=a), COUNTS, 6, "6 .* Binomial .whole numbers from 0 to 5"),
    (lambda a: dist.Categorical(torch.ones(len(a), 3)), COUNTS.long(), 3, "3 .* Categorical .whole .* to 2"),
    (lambda a: dist.Categorical(logits=torch.stack([a, -a, a], -1)), COUNTS.long(), -1, "-1 .* Categorical"),
    (lambda a: dist.OneHotCategorical(logits=torch.stack([a, a, a], -1)), HOT, 1, r"\[1, 1, 1\] .* OneHotCategorical"),
    (lambda a: dist.Gamma(2.0, a.exp()), COUNTS + 1, -3, "-3 .* Gamma .from 0"),
    (lambda a: dist.LogNormal(a, 1.0), COUNTS + 1, -3, "-3 .* LogNormal .above 0"),
    (lambda a: dist.Weibull(a.exp(), 1.5), COUNTS + 1, -3, "-3 .* Weibull .above 0"),
    (lambda a: dist.Beta(a.exp(), 2.0), (X + 2) / 4, 1.2, "1.2 .* Beta .from 0 to 1"),
    (lambda a: dist.Dirichlet(torch.ones(len(a), 3)), SHARES, 0.7, r"\[0.7, 0.7, 0.7\] .* Dirichlet"),
    (lambda a: dist.Normal(a, 1.0), COUNTS, float("nan"), "nan .* Normal .numbers"),
    (lambda a: dist.ZeroInflatedPoisson(a.exp(), gate=a.sigmoid()), COUNTS, -1, "-1 .* ZeroInflatedPoisson"),
    (lambda a: dist.Normal(a[:, None], 1.0).expand([len(a), 2]).to_event(1).mask(True), torch.stack([X, X], 1),
     float("nan"), "nan .* Normal"),
    (mixture, COUNTS, 0.5, "0.5 .* MixtureSameFamily .whole numbers from 0"),
]  # fmt: skip


def check_of(model, columns):
    """The check of a problem that was built on columns that are right."""
    inference, theta = build(model, **columns)
    return RowCheck(inference.model, with_parameters(inference.parameters, theta))


@pytest.mark.parametrize(("family", "right", "wrong", "words"), FAMILIES)
def test_a_value_outside_the_support_is_named_with_its_row(family, right, wrong, words):
    model = observing(family)
    check = check_of(model, {"y": right})
    spoilt = right.clone()
    spoilt[BAD] = spoilt[-1] = wrong
    check.refuse(batch_of(y=right))
    check.learn(batch_of(y=right))
    assert check.is_right({"y": right[None]}) or check._filters is None
    assert not check.is_right({"y": spoilt[None]})
    with pytest.raises(UserError, match=f"^site .y. observes {words}.*and so in row {N - 1}:") as error:
        check.refuse(batch_of(y=spoilt))
    assert f"in row {BAD} (row_id)" in str(error.value)
    with pytest.raises(UserError, match=f"in row {BAD} .row_id."):  # the first rows of a run
        build(model, y=spoilt)


def test_columns_alone_tell_where_values_are_columns():
    """Their least and greatest numbers suffice where these decide; derived values need the model."""
    poisson = observing(lambda a: dist.Poisson(a.exp()))
    derived = observing(lambda a: dist.Poisson(a.exp()))
    for y, bounds, looks_at in ((COUNTS.long(), (0, 2), []), (COUNTS, (0, 2), ["y"]), (COUNTS.long(), (-1, 2), ["y"])):
        inference, theta = build(poisson, y=y)
        check = RowCheck(inference.model, with_parameters(inference.parameters, theta), {"y": bounds})
        assert not check.is_right({"y": y})  # nothing is learnt yet
        check.learn(batch_of(y=y))
        assert list(check._filters) == looks_at

    def shifted(y):
        derived(y - 1)

    check = check_of(shifted, {"y": COUNTS + 1})
    check.learn(batch_of(y=COUNTS + 1))
    assert not check.is_right({"y": COUNTS + 1})
    with pytest.raises(UserError, match="observes -1 in row 0"):
        check.refuse(batch_of(y=COUNTS))


def masked(y, seen):
    a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=F64), 1.0))
    with pyro.plate("data", len(y)), poutine.mask(mask=seen):
        pyro.sample("y", dist.Bernoulli(logits=a + 0 * y), obs=y)


def masked_inside(y, seen):
    a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=F64), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=a + 0 * y).mask(seen), obs=y)


def weighted(y):
    a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=F64), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=a + 0 * y), obs=y)


@pytest.mark.parametrize(
    ("model", "column", "nothing"), [(masked, "seen", False), (masked_inside, "seen", False), (weighted, "weight", 0.0)]
)
def test_what_does_not_count_may_be_anything(model, column, nothing):
    right = COUNTS.clamp(max=1)
    spoilt = right.clone()
    spoilt[BAD] = 9
    everything = torch.ones(N, dtype=torch.bool if nothing is False else F64)
    without = everything.clone()
    without[BAD] = nothing
    check = check_of(model, {"y": right, column: everything})
    check.refuse(batch_of(**{"y": spoilt, column: without}))
    with pytest.raises(UserError, match=f"observes 9 in row {BAD}"):
        check.refuse(batch_of(**{"y": spoilt, column: everything}))


def test_weights_are_numbers_from_zero_on():
    y, weight = COUNTS.clamp(max=1), torch.ones(N, dtype=F64)
    check = check_of(weighted, {"y": y, "weight": weight})
    for wrong in (-1.0, float("nan"), float("inf")):
        spoilt = weight.clone()
        spoilt[BAD] = wrong
        with pytest.raises(UserError, match=f'column "weight" is {wrong:g} in row {BAD}'):
            check.refuse(batch_of(y=y, weight=spoilt))


LEVEL = torch.arange(N) % 5
TABLES = {
    "indexing": lambda e, level: e[level],
    "two axes": lambda e, level: torch.stack([e, e])[:, level][0],
    "pairs": lambda e, level: torch.stack([e, e], 1)[level, level % 2],
    "index_select": lambda e, level: e.index_select(0, level),
    "gather": lambda e, level: e.gather(0, level),
    "embedding": lambda e, level: torch.nn.functional.embedding(level, e[:, None])[:, 0],
    "one_hot": lambda e, level: torch.nn.functional.one_hot(level, 5).to(e.dtype) @ e,
    "Vindex": lambda e, level: pyro.ops.indexing.Vindex(torch.stack([e, e]))[0, level],
}


def levels(level, y, take=TABLES["indexing"], known=True):
    e = pyro.sample("e", dist.Normal(torch.zeros(5, dtype=F64), 1.0).to_event(1))
    with pyro.plate("data", len(y)), poutine.mask(mask=known):
        pyro.sample("y", dist.Normal(take(e, level), 1.0), obs=y)


@pytest.mark.parametrize("wrong", [5, 99, -1, -7])
@pytest.mark.parametrize("how", TABLES)
def test_an_index_outside_its_table_is_named_with_its_row(how, wrong):
    def model(level, y):
        levels(level, y, TABLES[how])

    check = check_of(model, {"level": LEVEL, "y": X})
    spoilt = LEVEL.clone()
    spoilt[BAD] = wrong
    words = f"in row {BAD} .row_id." if how == "one_hot" else f'column "level" is {wrong} in row {BAD}.*table of 5'
    with pytest.raises(UserError, match=words):
        check.refuse(batch_of(level=spoilt, y=X))
    with pytest.raises(UserError, match=words):
        build(model, level=spoilt, y=X)


def test_an_index_that_wraps_around_may_be_where_the_row_does_not_count():
    def model(level, y):
        levels(level, y, known=level >= 0)

    check = check_of(model, {"level": LEVEL, "y": X})
    spoilt = LEVEL.clone()
    spoilt[BAD] = -1
    check.refuse(batch_of(level=spoilt, y=X))
    spoilt[BAD] = 5
    with pytest.raises(UserError, match='column "level" is 5'):
        check.refuse(batch_of(level=spoilt, y=X))


def test_a_support_that_depends_on_a_latent_is_not_judged_at_one_place():
    def model(y):
        top = pyro.sample("top", dist.LogNormal(torch.zeros((), dtype=F64), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Uniform(torch.zeros_like(y), top + 0 * y), obs=y)

    inference, theta = build(model, y=(X + 1) / 4)
    RowCheck(inference.model, with_parameters(inference.parameters, theta)).refuse(batch_of(y=X + 1), density=True)


def test_a_density_that_is_not_finite_is_named_where_it_is_asked_for():
    def model(x, y):
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a + x, 1.0), obs=y)

    check, spoilt = check_of(model, {"x": X, "y": X}), X.clone()
    spoilt[BAD] = float("inf")
    check.refuse(batch_of(x=spoilt, y=X))
    with pytest.raises(UserError, match=f'log density of site "y" is -inf at .* in row {BAD}'):
        check.refuse(batch_of(x=spoilt, y=X), density=True)


def test_an_error_of_all_rows_is_left_as_it_is():
    def model(y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(y @ y.new_zeros(len(y) + 1), 1.0), obs=y)

    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        RowCheck(PlatedModel(model, ["y"])).refuse(batch_of(y=X))


def test_wide_rows_are_evaluated_a_few_at_a_time(monkeypatch):
    """Each row is, once; the number of a row is that in the whole."""
    model, sizes = observing(lambda a: dist.Poisson(a.exp())), []
    monkeypatch.setattr("trainer.inference.checks.observed._FEWEST_ROWS", 1)
    monkeypatch.setattr("trainer.inference.checks.observed._NUMBERS", 15)
    check = RowCheck(PlatedModel(model, ["y"]))
    faults = check.faults
    check.faults = lambda batch, density: (sizes.append(batch.size), faults(batch, density))[1]
    check.refuse(batch_of(y=COUNTS))
    assert sizes == [15, 15, 10]
    spoilt = COUNTS.clone()
    spoilt[BAD] = -1
    with pytest.raises(UserError, match=f"in row {BAD} .row_id."):
        check.refuse(batch_of(y=spoilt))


class Untold(dist.Normal):
    """A distribution of a user's own that tells no support."""

    support = property(dist.TorchDistribution.support.fget)


def test_a_distribution_without_a_support_is_taken_at_its_word():
    model = observing(lambda a: Untold(a, 1.0, validate_args=False))
    check = RowCheck(PlatedModel(model, ["y"]))
    check.refuse(batch_of(y=X))
    check.learn(batch_of(y=X))
    assert check.is_right({"y": X})


def test_torch_keeps_its_generator():
    model = observing(lambda a: dist.Normal(a, torch.rand(())))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    RowCheck(PlatedModel(model, ["y"])).refuse(batch_of(y=X))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("family", "usual", "value", "words"),
    [
        (lambda a: dist.Gamma(2.0, a.exp()), COUNTS + 1, 0.0, "-inf at 0"),
        (lambda a: dist.Beta(a.exp(), 2.0), (X + 2) / 4, 1.0, "-inf at 1"),
        (lambda a: dist.Beta(a.exp() / 2, 2.0), (X + 2) / 4, 0.0, "inf at 0"),
    ],
)
def test_a_value_on_the_edge_of_a_support_is_named_with_its_row(family, usual, value, words):
    """Among the first rows too, which the checks of the model evaluate before those of all rows."""

    def model(y):
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", family(a.expand(len(y))), obs=y)

    spoilt = usual.double().clone()
    spoilt[BAD] = value
    with pytest.raises(UserError, match=f'log density of site "y" is {words} in row {BAD} .row_id.'):
        build(model, y=spoilt)
