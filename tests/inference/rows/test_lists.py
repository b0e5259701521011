"""A plate of the entries of ragged columns: the sums by row that one would write by hand."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from svi_problems import F64, build, grad, noise_of, one_group
from torch.distributions import MultivariateNormal

from trainer.errors import UserError
from trainer.inference.model.plates import Batch, PlatedModel
from trainer.inference.model.ragged import Ragged
from trainer.inference.rows.lists import with_lists
from trainer.inference.rows.marginal import Marginal
from trainer.inference.rows.sites import row_sites
from trainer.inference.setup import mean_field

ONE = torch.ones((), dtype=F64)
OFFSETS = torch.tensor([0, 3, 3, 4, 6, 10])
GENERATOR = torch.Generator().manual_seed(4)
X, Y = (Ragged(OFFSETS, torch.randn(10, dtype=F64, generator=GENERATOR)) for _ in range(2))
AT = {"b": -0.7 * ONE, "spread": 1.2 * ONE}


def globals_of():
    return pyro.sample("b", dist.Normal(0 * ONE, 1.0)), pyro.sample("spread", dist.HalfNormal(ONE))


def of_entries(x, y):
    b, spread = globals_of()
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0 * ONE, spread))
    with pyro.plate("entries", len(x.values)):
        pyro.sample("y", dist.Normal(b * x.values + x.spread(u), 0.5), obs=y.values)


def by_hand(x, y):
    b, spread = globals_of()
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0 * ONE, spread))
        pyro.factor("y", x.total(dist.Normal(b * x.values + x.spread(u), 0.5).log_prob(y.values)))


def marked(x, y):
    """Some entries are masked, all are scaled, in logits."""
    b, spread = globals_of()
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0 * ONE, spread))
    with pyro.plate("entries", len(x.values)), poutine.mask(mask=x.values > 0), poutine.scale(scale=2.0):
        pyro.sample("y", dist.Bernoulli(logits=b * x.values + x.spread(u)), obs=(y.values > 0).double())


def marked_by_hand(x, y):
    b, spread = globals_of()
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0 * ONE, spread))
        each = dist.Bernoulli(logits=b * x.values + x.spread(u)).log_prob((y.values > 0).double())
        pyro.factor("y", 2 * x.total(torch.where(x.values > 0, each, 0.0)))


def densities(model, **columns):
    plated = with_lists(PlatedModel(model, columns), Batch.whole(columns))
    marginal = Marginal(plated.fn, "data", row_sites(plated, Batch.whole(columns)))
    marginal.look(columns)
    return marginal.log_density(columns, AT)


def test_the_evidence_of_rows_is_exact_whatever_room_there_is():
    for room, filled in ((10, 0.0), (14, 7.5)):
        x, y = X.padded(room), Y.padded(room)
        x.values[10:], y.values[10:] = filled, filled
        found = densities(of_entries, x=x, y=y)
        for i in range(5):
            own = slice(int(OFFSETS[i]), int(OFFSETS[i + 1]))
            count = own.stop - own.start
            covariance = 0.25 * torch.eye(count, dtype=F64) + 1.44
            mean = AT["b"] * X.values[own]
            want = MultivariateNormal(mean, covariance).log_prob(Y.values[own]) if count else 0 * ONE
            torch.testing.assert_close(found[i], want, rtol=0, atol=1e-12)


def test_rows_do_not_depend_on_each_other():
    whole = densities(marked, x=X, y=Y)
    alone = [densities(marked, x=X[i : i + 1].padded(5), y=Y[i : i + 1].padded(5)) for i in range(5)]
    torch.testing.assert_close(torch.cat(alone), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pair", [(of_entries, by_hand), (marked, marked_by_hand)], ids=["plain", "masked, scaled"])
def test_the_elbo_and_its_gradient_are_those_of_sums_by_hand(pair):
    noise, columns, found = noise_of(torch.full((1, 1, 2), 0.4, dtype=F64)), {"x": X.padded(13), "y": Y.padded(13)}, []
    for model in pair:
        inference, theta = build(model, mean_field, num_obs=50, **columns)
        found.append(grad(inference, theta, noise, one_group(**columns)))
    assert found[0].isfinite().all()
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def test_latents_of_entries_are_refused():
    def model(x, y):
        globals_of()
        with pyro.plate("data", len(x)):
            pyro.sample("count", dist.Poisson(3 * ONE), obs=x.lengths.double())
        with pyro.plate("entries", len(x.values)):
            pyro.sample("z", dist.Normal(0 * ONE, 1.0))

    with pytest.raises(UserError, match=r'latent site "z" stands in the plate "entries" of ragged columns.*group_by='):
        build(model, mean_field, x=X, y=Y)


def test_other_models_stay_as_they_are():
    for model, columns in ((by_hand, {"x": X, "y": Y}), (lambda y: None, {"y": Y.values})):
        plated = PlatedModel(model, columns)
        assert with_lists(plated, Batch.whole(columns)) is plated
