"""A mix by site: the nearest to a precision within the groups that the ways make, and names that there are not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from svi_problems import F64, build, noise_of, one_group, regression_data

from trainer import fit
from trainer.errors import UserError
from trainer.inference.guides.by_site import BySite
from trainer.inference.recipe.laplace import laplace_start

DATA = regression_data(rows=20, width=6, orthogonal=False)
SCALES = torch.tensor([1.5, 2.0, 2.0, 1.0, 1.0, 1.5], dtype=F64)


def four(x, y):
    """Sites a, b, c, d of 1, 2, 2 and 1 numbers."""
    a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.5))
    b = pyro.sample("b", dist.Normal(x.new_zeros(2), 2.0).to_event(1))
    c = pyro.sample("c", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    d = pyro.sample("d", dist.Normal(x.new_zeros(()), 1.5))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ torch.cat([a[None], b, c, d[None]]), 0.5), obs=y)


def mixed(**options):
    return lambda plated, batch: BySite(plated, batch, **options)


def test_each_site_is_held_in_its_way():
    """a and d together, b by itself, c apart: blocks of the posterior's precision, inverted."""
    guide = mixed(sites={"a": "full_rank", "d": "full_rank", "b": "block"})
    inference, theta = build(four, guide, **DATA)
    theta = laplace_start(inference, theta, one_group(**DATA))[0]
    precision = DATA["x"].T @ DATA["x"] / 0.25 + (SCALES**-2).diag()
    root = inference.gaussian.root(theta)
    want = torch.zeros(6, 6, dtype=F64)
    for group in ([0, 5], [1, 2], [3], [4]):
        index = torch.tensor(group)
        want[index[:, None], index] = torch.linalg.inv(precision[index[:, None], index])
    torch.testing.assert_close(root @ root.T, want)
    assert inference.guide.kind == "by site: c mean_field, b block, a full_rank, d full_rank"


def test_with_all_sites_together_it_is_the_posterior():
    inference, theta = build(four, mixed(others="full_rank"), kl="monte_carlo", **DATA)
    theta = laplace_start(inference, theta, one_group(**DATA))[0]
    draws = [torch.randn(1, 1, 6, dtype=F64, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    elbos = [float(inference.terms(theta, noise_of(each), one_group(**DATA), 1.0).sum()) for each in draws]
    assert max(elbos) - min(elbos) < 1e-6


def chain(y):
    a = pyro.sample("a", dist.Normal(y.new_zeros(()), 1.0))
    b = pyro.sample("b", dist.Normal(a, 0.5))
    c = pyro.sample("c", dist.Normal(b, 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(b + c, 1.0), obs=y)


def test_a_prior_that_depends_on_what_its_site_varies_with_goes_by_draws():
    """The prior of b depends on a, with which it varies; that of c on b, of which it is independent."""
    made = {}
    for kl in ("analytic", "monte_carlo"):
        inference, theta = build(chain, mixed(sites={"a": "full_rank", "b": "full_rank"}), kl=kl, y=DATA["y"])
        theta = theta + 0.3 * torch.randn(len(theta), dtype=F64, generator=torch.Generator().manual_seed(0))
        points = torch.cat([torch.eye(3, dtype=F64), -torch.eye(3, dtype=F64)]) * 3**0.5
        rows = one_group(y=DATA["y"])
        terms = [inference.terms(theta, noise_of(each[None, None]), rows, 1.0).sum() for each in points]
        made[kl] = float(torch.stack(terms).mean())
    assert inference.guide.alone == {"a", "c"}
    assert made["analytic"] == pytest.approx(made["monte_carlo"], abs=1e-9)


def test_a_site_or_a_way_that_there_is_not_is_refused_before_training():
    with pytest.raises(
        UserError, match=r'guide.sites names "e", which is no latent .* latents are a, b, c, d\): leave'
    ):
        build(four, mixed(sites={"e": "block"}), **DATA)
    with pytest.raises(
        UserError, match=r'guide.sites has flow for "a", which cannot be mixed: give mean_field, block or'
    ):
        build(four, mixed(sites={"a": "flow"}), **DATA)


def test_its_options_come_from_a_call():
    options = {"program": "eager", "guide": "by_site", "guide.sites": {"b": "block"}, "guide.others": "full_rank"}
    columns = {name: each.numpy() for name, each in DATA.items()}
    found = fit(four, columns, max_steps=10, progress=False, options=options)
    assert found.inference.guide.kind == "by site: b block, a full_rank, c full_rank, d full_rank"
