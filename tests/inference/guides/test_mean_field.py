"""The mean-field guide: when its KL is exact, and what it then equals; flat priors; parents that are drawn."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from svi_problems import F64, build, noise_of, one_group, with_objective

from trainer.errors import UserError
from trainer.inference.guides.mean_field import MeanField
from trainer.inference.model.plates import Batch
from trainer.inference.optim.optimizers import Adam
from trainer.inference.optim.rounds import one_round
from trainer.inference.optim.schedules import Cosine
from trainer.inference.programs.program import Eager

X = torch.zeros(2, dtype=F64)
LOC, SCALE = torch.tensor([0.4, -0.7], dtype=F64), torch.tensor([0.5, 1.3], dtype=F64)
MU, SIGMA = torch.tensor([0.1, 0.2], dtype=F64), torch.tensor([0.8, 2.0], dtype=F64)


def terms_of(sample, kl="analytic", seed=0):
    """The first term (the latents') at q = Normal(LOC, SCALE), at random noise."""

    def model(x):
        sample()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=x)

    inference, _ = build(model, kl=kl, x=X)
    eps = torch.randn(1, 1, 2, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return inference.terms(torch.cat([LOC, SCALE.log()]), noise_of(eps), one_group(x=X), 1.0)[0]


KL = torch.distributions.kl_divergence(torch.distributions.Normal(LOC, SCALE), torch.distributions.Normal(MU, SIGMA))
ENTROPY = torch.distributions.Normal(LOC, SCALE).entropy()
EXPECTED_LOG_PRIOR = float((-KL - ENTROPY).sum())


def in_plate(make):
    def sample():
        with pyro.plate("pair", 2):
            pyro.sample("z", make())

    return sample


def plain(make):
    return lambda: pyro.sample("z", make())


def wrapped(make, **how):
    def sample():
        with poutine.scale(scale=how["scale"]) if "scale" in how else poutine.mask(mask=how["mask"]):
            pyro.sample("z", make())

    return sample


NORMAL = lambda: dist.Normal(MU, SIGMA)  # noqa: E731
LOGNORMAL = lambda: dist.LogNormal(MU, SIGMA)  # noqa: E731
EXACT = {
    "normal": (plain(NORMAL), EXPECTED_LOG_PRIOR),
    "to_event": (plain(lambda: NORMAL().to_event(1)), EXPECTED_LOG_PRIOR),
    "independent of expanded": (plain(lambda: NORMAL().expand([1, 2]).to_event(2)), EXPECTED_LOG_PRIOR),
    "expanded independent": (plain(lambda: NORMAL().to_event(1).expand([1])), EXPECTED_LOG_PRIOR),
    "in a plate": (in_plate(NORMAL), EXPECTED_LOG_PRIOR),
    "lognormal": (plain(LOGNORMAL), EXPECTED_LOG_PRIOR),
    "lognormal to_event": (plain(lambda: LOGNORMAL().to_event(1)), EXPECTED_LOG_PRIOR),
    "expanded lognormal": (plain(lambda: LOGNORMAL().expand([1, 2]).to_event(2)), EXPECTED_LOG_PRIOR),
    "scaled by the user": (wrapped(lambda: NORMAL().to_event(1), scale=0.3), 0.3 * EXPECTED_LOG_PRIOR),
    "masked by the user": (wrapped(lambda: NORMAL().to_event(1), mask=False), 0.0),
    "flat": (plain(lambda: dist.ImproperUniform(constraints.real, (), (2,))), 0.0),
}


@pytest.mark.parametrize("name", EXACT)
def test_analytic_kl_is_exact_at_any_noise(name):
    """Equal to torch's KL, whatever eps is."""
    sample, log_prior = EXACT[name]
    for seed in range(3):
        assert float(terms_of(sample, seed=seed)) == pytest.approx(log_prior + float(ENTROPY.sum()), abs=1e-10)


INEXACT = {
    "gamma": lambda: dist.Gamma(SIGMA, 1.0),
    "student": lambda: dist.StudentT(5.0, MU, SIGMA),
    "half-normal": lambda: dist.HalfNormal(SIGMA),
    "masked distribution": lambda: NORMAL().mask(torch.tensor([True, False])),
    "exponential of twice a normal": lambda: dist.TransformedDistribution(
        NORMAL(), [dist.transforms.AffineTransform(0.0, 2.0), dist.transforms.ExpTransform()]
    ),
}


@pytest.mark.parametrize("name", INEXACT)
def test_other_priors_are_drawn_with_the_exact_entropy(name):
    """E_q log p has no closed form here: log p at the draw, and the entropy in closed form."""
    for seed in range(3):
        eps = torch.randn(2, dtype=F64, generator=torch.Generator().manual_seed(seed))
        drawn = terms_of(plain(INEXACT[name]), kl="monte_carlo", seed=seed)
        log_q = torch.distributions.Normal(LOC, SCALE).log_prob(LOC + SCALE * eps).sum()
        here = terms_of(plain(INEXACT[name]), seed=seed)
        assert float(here - ENTROPY.sum()) == pytest.approx(float(drawn + log_q), abs=1e-10)
    assert float(here) != pytest.approx(float(terms_of(plain(INEXACT[name]), seed=9)), abs=1e-3)


def test_a_prior_of_drawn_parents_is_exact_given_the_draw():
    def sample():
        a = pyro.sample("a", dist.Normal(MU[0], SIGMA[0]))
        pyro.sample("b", dist.Normal(2 * a, (a / 2).exp()))

    def model(x):
        sample()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=x)

    inference, _ = build(model, kl="analytic", x=X)
    for e in (-1.0, 0.5):
        eps = torch.tensor([[[e, 7.0]]], dtype=F64)  # b's own noise does not matter
        terms = inference.terms(torch.cat([LOC, SCALE.log()]), noise_of(eps), one_group(x=X), 1.0)
        a = LOC[0] + SCALE[0] * e
        child = torch.distributions.kl_divergence(
            torch.distributions.Normal(LOC[1], SCALE[1]), torch.distributions.Normal(2 * a, (a / 2).exp())
        )
        assert terms[:2].tolist() == pytest.approx([-float(KL[0]), -float(child)], abs=1e-10)


@pytest.mark.parametrize("kl", ["analytic", "monte_carlo", "sticking_the_landing"])
def test_a_flat_prior_fits(kl):
    """Under a flat prior the posterior of a mean is Normal(mean, 1 / sqrt(N)), which mean-field can hold."""
    y = torch.randn(40, dtype=F64, generator=torch.Generator().manual_seed(0)) + 3

    def model(y):
        m = pyro.sample("m", dist.ImproperUniform(constraints.real, (), ()))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    inference, theta = build(model, kl=kl, y=y)
    inference = with_objective(inference, antithetic=True, pairs=4)
    update = one_round(Adam(lr=0.1), Cosine(), 300, 300)
    chunk = Batch({"y": y.expand(300, 1, 40)}, torch.full((300, 1), 40), torch.full((300,), 40), None)
    state = Eager(inference, update, 0, [0]).run(update.init(theta), chunk, 300).state
    assert state.theta.tolist() == pytest.approx([float(y.mean()), -0.5 * math.log(40)], abs=0.05)


def test_init_scale():
    def model(x):
        pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=x)

    _, theta = build(model, lambda plated, batch: MeanField(plated, batch, init_scale=0.25), x=X)
    assert theta.tolist() == pytest.approx([0.0, 0.0, math.log(0.25), math.log(0.25)])
    with pytest.raises(UserError, match=r"init_scale=0 must be positive"):
        MeanField(None, None, init_scale=0)
