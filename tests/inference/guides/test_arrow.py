"""The arrow guide: exact on the posterior of a Gaussian hierarchy, whose groups it finds; its bounds."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from svi_problems import F64, build, grad, noise_of, one_group

from trainer.errors import UserError
from trainer.inference.guides.arrow import Arrow
from trainer.inference.guides.full_rank import FullRank
from trainer.inference.recipe.laplace import laplace_start

GROUPS = 40


def hierarchy(x, group):
    """Intercepts and two slopes of 40 groups around means of their own, in sites of different shapes."""
    mean = pyro.sample("mean", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
    with pyro.plate("groups", GROUPS):
        a = pyro.sample("a", dist.Normal(mean[0], 0.7))
        b = pyro.sample("b", dist.Normal(mean[1:], 0.5).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(a[group] + (b[group] * x[:, :2]).sum(-1), 0.5), obs=x[:, 2])


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(160, 3, dtype=F64, generator=generator)
    return {"x": x, "group": torch.arange(160) % GROUPS}


DATA = data()


def started(guide, kl="sticking_the_landing"):
    inference, theta = build(hierarchy, guide, kl=kl, **DATA)
    start = laplace_start(inference, theta, one_group(**DATA))
    assert start is not None
    return inference, start[0]


def test_the_posterior_of_a_gaussian_hierarchy_is_met_exactly():
    """The covariance is the full-rank guide's, with a twentieth of its numbers, and no draw moves it."""
    inference, theta = started(Arrow)
    full, dense = started(FullRank)
    found, want = inference.gaussian.root(theta), full.gaussian.root(dense)
    torch.testing.assert_close(found @ found.T, want @ want.T, rtol=1e-9, atol=1e-12)
    assert inference.guide.kind == "arrow (3 with all, 40 groups of 3)"
    assert len(theta) < len(dense) / 15
    size = inference.guide.size
    for seed in range(3):
        eps = torch.randn(1, 1, size, dtype=F64, generator=torch.Generator().manual_seed(seed))
        assert float(grad(inference, theta, noise_of(eps), one_group(**DATA)).abs().max()) < 1e-5


def test_priors_that_depend_on_the_top_go_by_draws():
    """By sigma points, as for the full-rank guide."""
    made = {}
    for kl in ("analytic", "monte_carlo"):
        inference, theta = started(Arrow, kl)
        size = inference.guide.size
        points = torch.cat([torch.eye(size, dtype=F64), -torch.eye(size, dtype=F64)]) * size**0.5
        terms = [inference.terms(theta, noise_of(each[None, None]), one_group(**DATA), 1.0).sum() for each in points]
        made[kl] = float(torch.stack(terms).mean())
    assert inference.guide.alone == {"mean"}
    assert made["analytic"] == pytest.approx(made["monte_carlo"], abs=1e-7)


def named(*top):
    return lambda plated, batch: Arrow(plated, batch, top=top)


def test_the_top_can_be_named():
    inference, theta = started(named("a"))
    assert inference.guide.kind == "arrow (40 with all, 3 groups of 1, 40 groups of 2)"
    assert theta.isfinite().all()
    with pytest.raises(UserError, match=r'guide.top names "c", which is no latent .* latents are mean, a, b\): leave'):
        build(hierarchy, named("c"), **DATA)


def wide(*shape):
    def model(y):
        pyro.sample("w", dist.Normal(y.new_zeros(shape), 1.0).to_event(len(shape)))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    return model


def test_what_is_too_wide_is_refused_before_training():
    y = torch.zeros(4, dtype=F64)
    with pytest.raises(
        UserError, match=r"guide=arrow has 300 latents at the top and holds up to 256 there: name fewer"
    ):
        build(wide(300), named("w"), y=y)
    with pytest.raises(UserError, match=r"guide=arrow has groups of 65 latents and holds up to 64 in one: take guide="):
        build(wide(70, 65), Arrow, y=y)
