"""A latent whose value reaches the density without its gradient is refused; one that nothing depends on is not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from svi_problems import F64, build

from trainer.errors import UserError

X = torch.randn(12, dtype=F64, generator=torch.Generator().manual_seed(0))
ZERO = torch.zeros((), dtype=F64)


def with_scale(of):
    def model(x):
        w = pyro.sample("w", dist.Normal(ZERO, 1.0))
        sigma = pyro.sample("sigma", dist.LogNormal(ZERO, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, of(sigma)), obs=x)

    return model


def without_gradient(sigma):
    with torch.no_grad():
        return 2 * sigma


CUT = {
    "item": lambda s: s.item(),
    "float": lambda s: float(s),
    "detach": lambda s: s.detach(),
    "data": lambda s: s.data,
    "detached numpy": lambda s: torch.as_tensor(s.detach().numpy() + 0.5),
    "tolist": lambda s: torch.tensor(s.tolist()),
    "no_grad": without_gradient,
    "a comparison": lambda s: torch.where(s > 1.4, 1.0, 2.0),
}
JOINED = {
    "itself": lambda s: s,
    "both": lambda s: s + s.detach(),
    "in place": lambda s: s.mul_(2.0),
    "a dead unit": lambda s: 1 + torch.relu(-s),
    "nothing": lambda s: 1.0,
    "nothing of it": lambda s: 1.0 + 0.0 * s.item(),
}


@pytest.mark.parametrize("kind", CUT)
def test_a_latent_that_no_gradient_follows_is_named(kind):
    with pytest.raises(UserError, match=r'latent "sigma" changes the density of site "x", but no gradient.*itself'):
        build(with_scale(CUT[kind]), x=X)


def test_numpy_of_what_has_a_gradient_is_named():
    with pytest.raises(UserError, match=r"out of torch \(Can't call numpy.*the tensor itself"):
        build(with_scale(lambda s: torch.as_tensor(s.numpy() + 0.5)), x=X)


@pytest.mark.parametrize("kind", JOINED)
def test_what_a_gradient_follows_or_nothing_depends_on_is_legal(kind):
    inference, _ = build(with_scale(JOINED[kind]), x=X)
    assert inference.sites == ("w", "sigma", "x")


def test_a_prior_that_takes_the_value_of_another_latent():
    def model(x):
        a = pyro.sample("a", dist.Normal(ZERO, 1.0))
        b = pyro.sample("b", dist.Normal(a.item(), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    with pytest.raises(UserError, match='latent "a" changes the density of site "b"'):
        build(model, x=X)


def test_a_part_of_the_model_may_cut_a_latent_off():
    """A cut model: the gradient of one likelihood is enough."""

    def model(x):
        a = pyro.sample("a", dist.Normal(ZERO, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)
            pyro.sample("z", dist.Normal(a.detach(), 2.0), obs=x)

    build(model, x=X)


def test_what_a_handler_makes_of_a_model_is_followed():
    build(poutine.condition(with_scale(lambda s: s.item()), {"sigma": torch.tensor(2.0, dtype=F64)}), x=X)
