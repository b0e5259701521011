"""What every guide keeps to, whatever its family: run for each of them."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation, AutoMultivariateNormal, AutoNormal
from svi_problems import (
    F64,
    batch_of,
    build,
    chunk_of,
    grad,
    noise_of,
    one_group,
    regression,
    regression_data,
    regression_posterior,
)

from trainer.engine.checkpoint import packed, unpacked
from trainer.inference.guides.mean_field import MeanField, Noise
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.optim.optimizers import Adam
from trainer.inference.optim.rounds import one_round
from trainer.inference.optim.schedules import Constant
from trainer.inference.programs.program import Eager
from trainer.inference.recipe.laplace import laplace_start
from trainer.inference.setup import guide_factory, set_up

X = torch.tensor([0.2, 1.3, 0.7], dtype=F64)
LABELS = torch.tensor([1.0, 0.0, 1.0], dtype=F64)


def level(x):
    """One latent under a prior that no guide here equals."""
    w = pyro.sample("w", dist.Normal(0.3, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w, 1.0), obs=x)


def one_of_two(x):
    """A latent beside a discrete one."""
    w = pyro.sample("w", dist.Normal(0.3, 2.0))
    k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.4)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w, 1.0 + k), obs=x)


def share(x):
    p = pyro.sample("p", dist.Beta(x.new_tensor(2.0), x.new_tensor(3.0)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(p), obs=x)


def maximum_likelihood(x):
    w = pyro.param("m", torch.tensor(0.5, dtype=F64))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w, 1.0), obs=x)


def own_normal(x):
    loc = pyro.param("loc", torch.tensor(0.4, dtype=F64))
    scale = pyro.param("scale", torch.tensor(0.7, dtype=F64), constraint=constraints.positive)
    pyro.sample("w", dist.Normal(loc, scale))


def own_beta(x):
    """Equal to the prior at its start."""
    a = pyro.param("a", torch.tensor(2.0, dtype=F64), constraint=constraints.positive)
    b = pyro.param("b", torch.tensor(3.0, dtype=F64), constraint=constraints.positive)
    pyro.sample("p", dist.Beta(a, b))


class SharedScale(MeanField):
    """A family in ten lines: one log scale for all latents, which nobody outside knows as a Gaussian."""

    kind = "mean field of one scale"

    def init(self):
        return {**super().init(), "guide.log_scale": torch.full((1,), math.log(self.init_scale), dtype=self.dtype)}

    def draw(self, model, params, noise, batch, kl):
        scales = {"guide.log_scale": params["guide.log_scale"].expand(self.size)}
        return super().draw(model, params | scales, noise, batch, kl)

    def gaussian(self, places):
        return None


class Member(NamedTuple):
    guide: Any
    wide: float = math.log(3.0)
    """theta[1] at which its sd is 3."""
    model: Callable[..., None] = level
    x: torch.Tensor = X


MEMBERS = {
    "mean field": Member("mean_field"),
    "full rank": Member("full_rank"),
    "block": Member("block"),
    "low rank": Member("low_rank"),
    "by site": Member("by_site"),
    "arrow": Member("arrow"),
    "point": Member("point"),
    "laplace": Member("laplace"),
    "a family of ten lines": Member(SharedScale, math.log(3.0)),
    "AutoNormal": Member(AutoNormal, math.log(math.expm1(3.0))),
    "AutoMultivariateNormal": Member(AutoMultivariateNormal, math.log(math.expm1(3.0))),
    "AutoDelta": Member(AutoDelta),
    "Laplace": Member(AutoLaplaceApproximation),
    "a function": Member(own_normal),
    "a function with draws that are no transformation of normals": Member(own_beta, model=share, x=LABELS),
    "mean field with states": Member("mean_field", model=one_of_two),
    "none": Member("mean_field", model=maximum_likelihood),
}


@pytest.fixture(params=MEMBERS)
def member(request):
    """(inference, theta at the start, the batch)."""
    guide, _, model, x = MEMBERS[request.param]
    batch = batch_of(x=x)
    inference, theta = set_up(model, guide_factory(guide, ("x",)), batch, 3.0, ELBO(antithetic=False))
    return inference, theta, batch


def drawn(inference, theta, batch, normals, kl="monte_carlo"):
    """(the latents' values, log p(z) - log q(z)) at given normals, and a fixed seed for other draws."""
    noise, parameters = Noise(normals, None, 7), inference.parameters

    def evaluate(values):
        made = inference.guide.draw(inference.model, values, noise, batch, kl)
        ratio = sum(made.entropy.values()) + sum(made.log_prior.values())
        return {name: made.trace.nodes[name]["value"] for name in made.log_prior}, torch.as_tensor(ratio, dtype=F64)

    with torch.random.fork_rng():
        return parameters.call(parameters.unflatten(theta), evaluate)


def normals(inference, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(inference.guide.noise_size[0], dtype=F64, generator=generator)


def test_a_family_takes_its_options_and_is_not_there_without_latents():
    """Of a model that has none, maximum likelihood is left."""
    made = guide_factory(partial(SharedScale, init_scale=0.5), ("x",))
    inference, theta = set_up(level, made, batch_of(x=X), 3.0, ELBO())
    assert (inference.guide.kind, theta[1:].tolist()) == ("mean field of one scale", [math.log(0.5)])
    assert set_up(maximum_likelihood, made, batch_of(x=X), 3.0, ELBO())[0].guide.kind.startswith("none")


def test_it_starts_where_every_number_is_finite(member):
    inference, theta, batch = member
    assert len(theta) == inference.parameters.size > 0
    assert theta.isfinite().all()
    assert drawn(inference, theta, batch, normals(inference))[1].isfinite()


def test_a_draw_is_a_function_of_its_noise(member):
    inference, theta, batch = member
    one, again, other = (drawn(inference, theta, batch, normals(inference, seed))[0] for seed in (0, 0, 1))
    for name in one:
        assert torch.equal(one[name], again[name])
        elements = inference.guide.noise_size[0]
        if inference.guide.log_q_of_a_draw is None:
            assert torch.equal(one[name], other[name]) == (inference.guide.still or not elements)


def test_the_ratio_of_prior_and_guide_has_mean_one(member, request):
    """The integral of q p / q, by Gauss-Hermite nodes for the one normal of a draw; where q is the prior, at a draw."""
    inference, theta, batch = member
    if inference.guide.still or inference.guide.states:  # of states test_discrete.py takes the sum
        return
    if inference.guide.log_q_of_a_draw is not None:
        assert float(drawn(inference, theta, batch, normals(inference))[1]) == pytest.approx(0.0, abs=1e-12)
        return
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    if inference.guide.noise_size[0] > 1:  # its own tests have its density
        return
    wide = theta.clone()
    wide[1] = MEMBERS[request.node.callspec.params["member"]].wide  # than the prior, so that the ratio is bounded
    values = [drawn(inference, wide, batch, torch.tensor([node], dtype=F64))[1].exp() for node in nodes]
    mean = sum(w * v for w, v in zip(weights / weights.sum(), values, strict=True))
    assert float(mean) == pytest.approx(1.0, abs=1e-6)


def test_a_gaussian_one_is_what_its_view_says(member):
    """The view's numbers lie at the head of theta, and are those of the draws."""
    inference, theta, batch = member
    view = inference.gaussian
    if view is None:
        return
    theta = view.theta(torch.tensor([0.6], dtype=F64), torch.tensor([0.8], dtype=F64).log())
    normals_of = inference.guide.noise_size[0]
    assert (view.loc, view.parameters) == (slice(0, view.size), len(theta))
    z = [
        float(drawn(inference, theta, batch, torch.full((normals_of,), e, dtype=F64))[0]["w"]) for e in (-1.0, 0.0, 1.0)
    ]
    assert z == pytest.approx([0.6 - 0.8, 0.6, 0.6 + 0.8])
    assert float(view.location(theta)) == pytest.approx(z[1])
    assert float(view.sd(theta)) == pytest.approx((z[2] - z[0]) / 2)
    numbers = torch.arange(5.0, 5.0 + view.covariance.parameters, dtype=F64)
    assert view.by_covariance(numbers, theta).tolist() == [0.0, *numbers.tolist()]
    assert view.latent_name(0) == "w"


def test_on_a_posterior_of_its_family_no_draw_matters(member):
    """Independent latents, which every Gaussian family holds: the evidence at each draw, and a gradient of zero."""
    if member[0].gaussian is None:
        return
    family, data = type(member[0].guide), regression_data()
    inference, _ = build(regression, family, kl="sticking_the_landing", **data)
    mean, covariance, evidence = regression_posterior(**data)
    theta, rows = inference.gaussian.nearest(mean, torch.linalg.inv(covariance)), one_group(**data)
    assert torch.allclose(inference.gaussian.sd(theta), covariance.diagonal().sqrt())
    for seed in range(3):
        noise = noise_of(normals(inference, seed)[None, None])
        assert float(inference.terms(theta, noise, rows, 1.0).sum()) == pytest.approx(float(evidence), abs=1e-9)
        assert float(grad(inference, theta, noise, rows).abs().max()) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_its_steps_may_be_cut_anywhere(member, dtype):
    """From its start in whitened coordinates, through a checkpoint in between: the same bits."""
    if member[0].gaussian is None:
        return
    data = {name: column.to(dtype) for name, column in regression_data(orthogonal=False).items()}
    inference, theta = build(regression, type(member[0].guide), **data)
    start = laplace_start(inference, theta, one_group(**data))
    assert start is not None
    update = one_round(Adam(lr=0.1), Constant(), 6, 3, whitened=True)
    first, rows = update.init(*start), chunk_of(6, 1, 4, dtype, x=(3,), y=())
    program = Eager(inference, update, 0, [0])
    whole = program.run(first, rows, 6).state
    half = unpacked(packed(program.run(first, rows, 2).state, {}), "a")[0]
    cut = program.run(half, rows.part(2, 6), 4).state
    assert all(torch.equal(a, b) for a, b in zip(whole.named().values(), cut.named().values(), strict=True))
    assert whole.theta.dtype == dtype
    assert not torch.equal(whole.theta, first.theta)


def test_what_it_ends_with_are_parameters_of_its_own(member):
    inference = member[0]
    size = inference.guide.curved
    made = inference.guide.ended(2.0 * torch.eye(size, dtype=F64))
    assert made.keys() <= inference.parameters.shapes.keys()
    assert bool(made) == bool(size)
    for name, value in made.items():
        assert tuple(value.shape) == inference.parameters.shapes[name]


def test_the_score_of_a_draw_has_mean_zero(member):
    """E grad log q = 0, over draws of the guide's own."""
    inference, theta, batch = member
    log_q = inference.guide.log_q_of_a_draw
    if log_q is None:
        return
    parameters, scores = inference.parameters, []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(2000):
            at = theta.clone().requires_grad_()
            value = parameters.call(parameters.unflatten(at), lambda _: log_q(batch))
            scores.append(torch.autograd.grad(value, at)[0])
    scores = torch.stack(scores)
    assert (scores.mean(0).abs() < 4 * scores.std(0) / len(scores) ** 0.5).all()
    assert (scores.std(0) > 0).all()


def test_its_terms_are_those_of_the_objective(member):
    """Each with its name and kind."""
    inference, theta, batch = member
    noise = noise_of(normals(inference)[None, None])
    terms = inference.terms(theta, noise, one_group(x=batch.columns["x"]), 1.0)
    assert len(terms) == len(inference.sites) == len(inference.kinds)
    assert inference.kinds.count("likelihood") == 1
    assert set(inference.kinds) <= {"likelihood", "kl_global", "kl_local"}
    assert terms.isfinite().all()
