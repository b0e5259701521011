"""Time series, a Gaussian process and a mixture of posteriordb. A series is one exchangeable unit, so it is one row.

The recursions of ARMA and GARCH are linear in their own past, so they are sums with powers of a coefficient.
Shapes: B series (1 here), T times.
"""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from scripts.references.case import Rows, posteriordb

_LOG2 = math.log(2)


def _real(y: Tensor, scale: float) -> Any:
    return dist.Normal(y.new_zeros(()), scale)


def _past(x: Tensor, coefficient: Tensor) -> Tensor:
    """s_t = x_t + coefficient s_{t-1} for every t; x [B, T]."""
    times = torch.arange(x.shape[-1], dtype=x.dtype)
    lag = times[:, None] - times
    powers = torch.where(lag >= 0, coefficient ** lag.clamp(min=0), 0.0)
    return x @ powers.T


def ark(y: Tensor, lagged: Tensor) -> None:
    """lagged [B, T, 5]."""
    alpha = pyro.sample("alpha", _real(y, 10.0))
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(5), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(alpha + lagged @ beta, sigma).to_event(1), obs=y)


def arma11(y: Tensor) -> None:
    mu, phi = pyro.sample("mu", _real(y, 10.0)), pyro.sample("phi", _real(y, 2.0))
    theta, sigma = pyro.sample("theta", _real(y, 2.0)), pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    mean = mu + phi * torch.cat([mu.expand(len(y), 1), y[:, :-1]], -1)
    error = _past(y - mean, -theta)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(y - error, sigma).to_event(1), obs=y)


def garch11(y: Tensor, first: Tensor) -> None:
    """first [B]: the standard deviation at the first time."""
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    alpha0 = pyro.sample("alpha0", dist.ImproperUniform(constraints.positive, (), ()))
    alpha1 = pyro.sample("alpha1", dist.ImproperUniform(constraints.unit_interval, (), ()))
    beta1 = pyro.sample("beta1", dist.ImproperUniform(constraints.interval(0.0, 1 - alpha1), (), ()))
    shocks = alpha0 + alpha1 * (y[:, :-1] - mu) ** 2
    variance = _past(torch.cat([first[:, None] ** 2, shocks], -1), beta1)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, variance.sqrt()).to_event(1), obs=y)


def gaussian_process(x: Tensor, y: Tensor) -> None:
    rho = pyro.sample("rho", dist.Gamma(x.new_tensor(25.0), 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(x.new_tensor(2.0)))
    sigma = pyro.sample("sigma", dist.HalfNormal(x.new_tensor(1.0)))
    distance = x[:, :, None] - x[:, None, :]
    covariance = alpha**2 * torch.exp(-0.5 * (distance / rho) ** 2) + sigma * torch.eye(x.shape[-1], dtype=x.dtype)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), covariance), obs=y)


def mixture(y: Tensor) -> None:
    """The prior of the ordered means is that of two normals, restricted: a factor beside a flat one."""
    mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.ordered_vector, (), (2,)))
    pyro.factor("mu_prior", dist.Normal(0.0, y.new_tensor(2.0)).log_prob(mu).sum())
    sigma = pyro.sample("sigma", dist.HalfNormal(y.new_tensor([2.0, 2.0])).to_event(1))
    theta = pyro.sample("theta", dist.Beta(y.new_tensor(5.0), 5.0))
    logits = torch.stack([theta.log(), (-theta).log1p()])
    with pyro.plate("data", len(y)):
        parts = dist.Normal(mu, sigma)
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(logits=logits), parts), obs=y)


def _series(d: dict[str, Any]) -> Rows:
    return {"y": np.asarray(d["y"], dtype=np.float64)[None]}


def _lagged(d: dict[str, Any]) -> Rows:
    y, order = np.asarray(d["y"], dtype=np.float64), int(d["K"])
    lagged = np.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], -1)
    return {"y": y[None, order:], "lagged": lagged[None]}


def _with_first(d: dict[str, Any]) -> Rows:
    return {**_series(d), "first": np.array([d["sigma1"]], dtype=np.float64)}


def _curve(d: dict[str, Any]) -> Rows:
    return {name: np.asarray(d[name], dtype=np.float64)[None] for name in ("x", "y")}


CASES = (
    posteriordb("arK", "posteriordb/arK-arK", ark, _lagged, _LOG2),
    posteriordb("arma11", "posteriordb/arma-arma11", arma11, _series, _LOG2),
    posteriordb("garch11", "posteriordb/garch-garch11", garch11, _with_first),
    posteriordb("gp_regr", "posteriordb/gp_pois_regr-gp_regr", gaussian_process, _curve, 2 * _LOG2),
    posteriordb(
        "gauss mix",
        "posteriordb/low_dim_gauss_mix-low_dim_gauss_mix",
        mixture,
        lambda d: {"y": np.asarray(d["y"], dtype=np.float64)},
        2 * _LOG2,
        options={"global_sites": ["mu_prior"]},
    ),
)
