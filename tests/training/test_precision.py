"""The type follows the model: what is float32 of its own computes in float32, whatever the table's size."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from trainer import UserError, fit
from trainer.training.first_rows import MOST
from trainer.training.precision import in_its_precision

RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, 2))
TABLE = {"x": X, "group": np.arange(300) % 4, "y": X @ [1.0, -1.0] + 0.5 * RNG.normal(size=300)}
DESIGN = torch.tensor(RNG.normal(size=(4, 2)), dtype=torch.float32)
WIDE = torch.tensor(RNG.normal(size=(4, 2)))
FROZEN = nn.Linear(2, 1)
OPTIONS = {"program": "eager", "slots": 16}


def plain(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def with_matrix(x, group, y=None, matrix=DESIGN):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1) + (matrix @ w)[group], 0.5), obs=y)


def promoted(x, group, y=None):
    """Element by element a float32 constant is taken as it is."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1) + DESIGN[group, 0], 0.5), obs=y)


def with_frozen_net(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with torch.no_grad():
        offset = FROZEN(x).squeeze(-1)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + offset, 0.5), obs=y)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 1)

    def model(self, x, y=None):
        pyro.module("decoder", self.decoder)
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.decoder(x).squeeze(-1) + level, 0.5), obs=y)


def both(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x @ w) + (DESIGN @ WIDE.mT).sum(), 0.5), obs=y)


def fitted(model, capsys, **more):
    posterior = fit(model, TABLE, max_steps=8, options=OPTIONS, **more)
    return posterior, [line for line in capsys.readouterr().out.splitlines() if line.startswith("computing in")]


@pytest.mark.parametrize(
    ("model", "dtype", "told"),
    [
        (plain, torch.float64, []),
        (promoted, torch.float64, []),
        (with_matrix, torch.float32, ["computing in float32: the model holds a tensor of that type"]),
        (with_frozen_net, torch.float32, ["computing in float32: the model holds a tensor of that type"]),
        (Net().model, torch.float32, ['computing in float32: module "decoder" holds float32 parameters']),
    ],
    ids=["nothing of its own", "promoted", "a matrix", "a frozen net", "a module"],
)
def test_the_type_is_the_models_and_the_log_says_why(model, dtype, told, capsys):
    posterior, lines = fitted(model, capsys)
    assert posterior.theta.dtype == dtype
    assert [line[: len(wanted)] for line, wanted in zip(lines, told, strict=True)] == told
    assert np.isfinite(posterior.predict({name: TABLE[name][:3] for name in ("x", "group")})["y"].mean).all()
    assert torch.get_default_dtype() == torch.float32


def test_a_start_in_float32_finds_the_mode_of_float64(capsys):
    """A conjugate problem: mean and mean-field sds in closed form."""
    posterior, _ = fitted(with_matrix, capsys)
    design = X + DESIGN.numpy()[TABLE["group"]].astype(float)
    precision = design.T @ design / 0.25 + np.eye(2)
    mean = np.linalg.solve(precision, design.T @ TABLE["y"] / 0.25)
    (w,) = posterior.summary()
    np.testing.assert_allclose(w.mean, mean, atol=0.05 * w.sd.min())
    np.testing.assert_allclose(w.loc, w.mean)
    np.testing.assert_allclose(w.scale, np.diag(precision) ** -0.5, rtol=0.05)


def test_dtype_is_the_users_word(capsys):
    assert fitted(plain, capsys, dtype="float32")[0].theta.dtype == torch.float32
    with pytest.raises(UserError, match=r"dtype=float64 cannot be.*leave dtype= out"):
        fit(Net().model, TABLE, max_steps=8, options=OPTIONS, dtype="float64", progress=False)
    with pytest.raises(UserError, match="dtype=float16 must be float32 or float64"):
        fit(plain, TABLE, max_steps=8, options=OPTIONS, dtype="float16", progress=False)
    with pytest.raises(UserError, match="neither in float64 nor in float32"):
        fit(both, TABLE, max_steps=8, options=OPTIONS, progress=False)


def test_other_errors_and_refusals_are_not_tried_again():
    tried = []

    def fails(error):
        def infer():
            tried.append(torch.get_default_dtype())
            raise error

        return infer

    before = torch.get_default_dtype()
    try:
        for rows, error in ((10, UserError("not exchangeable")), (MOST + 1, RuntimeError("shapes"))):
            with pytest.raises(type(error)):
                in_its_precision(None, rows, fails(error), print)
    finally:
        torch.set_default_dtype(before)
    assert tried == [torch.float64, torch.float32]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    "made", [torch.jit.script, lambda net: torch.jit.trace(net, torch.zeros(2, 2))], ids=["script", "trace"]
)
def test_a_torchscript_module_of_float32_computes_in_float32(made):
    net = made(nn.Linear(2, 1).requires_grad_(False))

    def model(x, y=None):
        seen.append(x.dtype)
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1) + b, 0.5), obs=y)

    def wrong(x, y=None):
        return model(x[:, :1], y)

    seen: list[torch.dtype] = []
    fit(model, {name: TABLE[name] for name in ("x", "y")}, max_steps=3, progress=False, options=OPTIONS)
    assert seen[-1] == torch.float32
    with pytest.raises(RuntimeError, match="TorchScript"):  # of another cause: not said to be one of types
        fit(wrong, {name: TABLE[name] for name in ("x", "y")}, max_steps=3, progress=False, options=OPTIONS)
