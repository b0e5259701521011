"""Stock Pyro: `SVI.step` over data in memory, its plate drawing the rows or being given them, traced or not.

Shapes: N rows of the problem, M stored, B of a batch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import torch
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from scripts.benchmark.problems import MODELS, Setting, load


class Rows:
    """The data plate as a tutorial writes it; with indices, as one who knows what they cost writes it."""

    def __init__(self, setting: Setting):
        self.num_obs, self.batch, self.stored = setting.num_obs, setting.batch, setting.stored_rows

    def plate(self, given: Tensor | None) -> Any:
        if given is None:
            return pyro.plate("data", self.num_obs, subsample_size=self.batch)
        return pyro.plate("data", self.num_obs, subsample=given)

    def __call__(self, index: Tensor, *columns: Tensor) -> list[Tensor]:
        """The rows ``index`` of each of ``columns`` [M, ...], which repeat up to N."""
        if self.num_obs > self.stored:
            index = index % self.stored
        return [column[index] for column in columns]


def logistic(rows: Rows, given: Tensor | None, x: Tensor, y: Tensor) -> None:
    weight = pyro.sample("weight", dist.Normal(x.new_zeros(x.shape[-1]), 1.0).to_event(1))
    intercept = pyro.sample("intercept", dist.Normal(x.new_zeros(()), 10.0))
    with rows.plate(given) as index:
        x, y = rows(index, x, y)
        pyro.sample("y", dist.Bernoulli(logits=intercept + x @ weight), obs=y)


def hierarchical(groups: int, rows: Rows, given: Tensor | None, x: Tensor, group: Tensor, y: Tensor) -> None:
    size = x.shape[-1] + 1
    mean = pyro.sample("mean", dist.Normal(x.new_zeros(size), 10.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(x.new_full((size,), 2.0)).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(x.new_tensor(10.0)))
    with pyro.plate("groups", groups):
        effect = mean + scale * pyro.sample("deviation", dist.Normal(x.new_zeros(size), 1.0).to_event(1))
    with rows.plate(given) as index:
        x, group, y = rows(index, x, group, y)
        own = effect[group]
        pyro.sample("y", dist.Normal(own[:, 0] + (x * own[:, 1:]).sum(-1), sigma), obs=y)


def network(d: int, h: int, rows: Rows, given: Tensor | None, x: Tensor, y: Tensor) -> None:
    weight_1 = pyro.sample("weight_1", dist.Normal(x.new_zeros(d, h), d**-0.5).to_event(2))
    bias_1 = pyro.sample("bias_1", dist.Normal(x.new_zeros(h), 1.0).to_event(1))
    weight_2 = pyro.sample("weight_2", dist.Normal(x.new_zeros(h, h), h**-0.5).to_event(2))
    bias_2 = pyro.sample("bias_2", dist.Normal(x.new_zeros(h), 1.0).to_event(1))
    weight_3 = pyro.sample("weight_3", dist.Normal(x.new_zeros(h), h**-0.5).to_event(1))
    with rows.plate(given) as index:
        x, y = rows(index, x, y)
        logits = torch.tanh(torch.tanh(x @ weight_1 + bias_1) @ weight_2 + bias_2) @ weight_3
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def model_of(setting: Setting) -> Callable[..., None]:
    """The model as a function of (indices or None, columns)."""
    zoo = MODELS[setting.model]
    if setting.model == "logistic":
        return partial(logistic, Rows(setting))
    if setting.model == "network":
        return partial(network, zoo.features, zoo.width, Rows(setting))
    return partial(hierarchical, zoo.groups, Rows(setting))


class StockPyro:
    """``given``: the indices are drawn outside, by `torch.randint`. Validation is on, as Pyro has it, only where the
    tutorial's form is measured.
    """

    def __init__(self, setting: Setting, given: bool = False, jit: bool = False):
        torch.set_num_threads(setting.threads)
        self.setting, self.given = setting, given
        pyro.enable_validation(not given)
        self.columns = [torch.from_numpy(column).to(setting.device) for column in load(setting).values()]
        self.elbo = JitTrace_ELBO(ignore_jit_warnings=True) if jit else Trace_ELBO()

    def start(self) -> None:
        self.reset(self.setting.seed)
        self.advance()

    def reset(self, seed: int) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        model, optim = model_of(self.setting), cast(Any, pyro.optim)
        self.guide = AutoNormal(model)
        self.svi = SVI(model, self.guide, optim.Adam({"lr": self.setting.rate}), self.elbo)

    def advance(self) -> tuple[int, int]:
        """One step: (steps, rows)."""
        batch, given = self.setting.batch, None
        if self.given:
            given = torch.randint(self.setting.stored_rows, (batch,), device=self.columns[0].device)
        self.svi.step(given, *self.columns)
        return 1, batch

    def means(self) -> np.ndarray:
        """The guide's locations [D] in the order of the sites."""
        locs = [loc.detach().flatten() for loc in self.guide.locs.parameters()]
        return torch.cat(locs).cpu().double().numpy()

    def gpu_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if self.setting.device == "cuda" else 0


class Copy:
    """No inference at all: a straight copy of the columns in memory, the bandwidth that others are measured by."""

    piece = 1 << 16  # rows

    def __init__(self, setting: Setting):
        torch.set_num_threads(setting.threads)
        self.setting = setting
        self.source = [torch.from_numpy(column).to(setting.device) for column in load(setting).values()]
        self.target = [torch.empty_like(column) for column in self.source]

    def start(self) -> None:
        self.advance()

    def advance(self) -> tuple[int, int]:
        """One pass: (steps, rows), a batch counting as a step."""
        rows = self.setting.stored_rows
        for first in range(0, rows, self.piece):
            for source, target in zip(self.source, self.target):
                target[first : first + self.piece].copy_(source[first : first + self.piece])
        if self.setting.device == "cuda":
            torch.cuda.synchronize()
        return max(1, rows // self.setting.batch), rows

    def gpu_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if self.setting.device == "cuda" else 0
