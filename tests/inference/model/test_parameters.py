"""Where trainable numbers may live, and that each is found, constrained, swapped, trained, and left alone otherwise."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from svi_problems import F64, build, grad, noise_of, one_group
from torch import nn

from trainer.errors import UserError
from trainer.inference.guides.mean_field import MeanField
from trainer.inference.guides.pyro_guides import PyroGuide
from trainer.inference.model.plates import Batch
from trainer.inference.optim.optimizers import Adam
from trainer.inference.optim.rounds import one_round
from trainer.inference.optim.schedules import Cosine
from trainer.inference.programs.program import Eager

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(60, 2, dtype=F64, generator=GENERATOR)
Y = X @ torch.tensor([1.0, -2.0], dtype=F64) + 0.5 + 0.3 * torch.randn(60, dtype=F64, generator=GENERATOR)
WEIGHT, BIAS = (torch.linalg.lstsq(torch.cat([X, torch.ones(60, 1, dtype=F64)], 1), Y).solution[i] for i in ([0, 1], 2))
SPREAD = float((Y - X @ WEIGHT - BIAS).square().mean().sqrt())
POSITIVE = constraints.positive


def body(mean, spread, y):
    pyro.sample("idle", dist.Normal(mean.new_zeros(()), 1.0))  # a guide needs a latent
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, spread), obs=y)


def by_param(x, y):
    w = pyro.param("weight", lambda: torch.zeros(2, dtype=F64))
    b = pyro.param("bias", torch.zeros((), dtype=F64))
    body(x @ w + b, pyro.param("spread", torch.ones((), dtype=F64), constraint=POSITIVE), y)
    assert pyro.param("bias") is not None  # asked for again by name alone


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1, dtype=F64)
        self.log_spread = nn.Parameter(torch.zeros((), dtype=F64))
        self.frozen = nn.Parameter(torch.full((), 0.0, dtype=F64), requires_grad=False)

    def forward(self, x, y):
        body(self.linear(x)[:, 0] + self.frozen, self.log_spread.exp(), y)


class Pyronic(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1, dtype=F64)
        self.spread = PyroParam(torch.ones((), dtype=F64), POSITIVE)
        self.frozen = nn.Parameter(torch.full((), 0.0, dtype=F64), requires_grad=False)
        self.free = nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, x, y):
        body(self.linear(x)[:, 0] + self.frozen + self.free, self.spread, y)


class Nested(PyroModule):
    def __init__(self):
        super().__init__()
        self.inner = PyroModule[nn.Linear](2, 1, dtype=F64)
        self.spread = PyroParam(torch.ones((), dtype=F64), POSITIVE)

    def forward(self, x, y):
        body(self.inner(x)[:, 0], self.spread, y)


class Bound:
    """Not a module: what it registers is found, and its method is the model."""

    def __init__(self):
        self.linear = nn.Linear(2, 1, dtype=F64)

    def model(self, x, y):
        pyro.module("linear", self.linear)
        body(self.linear(x)[:, 0], pyro.param("spread", torch.ones((), dtype=F64), constraint=POSITIVE), y)


def given(net, x, y):
    pyro.module("net", net)
    body(net(x)[:, 0], pyro.param("spread", torch.ones((), dtype=F64), constraint=POSITIVE), y)


MODELS = {
    "pyro.param": lambda: by_param,
    "nn.Module": Plain,
    "method of an nn.Module": lambda: Plain().forward,
    "PyroModule": Pyronic,
    "PyroModule in a PyroModule": Nested,
    "poutine around a PyroModule": lambda: poutine.scale(Pyronic(), scale=1.0),
    "pyro.module in a bound method": lambda: Bound().model,
    "partial with a module": lambda: functools.partial(given, nn.Linear(2, 1, dtype=F64)),
}


def fit(inference, theta, steps=250):
    update = one_round(Adam(lr=0.05), Cosine(), steps, steps)
    columns = {"x": X.expand(steps, 1, *X.shape), "y": Y.expand(steps, 1, *Y.shape)}
    chunk = Batch(columns, torch.full((steps, 1), 60), torch.full((steps,), 60), torch.arange(60).expand(steps, 1, 60))
    return Eager(inference, update, 0, [0]).run(update.init(theta), chunk, steps).state.theta


@pytest.mark.parametrize("name", MODELS)
def test_found_trained_and_constrained(name):
    """Least squares and its residual spread, which stays positive; what is frozen stays."""
    torch.manual_seed(0)
    model = MODELS[name]()
    before = {k: v.clone() for k, v in model.named_parameters()} if isinstance(model, nn.Module) else {}
    inference, theta = build(model, kl="analytic", x=X, y=Y)
    parameters = inference.parameters
    assert not any("frozen" in n for n in parameters.shapes)
    assert parameters.size == len(theta) == 2 + 4 + any("free" in n for n in parameters.shapes)
    values = parameters.constrain(parameters.unflatten(fit(inference, theta)))
    flat = {n.split(".")[-1]: v for n, v in values.items()}
    torch.testing.assert_close(flat["weight"].flatten(), WEIGHT, rtol=0, atol=0.02)
    torch.testing.assert_close(flat["bias"].sum() + flat.get("free", torch.zeros(())), BIAS, rtol=0, atol=0.02)
    spread = flat.get("spread", flat.get("spread_unconstrained", flat.get("log_spread")))
    assert float(spread if "spread" in flat else spread.exp()) == pytest.approx(SPREAD, abs=0.02)
    for key, value in before.items():
        assert torch.equal(dict(model.named_parameters())[key], value)  # the user's module is not written to


def test_a_step_gives_the_same_gradient_wherever_the_numbers_live():
    gradients = []
    for name in ("pyro.param", "nn.Module", "pyro.module in a bound method"):
        inference, theta = build(MODELS[name](), kl="analytic", x=X, y=Y)
        values = inference.parameters.unflatten(theta)
        for key, value in values.items():
            value.fill_({"weight": 0.3, "bias": 0.1}.get(key.split(".")[-1], 0.0))
        noise = noise_of(torch.zeros(1, 1, 1, dtype=F64))
        named = inference.parameters.unflatten(grad(inference, theta, noise, one_group(x=X, y=Y)))
        gradients.append(torch.cat([named[k].flatten() for k in sorted(named, key=lambda k: k.split(".")[-1])]))
    torch.testing.assert_close(gradients[0].sort().values, gradients[1].sort().values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[0].sort().values, gradients[2].sort().values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_models_run_under_an_autoguide(name):
    inference, theta = build(MODELS[name](), lambda model, _: PyroGuide(AutoNormal(model)), x=X, y=Y)
    assert inference.sites == ("idle", "y", "idle_unconstrained")
    noise = noise_of(torch.full((1, 1, 1), 0.5, dtype=F64))
    named = inference.parameters.unflatten(grad(inference, theta, noise, one_group(x=X, y=Y)))
    assert all(value.abs().sum() > 0 for value in named.values())


def test_priors_on_a_modules_weights_become_latents():
    class Bayes(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[nn.Linear](2, 1, dtype=F64)
            self.linear.weight = PyroSample(dist.Normal(torch.zeros(1, 2, dtype=F64), 1.0).to_event(2))

        def forward(self, x, y):
            mean = self.linear(x)[:, 0]
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(mean, 0.3), obs=y)

    inference, theta = build(Bayes(), kl="analytic", x=X, y=Y)
    assert inference.sites == ("linear.weight", "y")
    values = inference.parameters.unflatten(fit(inference, theta))
    torch.testing.assert_close(values["guide.loc"], WEIGHT, rtol=0, atol=0.03)
    assert [n for n in values if "bias" in n]


def test_flatten_and_unflatten_are_inverse_and_in_order():
    inference, theta = build(by_param, x=X, y=Y)
    parameters = inference.parameters
    assert parameters.size == len(theta) == 6
    assert torch.equal(parameters.flatten(parameters.unflatten(theta + 1)), theta + 1)
    assert list(parameters.shapes) == ["guide.loc", "guide.log_scale", "weight", "bias", "spread"]


def test_a_module_that_only_a_closure_holds_is_found():
    net = Pyronic()
    direct, _ = build(net, x=X, y=Y)

    def model(x, y):
        net(x, y)

    inference, _ = build(model, x=X, y=Y)
    shapes = [shape for name, shape in direct.parameters.shapes.items() if name.startswith("model")]
    assert [shape for name, shape in inference.parameters.shapes.items() if name[:6] != "guide."] == shapes


def test_a_module_that_is_made_anew_in_every_call_is_named():
    def model(x, y):
        Pyronic()(x, y)

    with pytest.raises(UserError, match=r"module of parameter .* could not be found"):
        build(model, x=X, y=Y)


def test_a_parameter_that_appears_late_is_named():
    made = []

    def guide(model, batch):
        made.append(MeanField(model, batch))
        return made[0]

    def model(x, y):
        body(x @ pyro.param("late" if made else "early", torch.zeros(2, dtype=F64)), 1.0, y)

    with pytest.raises(UserError, match='param\\("late"\\) appears only after the first batch'):
        build(model, guide, x=X, y=Y)


def test_nothing_is_left_behind_in_pyros_store_or_between_two_builds():
    thetas = []
    for _ in range(2):
        inference, theta = build(by_param, lambda model, _: PyroGuide(AutoNormal(model)), x=X, y=Y)
        thetas.append(theta)
        fit(inference, theta, 3)
    assert torch.equal(*thetas)
    assert not list(pyro.get_param_store().keys())


class Twice(nn.Module):
    """A module that is reached by three names, and a parameter that stands in two modules."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(2, 2, dtype=F64)
        self.again, self.tied = self.one, nn.Linear(2, 2, dtype=F64)
        self.tied.weight = self.one.weight

    def model(self, x, y):
        pyro.module("inner", self.one)
        body((self.tied(x) + self.again(x)).sum(-1), 1.0, y)


def test_a_module_holds_its_own_parameters_again_after_each_call():
    net = Twice()
    before = dict(net.named_parameters())
    inference, theta = build(net.model, x=X, y=Y)
    assert {name: value is before[name] for name, value in net.named_parameters()} == dict.fromkeys(before, True)
    assert net.tied.weight is net.one.weight is net.again.weight
    slope = grad(inference, theta, noise_of(torch.zeros(1, 1, 1, dtype=F64)), one_group(x=X, y=Y))
    by_name = inference.parameters.unflatten(slope)
    (bias,) = (value for name, value in by_name.items() if name.endswith("tied.bias"))
    (other,) = (value for name, value in by_name.items() if name.endswith("inner.bias"))
    assert torch.equal(bias, other)
    residual = Y - (net.tied(X) + net.again(X)).sum(-1).detach()
    torch.testing.assert_close(bias, residual.sum().expand(2), rtol=1e-12, atol=0)
