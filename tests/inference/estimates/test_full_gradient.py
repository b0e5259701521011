"""Derivatives over all rows: the same however the rows are cut to fit memory."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from svi_problems import F64, build

from trainer.inference.estimates import full_gradient as module
from trainer.inference.estimates.full_gradient import FEW, full_gradient, full_hessian, full_loss, full_product
from trainer.inference.estimates.many_draws import terms_together
from trainer.inference.estimates.passes import Block, Pass
from trainer.inference.setup import guide_factory

GENERATOR = torch.Generator().manual_seed(4)
X, Y = torch.randn(2, 20, dtype=F64, generator=GENERATOR).unbind()


def slopes(x, y):
    """Two numbers a row, whose 81 nodes are evaluated together."""
    tau = pyro.sample("tau", dist.HalfNormal(x.new_tensor(1.0)))
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, tau).expand([2]).to_event(1))
        pyro.sample("y", dist.StudentT(4.0, u[:, 0] + u[:, 1] * x, 0.8), obs=y)


def amortized(x, y):
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(x.new_tensor(0.0), 1.0))
        pyro.sample("y", dist.Normal(u, 0.8), obs=y)


def encoder(x, y):
    weight = pyro.param("weight", x.new_tensor([0.3, -0.2]))
    with pyro.plate("data", len(x)):
        pyro.sample("u", dist.Normal(weight[0] * x, weight[1].exp()))


ALL = Pass([Block(0, {"x": X, "y": Y}, torch.arange(20))], 1, 5, lambda each: each)
MADE = {
    "gradient": lambda together, theta: full_gradient(together, theta, ALL, None, FEW),
    "product": lambda together, theta: full_product(together, theta, torch.ones(1, dtype=F64), ALL),
    "loss": lambda together, theta: torch.as_tensor(full_loss(together, theta, ALL, FEW)[0]),
    "hessian": lambda together, theta: full_hessian(together, theta, 1, ALL),
}


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("model", [slopes, amortized], ids=lambda model: model.__name__)
def test_slices_of_rows_add_up(made, model, monkeypatch):
    guide = {} if model is slopes else {"guide": guide_factory(encoder, ("x", "y"))}
    inference, theta = build(model, num_obs=20, x=X, y=Y, **guide)
    whole = MADE[made](terms_together(inference), theta)
    monkeypatch.setattr(module, "_ROWS", 7 * inference.model.copies)
    cut = MADE[made](terms_together(inference), theta)
    torch.testing.assert_close(cut, whole, rtol=1e-10, atol=1e-10)
