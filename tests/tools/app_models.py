"""Models as users write them, for the tests of the command."""

import os
import signal

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample

from trainer.models.linear import LinearRegression

_calls = 0


def linear(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, sigma), obs=y)


def with_token(x, y=None, token=""):
    """`linear`, whose config holds a secret."""
    linear(x, y)


def dying(x, y=None, at=-1, number=int(signal.SIGKILL), rank=0):
    """`linear`, whose process gets signal ``number`` in its call ``at`` on ``rank``, the first time it is launched."""
    global _calls
    _calls += 1
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if _calls == at and int(os.environ.get("LOCAL_RANK", "0")) == rank and not again:
        os.kill(os.getpid(), number)
    linear(x, y)


def exploding(x, y=None, at=40):
    global _calls
    _calls += 1
    linear(x if _calls < at else x * float("nan"), y)


def breaking(x, y=None, bad=0.0, at=40):
    """`linear`, which from call ``at`` on is not a number where x[0] is ``bad``."""
    global _calls
    _calls += 1
    found = (x[:, :1] - bad).abs() < 1e-6
    linear(torch.where(found, float("nan"), x) if _calls >= at else x, y)


class Regression(PyroModule):
    """Pyro's Bayesian regression tutorial (Introduction to Bayesian regression, part I), as it stands."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](in_features, out_features)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([out_features, in_features]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([out_features]).to_event(1))

    def forward(self, x, y=None):
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean


def with_arguments(x, y=None, prior_sd=1.0):
    w = pyro.sample("w", dist.Normal(0.0, prior_sd).expand([x.shape[-1]]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def with_parameter(x, y=None):
    bias = pyro.param("bias", lambda: torch.zeros(()))
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + bias, 1.0), obs=y)


def own_guide(x, y=None):
    loc = pyro.param("w_loc", lambda: torch.zeros(x.shape[-1]))
    scale = pyro.param("w_scale", lambda: torch.full((x.shape[-1],), 0.1), constraint=dist.constraints.positive)
    pyro.sample("w", dist.Normal(loc, scale).to_event(1))


class VAE(torch.nn.Module):
    """A small variational autoencoder in the shape of Pyro's tutorial: methods `model` and `guide` of one module."""

    def __init__(self, width: int = 3, z_dim: int = 2):
        super().__init__()
        self.z_dim = z_dim
        self.encoder = torch.nn.Linear(width, 2 * z_dim)
        self.decoder = torch.nn.Linear(z_dim, width)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(x.shape[0], self.z_dim), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.encoder(x).chunk(2, dim=-1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))


def outside_plate(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x.sum(-1) * w, 1.0).to_event(1), obs=y)


def half_outside(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("total", dist.Normal(w, 1.0), obs=y.sum())
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)


def local_latent(x, y=None):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def effects(x, y=None):
    """`linear`, with an effect and a class of each row."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        u = pyro.sample("u", dist.Normal(0.0, tau))
        pyro.sample("y", dist.Normal(x @ w + u + 4 * k, 0.5), obs=y)


def endless(x, y=None):
    k = pyro.sample("k", dist.Poisson(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(k, 1.0), obs=y)


def centring(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x - x.mean(0)).sum(-1) * w, 1.0), obs=y - y.mean())


def needs_more(x, weather, y=None):
    linear(x, y)


def luck(x, y=None, prior_sd=1.0):
    """`with_arguments`; with a prior above 2 it fails, with one above 1 it comes to nothing finite."""
    if prior_sd > 2:
        raise RuntimeError("no luck")
    if prior_sd > 1:
        return exploding(x, y)
    return with_arguments(x, y, prior_sd)


class Dying(LinearRegression):
    """The linear model, which gets signal ``number`` where row ``at`` would be made."""

    def __init__(self, number: int, at: int):
        super().__init__()
        self.number, self.at = number, at

    def rows(self, truth, generator, first, count):
        if first <= self.at < first + count:
            os.kill(os.getpid(), self.number)
        return super().rows(truth, generator, first, count)


def products(x, y=None):
    """`linear` with products as weights: 0 is a saddle."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ (a * b), 0.5), obs=y)
