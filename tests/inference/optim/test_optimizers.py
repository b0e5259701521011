"""Each optimizer against the published one: 50 steps in float64, and the same with the loss divided by N."""

import pytest
import torch
from pyro.optim.clipped_adam import ClippedAdam as PyroClippedAdam

from trainer.inference.optim.optimizers import SGD, Adam, ClippedAdam

F64 = torch.float64
TABLE = {
    "adam": (Adam(), torch.optim.Adam, {}),
    "adam, eps": (Adam(beta1=0.8, beta2=0.95, eps=0.1), torch.optim.Adam, {"betas": (0.8, 0.95), "eps": 0.1}),
    "adam, weight decay": (Adam(weight_decay=0.1), torch.optim.Adam, {"weight_decay": 0.1}),
    "adamw": (Adam(weight_decay=0.1, decoupled=True), torch.optim.AdamW, {"weight_decay": 0.1}),
    "clipped adam": (ClippedAdam(clip=0.7, eps=0.01), PyroClippedAdam, {"clip_norm": 0.7, "eps": 0.01}),
    "sgd": (SGD(lr=0.01), torch.optim.SGD, {}),
    "sgd, momentum": (SGD(lr=0.01, momentum=0.9), torch.optim.SGD, {"momentum": 0.9}),
}


def gradients() -> torch.Tensor:
    """[50, 6], of very different sizes; the last element's are all zero but one."""
    sizes = torch.tensor([1e-9, 1e-3, 1, 10, 1e5, 0])
    g = torch.randn(50, 6, dtype=F64, generator=torch.Generator().manual_seed(0)) * sizes
    g[20, -1] = 1.0
    return g


@pytest.mark.parametrize("name", TABLE)
def test_fifty_steps_equal_the_published_optimizer(name):
    ours, theirs, options = TABLE[name]
    start = torch.linspace(-1, 2, 6, dtype=F64)
    parameter = torch.nn.Parameter(start.clone())
    oracle = theirs([parameter], lr=ours.lr, **options)
    theta, moments = start.clone(), ours.init(start)
    for k, g in enumerate(gradients()):
        parameter.grad = g.clone()
        oracle.step()
        rates = ours.rates(torch.tensor(ours.lr, dtype=F64), torch.tensor(k + 1), 1.0)
        theta, moments = ours.update(g, moments, theta, rates)
        torch.testing.assert_close(theta, parameter.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["adam", "adam, eps", "adamw", "clipped adam"])
def test_dividing_the_loss_by_n_changes_no_update_of_adam(name):
    """The gradient of loss / N with eps / N: the same path as the full-data loss, at any N."""
    ours, n = TABLE[name][0], 1e9
    paths = []
    for num_obs in (1.0, n):
        theta = torch.linspace(-1, 2, 6, dtype=F64)
        moments = ours.init(theta)
        for k, g in enumerate(gradients()):
            rates = ours.rates(torch.tensor(ours.lr, dtype=F64), torch.tensor(k + 1), num_obs)
            theta, moments = ours.update(g / num_obs, moments, theta, rates)
        paths.append(theta)
    torch.testing.assert_close(paths[0], paths[1], rtol=1e-9, atol=1e-9)


def test_a_latent_known_from_its_prior_alone_moves_at_a_billion_rows():
    """In float32, gradient 1/N: with Adam's eps unscaled it would stay near zero."""
    adam, n = Adam(lr=0.01), 1e9
    theta = torch.zeros(1)
    moments = adam.init(theta)
    for k in range(600):
        rates = adam.rates(torch.tensor(0.01, dtype=F64), torch.tensor(k + 1), n)
        theta, moments = adam.update((theta - 1.0) / n, moments, theta, rates)
    assert theta.dtype == torch.float32
    assert abs(float(theta) - 1.0) < 0.01
