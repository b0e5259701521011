"""The block guide: exact where the posterior factorizes over sites, else the nearest that does."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from svi_problems import F64, build, grad, noise_of, one_group, regression_data

from trainer.errors import UserError
from trainer.inference.guides.block import Block
from trainer.inference.recipe.laplace import laplace_start

DATA = regression_data(orthogonal=False)


def two_sites(x, y):
    """Correlated within `a` and within `b`; the columns of one are orthogonal to those of the other."""
    a = pyro.sample("a", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
    b = pyro.sample("b", dist.Normal(a.sum(), 1.5).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x[:, :3] @ a + x[:, 3:] @ (b - a.sum()), 0.5), obs=y)


def apart():
    """Two blocks of columns, orthogonal to each other alone."""
    root = torch.linalg.qr(torch.randn(12, 5, dtype=F64, generator=torch.Generator().manual_seed(0)))[0]
    mixed = torch.block_diag(torch.randn(3, 3, dtype=F64), torch.tensor([[1.0, 0.9], [0.0, 0.5]], dtype=F64))
    return {"x": 3.0 * root @ mixed, "y": torch.linspace(-1, 2, 12, dtype=F64)}


def plain(x, y):
    a = pyro.sample("a", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
    b = pyro.sample("b", dist.Normal(x.new_zeros(2), 1.5).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ torch.cat([a, b]), 0.5), obs=y)


def test_a_posterior_that_factorizes_over_sites_is_met_exactly():
    data = apart()
    inference, theta = build(plain, Block, kl="sticking_the_landing", **data)
    theta = laplace_start(inference, theta, one_group(**data))[0]
    prior = torch.tensor([2.0, 2.0, 2.0, 1.5, 1.5], dtype=F64)
    precision = data["x"].T @ data["x"] / 0.25 + (prior**-2).diag()
    root = inference.gaussian.root(theta)
    torch.testing.assert_close(root @ root.T, torch.linalg.inv(precision), rtol=1e-9, atol=1e-12)
    assert (root @ root.T)[0, 1].abs() > 1e-3
    for seed in range(3):
        noise = noise_of(torch.randn(1, 1, 5, dtype=F64, generator=torch.Generator().manual_seed(seed)))
        assert float(grad(inference, theta, noise, one_group(**data)).abs().max()) < 1e-6


def test_else_the_precision_of_each_site_is_the_posteriors():
    data = regression_data(rows=12, width=5, orthogonal=False)
    inference, theta = build(plain, Block, **data)
    theta = laplace_start(inference, theta, one_group(**data))[0]
    precision = (
        data["x"].T @ data["x"] / 0.25 + torch.tensor([0.5, 0.5, 0.5, 1 / 1.5, 1 / 1.5], dtype=F64).square().diag()
    )
    root = inference.gaussian.root(theta)
    found = root @ root.T
    torch.testing.assert_close(found[:3, :3], torch.linalg.inv(precision[:3, :3]))
    torch.testing.assert_close(found[3:, 3:], torch.linalg.inv(precision[3:, 3:]))
    assert not found[:3, 3:].any()


def test_priors_that_depend_on_other_sites_are_exact_too():
    """They are independent under the guide: by sigma points, as for the full-rank guide."""
    data, made = apart(), {}
    for kl in ("analytic", "monte_carlo"):
        inference, theta = build(two_sites, Block, kl=kl, **data)
        theta = theta + 0.3 * torch.randn(len(theta), dtype=F64, generator=torch.Generator().manual_seed(0))
        points = torch.cat([torch.eye(5, dtype=F64), -torch.eye(5, dtype=F64)]) * 5**0.5
        terms = [inference.terms(theta, noise_of(each[None, None]), one_group(**data), 1.0).sum() for each in points]
        made[kl] = float(torch.stack(terms).mean())
    assert inference.guide.alone == {"a", "b"}
    assert made["analytic"] == pytest.approx(made["monte_carlo"], abs=1e-9)


def test_more_latents_than_it_holds_are_refused_before_training():
    def many(y):
        pyro.sample("w", dist.Normal(y.new_zeros(1001), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    with pytest.raises(UserError, match=r"guide=block holds up to 1,000 latents .* has 1,001: take guide=mean_field"):
        build(many, Block, y=DATA["y"])
