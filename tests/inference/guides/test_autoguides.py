"""Every guide of pyro.infer.autoguide, as a class, an instance, a partial, and inside a guide of the user's."""

import functools
import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.transforms import block_autoregressive, iterated
from pyro.infer import autoguide
from svi_problems import (
    F64,
    batch_of,
    build,
    grad,
    noise_of,
    one_group,
    regression,
    regression_data,
    regression_posterior,
    trace_at,
)

from trainer.errors import UserError
from trainer.inference.estimates.full_gradient import full_hessian
from trainer.inference.estimates.many_draws import terms_together
from trainer.inference.estimates.passes import Block, Pass
from trainer.inference.guides.auto_laplace import Laplace
from trainer.inference.model.latents import is_latent
from trainer.inference.setup import guide_factory, mean_field

KINDS = {
    "AutoNormal": {},
    "AutoDelta": {},
    "AutoDiagonalNormal": {},
    "AutoMultivariateNormal": {},
    "AutoLowRankMultivariateNormal": {"rank": 2},
    "AutoIAFNormal": {},
    "AutoNormalizingFlow": {"init_transform_fn": functools.partial(iterated, 2, block_autoregressive)},
    "AutoGaussian": {},
    "AutoStructured": {},
    "AutoLaplaceApproximation": {},
    "AutoNormalMessenger": {},
    "AutoHierarchicalNormalMessenger": {},
    "AutoRegressiveMessenger": {},
}


def hierarchy(x, y=None):
    """Two sites, one in a plate of its own, one positive."""
    s = pyro.sample("s", dist.LogNormal(x.new_zeros(()), 1.0))
    with pyro.plate("parts", 2):
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, s), obs=y)


torch.manual_seed(0)
DATA = {"x": torch.randn(12, 2, dtype=F64), "y": torch.randn(12, dtype=F64)}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def made(guide, model=hierarchy, data=DATA):
    inference, theta = build(model, guide_factory(guide, data), **data)
    return inference, theta


def gradient(inference, theta, seed=1):
    elements = torch.randn(inference.guide.noise_size[0], generator=torch.Generator().manual_seed(seed))
    return grad(inference, theta, noise_of(elements[None, None]), one_group(**DATA))


@pytest.mark.parametrize("name", KINDS)
def test_a_class_a_partial_and_an_instance_are_the_same_guide(name):
    kind, options = getattr(autoguide, name), KINDS[name]
    mine = kind(hierarchy, **options)
    before = dict(vars(mine)), dict(mine._modules), dict(mine._parameters)
    first, theta = made(functools.partial(kind, **options))
    second, again = made(mine)
    assert torch.equal(theta, again)
    assert first.parameters.shapes == second.parameters.shapes
    assert {"s", "w", "y"} <= set(first.sites)
    found = gradient(first, theta)
    assert torch.equal(found, gradient(second, theta))
    assert torch.isfinite(found).all()
    assert found.any()
    assert (dict(vars(mine)), dict(mine._modules), dict(mine._parameters)) == before  # the user's object
    if not options:
        assert torch.equal(made(kind)[1], theta)


def test_what_starts_a_guide_is_kept():
    start = autoguide.init_to_value(values={"s": torch.tensor(3.0), "w": torch.tensor([1.0, -2.0])})
    inference, theta = made(functools.partial(autoguide.AutoNormal, init_loc_fn=start, init_scale=0.25))
    values = inference.parameters.unflatten(theta)
    torch.testing.assert_close(values["guide.locs.w_unconstrained"], torch.tensor([1.0, -2.0]))
    assert values["guide.locs.s_unconstrained"] == pytest.approx(float(torch.tensor(3.0).log()))


@pytest.mark.parametrize("kind", [autoguide.AutoNormal, autoguide.AutoNormalMessenger])
def test_an_autoguide_inside_a_guide(kind):
    """Its parameters are found and trained, whatever it is called from; a network and a site stand beside it."""
    auto = kind(poutine.block(hierarchy, hide=["s"]))

    def guide(x, y=None):
        auto(x, y)
        loc = pyro.param("loc", lambda: torch.randn(()))
        pyro.sample("s", dist.LogNormal(loc, pyro.param("scale", torch.tensor(0.1), constraint=constraints.positive)))

    inference, theta = made(guide)
    names = set(inference.parameters.shapes)
    assert {"loc", "scale", f"{kind.__name__}.locs.w_unconstrained"} < names
    assert (gradient(inference, theta) != 0).all()


def test_a_list_of_guides():
    parts = autoguide.AutoGuideList(hierarchy)
    parts.append(autoguide.AutoMultivariateNormal(poutine.block(hierarchy, expose=["w"])))
    parts.append(autoguide.AutoDelta(poutine.block(hierarchy, expose=["s"])))
    inference, theta = made(parts)
    assert inference.guide.noise_size == (2, 0)
    moved = {name for name, each in inference.parameters.unflatten(gradient(inference, theta)).items() if each.any()}
    assert moved == set(inference.parameters.shapes)


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize(
    "name", ["AutoNormal", "AutoDiagonalNormal", "AutoNormalMessenger", "AutoLaplaceApproximation"]
)
def test_a_value_for_each_row_is_refused(name):
    with pytest.raises(UserError, match=r'plate "data"'):
        made(getattr(autoguide, name), local, {"x": DATA["y"]})
    with pytest.raises(UserError, match=r'plate "data"'):
        made(autoguide.AutoLaplaceApproximation, local, {"x": DATA["y"]})


@pytest.mark.parametrize("name", ["AutoNormal", "AutoDiagonalNormal", "AutoLaplaceApproximation"])
def test_a_prior_that_cannot_be_drawn_from_needs_a_start(name):
    def flat(x):
        m = pyro.sample("m", dist.ImproperUniform(constraints.real, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    kind, data = getattr(autoguide, name), {"x": DATA["y"]}
    with pytest.raises(UserError, match=r"ImproperUniform does not support sampling.*proper prior.*init_to_value"):
        made(kind, flat, data)
    start = autoguide.init_to_value(values={"m": torch.tensor(2.0)})
    inference, _ = made(functools.partial(kind, init_loc_fn=start), flat, data)
    assert {"m", "x"} <= set(inference.sites)


def test_a_discrete_guide_has_the_evidence_where_it_is_the_posterior():
    def model(x):
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    x = DATA["y"]
    inference, theta = made(autoguide.AutoDiscreteParallel, model, {"x": x})
    joint = dist.Normal(torch.tensor([[0.0], [1.0]], dtype=F64), 1.0).log_prob(x).sum(1) - math.log(2.0)
    exact = (joint[1] - joint[0])[None]  # the logit of the probability of 1
    assert len(theta) == len(exact)
    found = inference.terms(exact, noise_of(torch.zeros(1, 1, 1, dtype=F64)), one_group(x=x), 1.0).sum()
    assert float(found) == pytest.approx(float(joint.logsumexp(0)), abs=1e-9)


def of_rows(x, y):
    b = pyro.sample("b", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(x.new_tensor(0.0), 1.0))
        pyro.sample("y", dist.Normal(x @ b + u, 1.0), obs=y)


GIVEN = {
    "a class": autoguide.AutoNormal,
    "an instance": autoguide.AutoNormal(of_rows),
    "an instance of a part": autoguide.AutoNormal(poutine.block(of_rows, hide=["u"])),
    "a function of the model": lambda model: autoguide.AutoNormal(model),
}


@pytest.mark.parametrize("given", GIVEN)
def test_however_it_is_given_it_holds_the_globals_and_rows_are_integrated(given):
    inference, theta = made(GIVEN[given], of_rows, DATA)
    assert inference.model.sites is not None
    assert {site.name for site in inference.model.sites.continuous} == {"u"}
    assert inference.guide.noise_size == (2, 0)
    noise = noise_of(torch.full((1, 1, 2), 0.3, dtype=F64))
    found = inference.terms(torch.tensor([0.2, -0.1, -1.0, 0.5], dtype=F64), noise, one_group(**DATA), 1.0)
    scales = torch.nn.functional.softplus(torch.tensor([-1.0, 0.5], dtype=F64))
    b = torch.tensor([0.2, -0.1], dtype=F64) + 0.3 * scales
    rows = dist.Normal(DATA["x"] @ b, math.sqrt(2.0)).log_prob(DATA["y"]).sum()
    ratio = dist.Normal(0.0, 1.0).log_prob(b) - dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.3)) + scales.log()
    assert float(found.sum().detach()) == pytest.approx(float(rows + ratio.sum()), abs=1e-9)
    assert len(theta) == 4


# Laplace's approximation of a normal posterior is that posterior.


def laplace():
    data = regression_data(orthogonal=False)
    inference, theta = build(regression, guide_factory(autoguide.AutoLaplaceApproximation, data), **data)
    assert isinstance(inference.guide, Laplace)
    return inference, theta, data


def test_laplace_trains_a_point():
    """The entropy of a point is none: the ELBO is the log joint, at any noise."""
    inference, theta, data = laplace()
    noises = [torch.zeros(3), torch.randn(3)]
    values = [inference.terms(theta, noise_of(n[None, None]), one_group(**data), 1.0).sum() for n in noises]
    w = inference.parameters.unflatten(theta)["guide.loc"]
    joint = poutine.trace(poutine.condition(regression, {"w": w})).get_trace(**data).log_prob_sum()
    torch.testing.assert_close(torch.stack(values), joint.expand(2))
    found = inference.parameters.unflatten(grad(inference, theta, noise_of(torch.randn(1, 1, 3)), one_group(**data)))
    assert not found["guide.factor"].any()


def test_laplace_ends_with_the_posterior():
    inference, theta, data = laplace()
    rows, parts = len(data["x"]), (slice(0, 5), slice(5, None))
    ids = torch.arange(rows)
    blocks = [Block(i, {k: v[part] for k, v in data.items()}, ids[part]) for i, part in enumerate(parts)]
    mean, covariance, evidence = regression_posterior(**data)
    hessian = full_hessian(terms_together(inference), theta, 3, Pass(blocks, 2, 0, lambda total: total))
    torch.testing.assert_close(hessian, covariance.inverse(), rtol=1e-9, atol=1e-9)
    end = inference.parameters.flatten({"guide.loc": mean, **inference.guide.ended(hessian)})
    factor = inference.parameters.unflatten(end)["guide.factor"]
    torch.testing.assert_close(factor @ factor.T, covariance, rtol=1e-9, atol=1e-12)
    # q is the posterior: log p(y, z) - log q(z) is the log evidence at any z.
    noise = torch.randn(5, 3)
    terms = [inference.terms(end, noise_of(n[None, None]), one_group(**data), 1.0).sum() for n in noise]
    torch.testing.assert_close(torch.stack(terms), evidence.expand(5), rtol=0, atol=1e-9)


FLAT = {
    "flat in one latent": (torch.diag(torch.tensor([1.0, 2.0, 0.0])), r'is flat along "w\[2\]" at.*give it a proper'),
    "up in one latent": (torch.diag(torch.tensor([1.0, -2.0, 1.0])), r'curves up along "w\[1\]" at.*train longer'),
    "a ridge": (
        torch.tensor([[1e6, 1e3, 0.0], [1e3, 1.0, 0.0], [0.0, 0.0, 1.0]]),
        r'is flat along "w\[[01]\]" and "w\[[01]\]" at.*give one of them',
    ),
    "a ridge but for rounding": (
        torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0 + 1e-14, 0.0], [0.0, 0.0, 1.0]]),
        r'is flat along "w\[[01]\]" and "w\[[01]\]" at',
    ),
    "nowhere finite": (torch.full((3, 3), torch.nan), "is not finite"),
}


@pytest.mark.parametrize("name", FLAT)
def test_laplace_without_a_curvature_is_named(name):
    hessian, words = FLAT[name]
    inference, _, _ = laplace()
    with pytest.raises(UserError, match=words):
        inference.guide.ended(hessian.double())


# What a guide's factor adds, and a guide that holds nothing.


def one_site(x):
    z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def with_factor(inside, **options):
    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 0.5))
        with pyro.plate("data", len(x)) if inside else nullcontext():
            pyro.factor("loss", 2.0 * x if inside else torch.tensor(7.0), **options)

    return guide


@pytest.mark.parametrize(("inside", "adds"), [(True, 2.0), (False, 7.0)])
def test_a_factor_of_the_guide_is_taken_from_the_elbo(inside, adds):
    x = DATA["y"]
    inference, theta = made(with_factor(inside, has_rsample=True), one_site, {"x": x})
    terms = inference.terms(theta, noise_of(torch.zeros(1, 1, 1)), one_group(x=x), 1.0)
    found = dict(zip(inference.sites, terms, strict=True))
    assert float(found["loss"]) == pytest.approx(-float((adds * x).sum()) if inside else -adds)
    # Half of the rows stand for all of them, where the factor is theirs.
    half = inference.terms(theta, noise_of(torch.zeros(1, 1, 1)), one_group(x=x[:6]), 1.0)
    scaled = -2 * float((adds * x[:6]).sum()) if inside else -adds
    assert float(dict(zip(inference.sites, half, strict=True))["loss"]) == pytest.approx(scaled)


def test_a_factor_whose_gradient_is_not_known_is_named():
    with pytest.raises(UserError, match="has_rsample=True"):
        made(with_factor(True, has_rsample=False), one_site, {"x": DATA["y"]})


def test_a_factor_of_the_model_is_not_one_of_a_guide_that_runs_the_model():
    def model(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.factor("wish", -(z**2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    data = {"x": DATA["y"]}
    inference, theta = made(autoguide.AutoNormalMessenger, model, data)
    trace = trace_at(inference, theta, torch.zeros(1), batch_of(**data))
    assert "wish" not in trace.entropy
    assert [name for name in inference.sites if name == "wish"] == ["wish"]


def likelihood_alone(x, y=None):
    w = pyro.param("w", lambda: torch.zeros(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


@pytest.mark.parametrize("guide", [mean_field, guide_factory(lambda x, y=None: None, DATA)])
def test_a_model_of_parameters_alone_is_maximum_likelihood(guide):
    inference, theta = build(likelihood_alone, guide, **DATA)
    assert inference.guide.still
    assert inference.guide.noise_size == (0, 0)
    assert inference.guide.kind == "none (no latent site: maximum likelihood)"
    terms = inference.terms(theta, noise_of(torch.zeros(1, 1, 0)), one_group(**DATA), 1.0)
    torch.testing.assert_close(terms.sum(), dist.Normal(0.0, 1.0).log_prob(DATA["y"]).sum())
    torch.testing.assert_close(
        grad(inference, theta, noise_of(torch.zeros(1, 1, 0)), one_group(**DATA)), DATA["x"].T @ DATA["y"]
    )


def test_a_model_of_nothing_is_named():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(UserError, match="neither a latent site nor a parameter"):
        build(model, mean_field, x=DATA["y"])


def test_points_are_points():
    inference, theta = made(autoguide.AutoDelta)
    assert inference.guide.still
    assert inference.guide.kind == "AutoDelta (points, no spread)"
    nodes = trace_at(inference, theta, torch.zeros(0), batch_of(**DATA)).trace.nodes
    assert {name for name, node in nodes.items() if is_latent(node)} == {"s", "w"}
