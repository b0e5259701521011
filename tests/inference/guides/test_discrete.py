"""Discrete latents outside the data plate: exact posteriors have the evidence for an ELBO, without noise."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from svi_problems import F64, batch_of, grad, noise_of, one_group

from trainer.errors import UserError
from trainer.inference.guides.discrete import Picked, StateSite, joint_states
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.setup import guide_factory, set_up

X = torch.tensor([0.2, 1.3, 0.7, -0.4], dtype=F64)
MEANS = torch.tensor([-1.0, 0.3, 1.0], dtype=F64)
PRIOR = torch.tensor([0.2, 0.3, 0.5], dtype=F64)


def regimes(x):
    """Which of three means all rows have, beside a latent that they do not see."""
    pyro.sample("apart", dist.Normal(x.new_tensor(0.5), 2.0))
    kind = pyro.sample("kind", dist.Categorical(PRIOR))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(MEANS[kind], 1.0), obs=x)


def switches(x):
    """Two indicators in a plate, of which each adds its mean."""
    pyro.sample("apart", dist.Normal(x.new_tensor(0.5), 2.0))
    with pyro.plate("effects", 2):
        on = pyro.sample("on", dist.Bernoulli(x.new_tensor(0.3)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(on @ MEANS[:2], 1.0), obs=x)


def one_hot(x):
    pyro.sample("apart", dist.Normal(x.new_tensor(0.5), 2.0))
    kind = pyro.sample("kind", dist.OneHotCategorical(PRIOR))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(kind @ MEANS, 1.0), obs=x)


def spike_and_slab(x):
    on = pyro.sample("on", dist.Bernoulli(x.new_tensor(0.3)))
    w = pyro.sample("w", dist.Normal(x.new_tensor(0.0), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(on * w, 1.0), obs=x)


def its_posterior(x):
    """The exact one, whose starts the test sets: a share, and a normal for each state."""
    share = pyro.param("share", torch.tensor(0.4, dtype=F64), constraint=constraints.unit_interval)
    loc = pyro.param("loc", torch.zeros(2, dtype=F64))
    scale = pyro.param("scale", torch.ones(2, dtype=F64), constraint=constraints.positive)
    on = pyro.sample("on", dist.Bernoulli(share))
    pyro.sample("w", dist.Normal(loc[on.long()], scale[on.long()]))


def at(model, guide="mean_field", kl="analytic"):
    return set_up(model, guide_factory(guide, ("x",)), batch_of(x=X), len(X), ELBO(kl, antithetic=False))


def terms(inference, theta, seed=0):
    normals = torch.randn(inference.guide.noise_size[0], dtype=F64, generator=torch.Generator().manual_seed(seed))
    return inference.terms(theta, noise_of(normals[None, None]), one_group(x=X), 1.0), normals[None, None]


def with_values(inference, theta, **values):
    """theta with parameters set, each in its unconstrained space."""
    theta = theta.clone()
    for name, value in values.items():
        theta[inference.parameters.places[name]] = torch.as_tensor(value, dtype=F64).flatten()
    return theta


def log_evidence(log_joint):
    """From log p(x, s) of every joint state."""
    return torch.logsumexp(log_joint, 0), log_joint.log_softmax(0)


def of_regimes():
    return log_evidence(dist.Normal(MEANS[:, None], 1.0).log_prob(X).sum(1) + PRIOR.log())


@pytest.mark.parametrize("model", [regimes, one_hot], ids=["numbers", "one hot"])
@pytest.mark.parametrize("kl", ["analytic", "monte_carlo", "sticking_the_landing"])
def test_the_exact_probabilities_give_the_evidence_without_noise(model, kl):
    evidence, log_posterior = of_regimes()
    inference, theta = at(model, kl=kl)
    theta = with_values(inference, theta, **{"guide.logits.kind": log_posterior + 3.0})
    theta = with_values(inference, theta, **{"guide.loc": 0.5, "guide.log_scale": math.log(2.0)})
    for seed in range(3):
        found, normals = terms(inference, theta, seed)
        assert float(found.sum()) == pytest.approx(float(evidence), abs=1e-12)
    slope = grad(inference, theta, noise_of(normals), one_group(x=X))
    torch.testing.assert_close(slope[inference.parameters.places["guide.logits.kind"]], torch.zeros(3, dtype=F64))


def test_other_probabilities_fall_short_by_their_divergence():
    evidence, log_posterior = of_regimes()
    inference, theta = at(regimes)
    theta = with_values(inference, theta, **{"guide.loc": 0.5, "guide.log_scale": math.log(2.0)})
    even = torch.full((3,), 1 / 3, dtype=F64)
    short = (even * (even.log() - log_posterior)).sum()
    assert float(terms(inference, theta)[0].sum()) == pytest.approx(float(evidence - short), abs=1e-12)


def test_each_member_of_a_plate_has_probabilities_of_its_own():
    inference, theta = at(switches)
    assert inference.parameters.shapes["guide.logits.on"] == (2, 2)
    theta = with_values(inference, theta, **{"guide.loc": 0.5, "guide.log_scale": math.log(2.0)})
    theta = with_values(inference, theta, **{"guide.logits.on": [[0.0, 1.0], [0.5, 0.0]]})
    shares = torch.tensor([[0.0, 1.0], [0.5, 0.0]], dtype=F64).softmax(1)
    want = 0.0
    for i in (0, 1):
        for j in (0, 1):
            q, prior = shares[0, i] * shares[1, j], (0.3 if i else 0.7) * (0.3 if j else 0.7)
            seen = dist.Normal(i * MEANS[0] + j * MEANS[1], 1.0).log_prob(X).sum()
            want += q * (seen + math.log(prior) - q.log())
    assert float(terms(inference, theta)[0].sum()) == pytest.approx(float(want), abs=1e-12)


@pytest.mark.parametrize("kl", ["monte_carlo", "sticking_the_landing"])
def test_a_guide_of_the_user_may_depend_on_the_state(kl):
    """The posterior itself: its ELBO is the evidence, and its gradient 0, at any noise."""
    n, total = len(X), X.sum()
    variance = torch.tensor([1.0, 1 / (1 + n)], dtype=F64)
    loc = torch.stack([0 * total, total * variance[1]])
    off = dist.Normal(0.0, 1.0).log_prob(X).sum()
    gain = 0.5 * loc[1] ** 2 / variance[1] + 0.5 * variance[1].log()
    evidence, log_posterior = log_evidence(torch.stack([off + math.log(0.7), off + gain + math.log(0.3)]))
    inference, theta = at(spike_and_slab, its_posterior, kl)
    theta = with_values(inference, theta, share=log_posterior[1] - log_posterior[0], loc=loc)
    theta = with_values(inference, theta, scale=0.5 * variance.log())
    for seed in range(3):
        found, normals = terms(inference, theta, seed)
        assert float(found.sum()) == pytest.approx(float(evidence), abs=1e-9)
    if kl == "sticking_the_landing":
        slope = grad(inference, theta, noise_of(normals), one_group(x=X))
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)


def test_draws_follow_the_probabilities():
    site = StateSite("kind", torch.arange(3), (2,))
    log_q = torch.tensor([[0.2, 0.3, 0.5], [0.7, 0.2, 0.1]], dtype=F64).log()
    shares = (torch.arange(1000, dtype=F64) + 0.5) / 1000
    counts = torch.zeros(2, 3)
    for normal in torch.special.ndtri(shares):
        with Picked([site], normal.expand(2), {"kind": log_q}), pyro.plate("members", 2):
            value = pyro.sample("kind", dist.Categorical(torch.ones(3) / 3))
        counts[torch.arange(2), value] += 1
    torch.testing.assert_close(counts, (1000 * log_q.exp()).float(), rtol=0, atol=1.0)


def test_every_joint_state_comes_once():
    sites = [StateSite("a", torch.arange(3), ()), StateSite("b", torch.tensor([0.0, 1.0]), (2,))]
    found = [(int(each["a"]), *each["b"].tolist()) for each in joint_states(sites)]
    assert len(set(found)) == len(found) == 12


def too_many(x):
    pyro.sample("apart", dist.Normal(x.new_tensor(0.5), 2.0))
    with pyro.plate("effects", 13):
        on = pyro.sample("on", dist.Bernoulli(x.new_tensor(0.3)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(on.sum(), 1.0), obs=x)


def endless(x):
    pyro.sample("apart", dist.Normal(x.new_tensor(0.5), 2.0))
    count = pyro.sample("count", dist.Poisson(x.new_tensor(3.0)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(count, 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "guide", "said"),
    [
        (too_many, "mean_field", '"on", have 8,192 joint states, and at most 4,096'),
        (endless, "mean_field", '"count" is a Poisson, which has no end of states'),
        (regimes, "laplace", '"kind" is discrete, so the posterior has no curvature'),
    ],
)
def test_what_cannot_be_enumerated_is_refused(model, guide, said):
    with pytest.raises(UserError, match=said):
        at(model, guide)
