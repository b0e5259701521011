"""The entries of rows of varying length: what only fills a row up counts nowhere, whatever it holds."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from svi_problems import F64, build, grad, noise_of, one_group
from torch.distributions import MultivariateNormal

from trainer.errors import UserError
from trainer.inference.model.plates import Batch, PlatedModel
from trainer.inference.rows.entries import entries_by_row, with_entries
from trainer.inference.rows.integral import Fineness
from trainer.inference.rows.marginal import Marginal
from trainer.inference.rows.posterior import RowPosterior
from trainer.inference.rows.sites import row_sites
from trainer.inference.setup import guide_factory, mean_field

ONE = torch.ones((), dtype=F64)
LENGTH = torch.tensor([4, 2, 0, 1, 3, 4])
N, T = 6, 4
GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(N, T, dtype=F64, generator=GENERATOR)
Y = torch.randn(N, T, dtype=F64, generator=GENERATOR)
LABELS = (X + Y > 0).double()
AT = {"b": torch.tensor([0.3, -0.7], dtype=F64), "spread": 1.2 * ONE}


def shared():
    """What all rows share: coefficients [2], and the sd of their intercepts."""
    b = pyro.sample("b", dist.Normal(torch.zeros(2, dtype=F64), 2.0).to_event(1))
    return b, pyro.sample("spread", dist.HalfNormal(2 * ONE))


def rows_of(likelihood):
    """Rows with an intercept of their own and entries of ``likelihood``(mean)."""

    def model(x, y=None):
        b, spread = shared()
        with pyro.plate("data", len(x), dim=-2):
            u = pyro.sample("u", dist.Normal(0 * ONE, spread))
            with pyro.plate("entries", x.shape[1], dim=-1):
                pyro.sample("y", likelihood(b[0] + b[1] * x + u), obs=y)

    return model


gaussian = rows_of(lambda mean: dist.Normal(mean, 0.5))
logistic = rows_of(lambda mean: dist.Bernoulli(logits=mean))
counts = rows_of(lambda mean: dist.Poisson(mean.exp()))


def marginal_of(model, columns):
    masked = with_entries(PlatedModel(model, columns), Batch.whole(columns))
    sites = row_sites(masked, Batch.whole(columns))
    made = Marginal(masked.fn, "data", sites, Fineness(sites.size, 9, 12))
    made.look(columns)
    return made


def densities(model, at=AT, **columns):
    """log p(row | at) [B]."""
    return marginal_of(model, columns).log_density(columns, at)


def alone(model, at=AT, **columns):
    """The same of each row that has entries, cut to these; 0 of another."""
    found = []
    for i, length in enumerate(columns.pop("length").tolist()):
        row = {name: column[i : i + 1, :length] for name, column in columns.items()}
        found.append(densities(model, at, **row)[0] if length else 0 * ONE)
    return torch.stack(found)


def garbage(column, value):
    """``column`` with ``value`` in place of what fills rows up, and two more places of it."""
    wide = torch.nn.functional.pad(column, (0, 2), value=value)
    return torch.where(torch.arange(T + 2) < LENGTH[:, None], wide, torch.full_like(wide, value))


def test_the_evidence_is_that_of_the_entries_alone_by_hand():
    found = densities(gaussian, x=X, y=Y, length=LENGTH)
    for i, length in enumerate(LENGTH.tolist()):
        covariance = 0.25 * torch.eye(length, dtype=F64) + 1.44
        mean = AT["b"][0] + AT["b"][1] * X[i, :length]
        want = MultivariateNormal(mean, covariance).log_prob(Y[i, :length]) if length else 0 * ONE
        torch.testing.assert_close(found[i], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("model", [gaussian, logistic, counts], ids=["gaussian", "logistic", "counts"])
def test_rows_count_as_their_entries_alone_whatever_fills_them_up(model):
    y = Y if model is gaussian else LABELS
    want = alone(model, x=X, y=y, length=LENGTH)
    for x_value, y_value in ((0.0, 0.0), (7.5, -1.0), (-3.0, torch.nan)):
        columns = {"x": garbage(X, x_value), "y": garbage(y, y_value), "length": LENGTH}
        torch.testing.assert_close(densities(model, **columns), want, rtol=0, atol=1e-12)
    one_at_a_time = [densities(model, x=X[i : i + 1], y=y[i : i + 1], length=LENGTH[i : i + 1]) for i in range(N)]
    torch.testing.assert_close(torch.cat(one_at_a_time), want, rtol=0, atol=1e-12)


def test_gradients_are_numbers_where_what_fills_rows_up_has_no_density():
    y = garbage(LABELS, -1.0)
    found = {}
    for name, columns in {"padded": {"x": garbage(X, 1.0), "y": y}, "as is": {"x": X, "y": LABELS}}.items():
        columns["length"] = LENGTH
        inference, theta = build(counts, mean_field, **columns)
        noise = noise_of(torch.full((1, 1, 3), 0.3, dtype=F64))
        found[name] = grad(inference, theta, noise, one_group(**columns))
    assert found["padded"].isfinite().all()
    torch.testing.assert_close(found["padded"], found["as is"], rtol=0, atol=1e-12)


def test_the_plates_stand_in_either_order():
    def transposed(x, y=None):
        b, spread = shared()
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(0 * ONE, spread))
            with pyro.plate("entries", x.shape[1]):
                pyro.sample("y", dist.Bernoulli(logits=b[0] + b[1] * x.T + u), obs=y.T)

    columns = {"x": X, "y": LABELS, "length": LENGTH}
    torch.testing.assert_close(densities(transposed, **columns), densities(logistic, **columns), rtol=0, atol=1e-13)


def test_entries_may_be_a_loop():
    def looped(x, y=None):
        b, spread = shared()
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(0 * ONE, spread))
            for t in pyro.plate("entries", x.shape[1]):
                pyro.sample(f"y_{t}", dist.Bernoulli(logits=b[0] + b[1] * x[:, t] + u), obs=y[:, t])

    columns = {"x": X, "y": LABELS, "length": LENGTH}
    torch.testing.assert_close(densities(looped, **columns), densities(logistic, **columns), rtol=0, atol=1e-13)


def classes(x, y=None):
    share = pyro.sample("share", dist.Beta(ONE, ONE))
    with pyro.plate("data", len(x), dim=-2):
        group = pyro.sample("group", dist.Bernoulli(share)).long()
        with pyro.plate("entries", x.shape[1], dim=-1):
            k = pyro.sample("k", dist.Categorical(WEIGHTS[group]))
            pyro.sample("y", dist.Normal(x + 3.0 * k, 1.0), obs=y)


WEIGHTS = torch.tensor([[0.7, 0.3], [0.1, 0.9]], dtype=F64)


def of_classes(share):
    """log p(row, group) [2, N] by hand."""
    each = torch.stack([dist.Normal(X + 3.0 * k, 1.0).log_prob(Y) for k in range(2)], -1)
    real = torch.arange(T) < LENGTH[:, None]
    of_groups = [torch.where(real, torch.logsumexp(each + w.log(), -1), 0.0).sum(1) for w in WEIGHTS]
    return torch.stack([(1 - share).log() + of_groups[0], share.log() + of_groups[1]])


def test_classes_of_entries_are_summed_out_of_those_that_there_are():
    share = 0.4 * ONE
    found = densities(classes, {"share": share}, x=garbage(X, 1.0), y=garbage(Y, -1.0), length=LENGTH)
    torch.testing.assert_close(found, torch.logsumexp(of_classes(share), 0), rtol=0, atol=1e-12)


def posterior(model, at, **columns):
    return RowPosterior(marginal_of(model, columns), columns, {name: each[None] for name, each in at.items()})


def test_classes_of_entries_are_known_of_those_that_there_are():
    made = posterior(classes, {"share": 0.4 * ONE}, x=X, y=Y, length=LENGTH)
    _, shares = made.known()
    want = of_classes(0.4 * ONE)
    torch.testing.assert_close(shares["group"][:, 1], (want[1] - torch.logsumexp(want, 0)).exp(), rtol=0, atol=1e-12)
    entries = made.entries()
    assert entries["group"] is None
    assert torch.equal(entries["k"], torch.arange(T) < LENGTH[:, None])


def skewed(x, y=None):
    """A latent in each entry, whose prior is no normal."""
    rate = pyro.sample("rate", dist.LogNormal(0 * ONE, 1.0))
    with pyro.plate("data", len(x), dim=-2), pyro.plate("entries", x.shape[1], dim=-1):
        w = pyro.sample("w", dist.Gamma(2.0, rate))
        pyro.sample("y", dist.Poisson(w), obs=y)


def test_latents_of_entries_that_there_are_not_add_nothing():
    x, y, length = X[:3, :1], LABELS[:3, :1], torch.tensor([1, 0, 1])
    at = {"rate": 0.8 * ONE}
    want = torch.where(length > 0, densities(skewed, at, x=x, y=y), 0.0)
    wide = {"x": x.expand(-1, 2), "y": y.expand(-1, 2), "length": length}
    torch.testing.assert_close(densities(skewed, at, **wide), want, rtol=0, atol=1e-12)
    assert posterior(skewed, at, **wide).entries()["w"].tolist() == [[True, False], [False, False], [True, False]]


def test_numbers_of_rows_come_without_the_axis_of_their_entries():
    made = posterior(gaussian, AT, x=X, y=Y, length=LENGTH)
    nodes, _ = made.known()
    assert made.moments(nodes, (0.5,))["u"].mean.shape == (N,)


def test_a_guide_of_rows_counts_the_entries_that_there_are():
    """With the exact posterior of each row's entries as the guide, the ELBO of a draw is the evidence."""

    def model(x, y=None):
        pyro.sample("b", dist.Normal(0 * ONE, 1.0))
        with pyro.plate("data", len(x), dim=-2), pyro.plate("entries", x.shape[1], dim=-1):
            w = pyro.sample("w", dist.Normal(0 * ONE, 1.0))
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    def guide(x, y):
        loc = pyro.param("loc", 0 * ONE)
        pyro.sample("b", dist.Normal(loc, 1.0))
        with pyro.plate("data", len(x), dim=-2), pyro.plate("entries", x.shape[1], dim=-1):
            pyro.sample("w", dist.Normal(y / 2, 0.5**0.5 * ONE))

    columns = {"x": X, "y": Y, "length": LENGTH}
    inference, theta = build(model, guide_factory(guide, columns), **columns)
    real = torch.arange(T) < LENGTH[:, None]
    want = dist.Normal(0 * ONE, 2**0.5).log_prob(Y)[real].sum()
    elements, per_row = inference.guide.noise_size
    noise = noise_of(torch.zeros(1, 1, elements, dtype=F64), torch.ones(1, 1, N, per_row, dtype=F64))
    found = inference.terms(theta, noise, one_group(**columns), 1.0).sum()
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


def test_what_looks_across_rows_is_still_refused():
    centered = rows_of(lambda mean: dist.Normal(mean - mean.mean(), 0.5))
    with pytest.raises(UserError, match="not exchangeable over rows"):
        build(centered, mean_field, x=X, y=Y, length=LENGTH)


@pytest.mark.parametrize(
    ("width", "length", "told"),
    [
        (
            3,
            LENGTH,
            r'"entries" has 3 places where the rows have up to 4 entries: write pyro.plate\("entries", x.shape',
        ),
        (4, LENGTH + 3, '"length" has up to 7 entries in a row where plate "entries" has 4'),
    ],
)
def test_a_plate_that_is_not_as_long_as_the_rows_is_refused(width, length, told):
    def model(x, y=None):
        b = pyro.sample("b", dist.Normal(0 * ONE, 2.0))
        with pyro.plate("data", len(x), dim=-2), pyro.plate("entries", width, dim=-1):
            pyro.sample("y", dist.Normal(b, 1.0), obs=y[:, :width])

    with pytest.raises(UserError, match=told):
        build(model, mean_field, x=X, y=Y, length=length)


@pytest.mark.parametrize("length", [None, LENGTH.double(), LENGTH[:, None]], ids=["none", "floats", "a matrix"])
def test_without_numbers_of_entries_all_places_count(length):
    columns = {"x": X, "y": Y} | ({} if length is None else {"length": length})
    model = PlatedModel(gaussian, columns)
    assert with_entries(model, Batch.whole(columns)) is model


def test_a_model_without_entries_stays_as_it_is():
    def model(x, length):
        b = pyro.sample("b", dist.Normal(0 * ONE, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(b, 1.0), obs=length)

    columns = {"x": X, "length": LENGTH}
    plated = PlatedModel(model, columns)
    assert with_entries(plated, Batch.whole(columns)) is plated
    inside = pyro.poutine.trace(plated).get_trace(Batch.whole(columns)).nodes["y"]
    assert entries_by_row(inside, "data") is None


def test_a_model_may_take_the_numbers_of_its_entries():
    def model(x, y=None, length=None):
        assert length is not None
        gaussian(x, y)

    def everything(**columns):
        model(**columns)

    columns = {"x": X, "y": Y, "length": LENGTH}
    want = densities(gaussian, **columns)
    assert torch.equal(densities(model, **columns), want)
    assert torch.equal(densities(everything, **columns), want)


def test_rows_that_repeat_others_do_not_count_either():
    """Of a group's rows the first `valid` count, of these their entries."""
    columns = {"x": X, "y": Y, "length": LENGTH}
    inference, theta = build(gaussian, mean_field, **columns)
    noise = noise_of(torch.zeros(1, 1, 3, dtype=F64))
    lifted = {name: column[None] for name, column in columns.items()}
    some = Batch(lifted, torch.tensor([4]), torch.tensor(4), torch.arange(N)[None])
    few = one_group(**{name: column[:4] for name, column in columns.items()})
    whole, part = (inference.terms(theta, noise, each, 1.0) for each in (some, few))
    torch.testing.assert_close(whole, part, rtol=0, atol=1e-12)
