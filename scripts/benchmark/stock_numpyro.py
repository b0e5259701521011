"""NumPyro: one jitted step a call, and its best case, `lax.scan` over chunks that lie on the device already.

Shapes: K steps of a chunk, B rows of a batch.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from scripts.benchmark.problems import MODELS, Setting, load

_SITES = ("weight", "intercept", "mean", "scale", "sigma", "deviation")  # in the order of the models
_STEPS = 64  # between two looks at the clock


def logistic(num_obs: int, x: Any, y: Any) -> None:
    weight = numpyro.sample("weight", dist.Normal(jnp.zeros(x.shape[-1]), 1.0).to_event(1))
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 10.0))
    with numpyro.plate("data", num_obs, subsample_size=len(x)):
        numpyro.sample("y", dist.Bernoulli(logits=intercept + x @ weight), obs=y)


def hierarchical(groups: int, num_obs: int, x: Any, group: Any, y: Any) -> None:
    size = x.shape[-1] + 1
    mean = numpyro.sample("mean", dist.Normal(jnp.zeros(size), 10.0).to_event(1))
    scale = numpyro.sample("scale", dist.HalfNormal(jnp.full(size, 2.0)).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10.0))
    with numpyro.plate("groups", groups):
        effect = mean + scale * numpyro.sample("deviation", dist.Normal(jnp.zeros(size), 1.0).to_event(1))
    with numpyro.plate("data", num_obs, subsample_size=len(x)):
        own = effect[group]
        numpyro.sample("y", dist.Normal(own[:, 0] + (x * own[:, 1:]).sum(-1), sigma), obs=y)


def network(d: int, h: int, num_obs: int, x: Any, y: Any) -> None:
    weight_1 = numpyro.sample("weight_1", dist.Normal(jnp.zeros((d, h)), d**-0.5).to_event(2))
    bias_1 = numpyro.sample("bias_1", dist.Normal(jnp.zeros(h), 1.0).to_event(1))
    weight_2 = numpyro.sample("weight_2", dist.Normal(jnp.zeros((h, h)), h**-0.5).to_event(2))
    bias_2 = numpyro.sample("bias_2", dist.Normal(jnp.zeros(h), 1.0).to_event(1))
    weight_3 = numpyro.sample("weight_3", dist.Normal(jnp.zeros(h), h**-0.5).to_event(1))
    with numpyro.plate("data", num_obs, subsample_size=len(x)):
        logits = jnp.tanh(jnp.tanh(x @ weight_1 + bias_1) @ weight_2 + bias_2) @ weight_3
        numpyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def model_of(setting: Setting) -> Callable[..., None]:
    """The model as a function of a batch's columns, over N rows."""
    zoo = MODELS[setting.model]
    if setting.model == "logistic":
        return partial(logistic, setting.num_obs)
    if setting.model == "network":
        return partial(network, zoo.features, zoo.width, setting.num_obs)
    return partial(hierarchical, zoo.groups, setting.num_obs)


class NumPyro:
    """``scan``: K steps a call. Neither form draws its rows: they come in order, from memory on the device."""

    def __init__(self, setting: Setting, scan: bool):
        device = jax.devices("gpu" if setting.device == "cuda" else "cpu")[0]
        self.setting, self.scan = setting, scan
        self.per_call = setting.slots if scan else 1
        columns = [column.astype(np.int32) if column.dtype == np.int64 else column for column in load(setting).values()]
        rows = self.per_call * setting.batch
        shape = (setting.slots, setting.batch) if scan else (setting.batch,)
        self.chunks = [
            [jax.device_put(c[i : i + rows].reshape(*shape, *c.shape[1:]), device) for c in columns]
            for i in range(0, setting.stored_rows - rows + 1, rows)
        ]
        self.first = [column[: setting.batch] for column in columns]
        jax.block_until_ready(self.chunks)

    def start(self) -> None:
        model = model_of(self.setting)
        self.svi = svi = SVI(model, AutoNormal(model), numpyro.optim.Adam(self.setting.rate), Trace_ELBO())
        if self.scan:
            self.run = jax.jit(
                lambda state, *columns: jax.lax.scan(lambda s, batch: svi.update(s, *batch), state, columns)
            )
        else:
            self.run = jax.jit(svi.update)
        self.reset(self.setting.seed)
        for _ in range(2):  # jax compiles again for the state that comes out of the first call
            self.advance()

    def reset(self, seed: int) -> None:
        self.state = self.svi.init(jax.random.PRNGKey(seed), *self.first)
        self.order = itertools.cycle(self.chunks)

    def advance(self) -> tuple[int, int]:
        """A few calls: (steps, rows)."""
        calls = 1 if self.scan else _STEPS
        for _ in range(calls):
            self.state, losses = self.run(self.state, *next(self.order))
        jax.block_until_ready((self.state, losses))
        return calls * self.per_call, calls * self.per_call * self.setting.batch

    def means(self) -> np.ndarray:
        """The guide's locations [D] in the order of the sites."""
        params = self.svi.get_params(self.state)
        sites = [name for name in _SITES if f"{name}_auto_loc" in params]
        return np.concatenate([np.ravel(params[f"{site}_auto_loc"]) for site in sites]).astype(float)

    def gpu_bytes(self) -> int:
        statistics = jax.devices()[0].memory_stats() or {}
        return int(statistics.get("peak_bytes_in_use", 0)) if self.setting.device == "cuda" else 0
