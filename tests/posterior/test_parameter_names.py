"""The model's own parameters have the names and values that its author wrote, whatever the guide."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from posterior_problems import F64, batch_of, build
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.distributions import constraints

from trainer.inference.setup import guide_factory, mean_field
from trainer.posterior.draws import parameters_of

COLUMNS = {
    "x": torch.randn(8, 2, dtype=F64, generator=torch.Generator().manual_seed(0)),
    "y": torch.zeros(8, dtype=F64),
}
VALUES = {"sigma": [2.0], "inner.bias": [0.25], "plain.weight": [3.0, -1.0]}


class Model(PyroModule):
    def __init__(self, has_latent):
        super().__init__()
        self.sigma = PyroParam(torch.tensor([2.0], dtype=F64), constraint=constraints.positive)
        self.inner = PyroModule[nn.Linear](2, 1)
        weight = torch.zeros(1, 2, dtype=F64)
        del self.inner.weight
        if has_latent:
            self.inner.weight = PyroSample(dist.Normal(weight, 1.0).to_event(2))
        else:
            self.inner.register_buffer("weight", weight)
        self.inner.bias = PyroParam(torch.tensor([0.25], dtype=F64), constraint=constraints.unit_interval)
        self.plain = nn.Linear(2, 1, bias=False)
        self.plain.weight = nn.Parameter(torch.tensor([[3.0, -1.0]], dtype=F64))

    def forward(self, x, y=None):
        mean = (self.inner(x) + self.plain(x))[:, 0]
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, self.sigma), obs=y)


@pytest.mark.parametrize("guide", [mean_field, guide_factory(AutoNormal, COLUMNS), None])
@pytest.mark.parametrize("nested", [False, True])
def test_parameters_have_the_names_and_values_of_the_model(guide, nested):
    model = Model(has_latent=guide is not None)
    called = (lambda x, y=None: model(x, y)) if nested else model
    inference, theta = build(called, COLUMNS, guide or mean_field, kl="monte_carlo")
    found = {
        name: value.flatten().tolist() for name, value in parameters_of(inference, theta, batch_of(COLUMNS)).items()
    }
    stem = "Model" if nested else "model"
    assert found == {f"{stem}.{name}": pytest.approx(value) for name, value in VALUES.items()}
