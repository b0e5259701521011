"""A guide beside an encoder of the latents of rows."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from svi_problems import F64, batch_of, noise_of, one_group, trace_at

from trainer.errors import UserError
from trainer.inference.guides.encoded import Encoded
from trainer.inference.guides.mean_field import MeanField
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.rows.options import RowOptions
from trainer.inference.setup import guide_factory, set_up
from trainer.inference.step import Inference

Y = torch.linspace(-1.0, 2.0, 7, dtype=F64)
ZERO = torch.zeros((), dtype=F64)


def level(y):
    """z_i | y_i ~ Normal(y_i / 2, 1 / sqrt(2))."""
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(ZERO, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def shared(y):
    """A latent outside, one of rows on the positive numbers, a class of each row."""
    a = pyro.sample("a", dist.Normal(ZERO, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.LogNormal(a, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.5 + ZERO))
        pyro.sample("y", dist.Normal(z + k, 1.0), obs=y)


def problem(model, guide=MeanField, kl="monte_carlo", rows="amortise", **options) -> tuple[Inference, torch.Tensor]:
    asked = RowOptions(rows, **options)
    return set_up(model, guide, batch_of(y=Y), len(Y), ELBO(kl, antithetic=False), rows=asked)


def at_the_posterior():
    """theta of two hidden numbers a and -a, whose silu differ by a: the encoder is the line y / 2."""
    inference, theta = problem(level, widths=(2,))
    mean, sd = (inference.rows.facts["y"][name][0] for name in ("mean", "sd"))
    values = {name: torch.zeros_like(value) for name, value in inference.parameters.unflatten(theta).items()}
    values["guide.rows.y.weight"] = torch.tensor([[1.0, -1.0]], dtype=F64)
    values["guide.rows.end.weight"] = torch.tensor([[sd / 2, 0.0], [-sd / 2, 0.0]], dtype=F64)
    values["guide.rows.end.bias"] = torch.tensor([mean / 2, 10 * math.atanh(0.05 * math.log(0.5))], dtype=F64)
    return inference.parameters.flatten(values)


@pytest.mark.parametrize("kl", ["monte_carlo", "sticking_the_landing"])
def test_at_the_posterior_every_draw_gives_the_evidence(kl):
    inference, _ = problem(level, kl=kl, widths=[2])
    theta = at_the_posterior().requires_grad_()
    noise = noise_of(torch.zeros(1, 1, 0, dtype=F64), torch.randn(1, 1, len(Y), 1, dtype=F64))
    found = inference.terms(theta, noise, one_group(y=Y), 1.0).sum()
    torch.testing.assert_close(found, dist.Normal(ZERO, math.sqrt(2)).log_prob(Y).sum(), rtol=0, atol=1e-10)
    if kl == "sticking_the_landing":
        (gradient,) = torch.autograd.grad(found, theta)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-10)


def test_a_normal_prior_is_taken_exactly():
    """What depends on the draw is the likelihood alone."""
    inference, _ = problem(level, kl="analytic", widths=[2])
    theta, terms = at_the_posterior(), []
    for sign in (1.0, -1.0):
        noise = noise_of(torch.zeros(1, 1, 0, dtype=F64), sign * torch.ones(1, 1, len(Y), 1, dtype=F64))
        terms.append(dict(zip(inference.sites, inference.terms(theta, noise, one_group(y=Y), 1.0))))
    assert terms[0]["y"] != terms[1]["y"]
    assert terms[0]["z"] == terms[1]["z"]
    minus_kl = -torch.distributions.kl_divergence(dist.Normal(Y / 2, 0.5**0.5), dist.Normal(ZERO, 1.0)).sum()
    torch.testing.assert_close(terms[0]["z"], minus_kl, rtol=0, atol=1e-10)


@pytest.mark.parametrize("guide", ["mean_field", "full_rank", AutoNormal, lambda model: AutoNormal(model)])
def test_any_guide_holds_the_others(guide):
    """Beside a class of each row, which is summed out."""
    inference, theta = problem(shared, guide_factory(guide, ("y",)))
    assert inference.guide.kind.endswith(", with an encoder for z of each row")
    elements, rows = torch.full((1,), 0.3, dtype=F64), torch.full((len(Y), 1), -0.4, dtype=F64)
    drawn = trace_at(inference, theta, elements, batch_of(y=Y), rows)
    a, z = (drawn.trace.nodes[name]["value"] for name in ("a", "z"))
    params = inference.parameters.unflatten(theta)
    mean, log_sd = inference.guide.network(params, {"y": Y})
    torch.testing.assert_close(z, (mean - 0.4 * log_sd.exp())[:, 0].exp())
    minus_q = 0.5 * 0.16 + log_sd.sum(1) + 0.5 * math.log(2 * math.pi)
    prior = dist.Normal(a, 1.0).log_prob(z.log())
    torch.testing.assert_close(drawn.entropy["z"] + drawn.log_prior["z"], (minus_q + prior).sum())
    found = inference.terms(theta, noise_of(elements[None, None], rows[None, None]), one_group(y=Y), 1.0)
    of_y = torch.logsumexp(torch.stack([dist.Normal(z + k, 1.0).log_prob(Y) for k in (0, 1)]), 0) - math.log(2)
    terms = dict(zip(inference.sites, found))
    torch.testing.assert_close(terms["y"], of_y.sum())
    assert set(terms) >= {"a", "y", "z"}


def test_more_than_sixteen_numbers_of_a_row_get_one():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(17), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)

    inference, _ = problem(model, rows="auto")
    assert isinstance(inference.guide, Encoded)
    assert inference.guide.kind == "an encoder for z of each row"
    with pytest.raises(UserError, match=r'each row has 17 numbers .* "z" \(17\), and at most 16 can be: leave'):
        problem(model, rows="integrate")


def test_a_guide_that_needs_a_curvature_is_refused():
    with pytest.raises(UserError, match="guide=laplace takes is not that of an encoder"):
        problem(shared, guide_factory("laplace", ("y",)))
