"""States of discrete latents given what is observed: by Bayes' rule and by the forward-backward recursions by hand."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from svi_problems import F64

from trainer.inference.model.plates import Batch, PlatedModel
from trainer.inference.rows.marginal import Marginal
from trainer.inference.rows.sites import row_sites
from trainer.inference.rows.sums import drawn_states, states_of

GENERATOR = torch.Generator().manual_seed(1)
Y = torch.randn(5, 4, dtype=F64, generator=GENERATOR)
MOVE = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]], dtype=F64)
MEANS = torch.tensor([-1.0, 0.5, 1.0], dtype=F64)


def found(model, y, draws=0):
    """The probabilities of the states of each site, and their shares in a number of draws: [B, K, other plates]."""
    sites = row_sites(PlatedModel(model, ("y",)), Batch.whole({"y": y}))
    marginal = Marginal(model, "data", sites)
    trace = marginal.factors({"y": y}, {})
    states = states_of(trace, "data")
    tilts = {name: torch.zeros(len(each.values), *each.plates, dtype=F64, requires_grad=True)
             for name, each in states.items()}  # fmt: skip
    marginal.density(trace, len(y), tilts).sum().backward()
    exact = {name: states[name].by_row(each.grad) for name, each in tilts.items()}
    torch.manual_seed(0)
    counts = {name: torch.zeros_like(each) for name, each in exact.items()}
    for _ in range(draws):
        for name, drawn in drawn_states(marginal.factors({"y": y}, {})).items():
            rows = states[name].by_row(drawn).unsqueeze(1)
            counts[name].scatter_add_(1, rows, torch.ones_like(rows, dtype=F64))
    return exact, {name: each / max(draws, 1) for name, each in counts.items()}


def chain(y, length=4):
    with pyro.plate("data", len(y)):
        state = 0
        for t in pyro.markov(range(length)):
            state = pyro.sample(f"z_{t}", dist.Categorical(MOVE[state]))
            pyro.sample(f"y_{t}", dist.Normal(MEANS[state], 1.0), obs=y[:, t])


def smoothed(y):
    """[T, B, K] by the forward-backward algorithm."""
    seen = dist.Normal(MEANS, 1.0).log_prob(y[..., None])
    forward = [MOVE[0].log() + seen[:, 0]]
    for t in range(1, 4):
        forward.append(torch.logsumexp(forward[-1][:, :, None] + MOVE.log(), 1) + seen[:, t])
    backward = [torch.zeros_like(forward[0])]
    for t in reversed(range(1, 4)):
        backward.insert(0, torch.logsumexp(MOVE.log() + (seen[:, t] + backward[0])[:, None], 2))
    return torch.stack([torch.softmax(a + b, 1) for a, b in zip(forward, backward)])


def test_a_chain_is_smoothed():
    exact, shares = found(chain, Y, 2000)
    for t, want in enumerate(smoothed(Y)):
        torch.testing.assert_close(exact[f"z_{t}"], want, rtol=0, atol=1e-12)
        torch.testing.assert_close(shares[f"z_{t}"], want, rtol=0, atol=5 * 0.5 / 2000**0.5)


def test_states_are_drawn_jointly():
    """Of a chain that never moves, every state is the first one."""

    def still(y):
        with pyro.plate("data", len(y)):
            first = pyro.sample("z_0", dist.Categorical(MOVE[0]))
            second = pyro.sample("z_1", dist.Categorical(torch.eye(3, dtype=F64)[first]))
            pyro.sample("y", dist.Normal(MEANS[second], 1.0), obs=y[:, 0])

    marginal = Marginal(still, "data", row_sites(PlatedModel(still, ("y",)), Batch.whole({"y": Y})))
    torch.manual_seed(0)
    drawn = drawn_states(marginal.factors({"y": Y}, {}))
    assert torch.equal(drawn["z_0"], drawn["z_1"])


@pytest.mark.parametrize("rows", [1, 5])
def test_states_of_nested_plates_and_of_the_row_above_them(rows):
    share, y = torch.tensor([0.4, 0.6], dtype=F64), Y[:rows]
    weights = torch.tensor([[0.7, 0.3], [0.1, 0.9]], dtype=F64)

    def model(y):
        with pyro.plate("data", len(y)):
            group = pyro.sample("group", dist.Bernoulli(share[1])).long()
            with pyro.plate("entries", y.shape[1]):
                k = pyro.sample("k", dist.Categorical(weights[group]))
                pyro.sample("y", dist.Normal(3.0 * k, 1.0), obs=y.T)

    joint = weights.log() + dist.Normal(torch.tensor([0.0, 3.0], dtype=F64), 1.0).log_prob(y[..., None, None])
    group = torch.softmax(share.log() + joint.logsumexp(-1).sum(1), 1)  # [B, 2]
    of_entries = torch.softmax(joint, -1)  # [B, entries, group, k]
    want = torch.einsum("bg,begk->bke", group, of_entries)
    exact, shares = found(model, y, 2000)
    torch.testing.assert_close(exact["group"], group, rtol=0, atol=1e-12)
    torch.testing.assert_close(exact["k"], want, rtol=0, atol=1e-12)
    torch.testing.assert_close(shares["group"], group, rtol=0, atol=5 * 0.5 / 2000**0.5)
    torch.testing.assert_close(shares["k"], want, rtol=0, atol=5 * 0.5 / 2000**0.5)


def test_a_latent_that_nothing_tells_of_has_its_prior():
    seen = torch.tensor([True, False, True, False, True])

    def model(y):
        with pyro.plate("data", len(y)), poutine.mask(mask=seen):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))
            pyro.sample("y", dist.Normal(k, 1.0), obs=y[:, 0])

    prior = torch.tensor([0.7, 0.3], dtype=F64)
    want = torch.softmax(prior.log() + dist.Normal(torch.tensor([0.0, 1.0], dtype=F64), 1.0).log_prob(Y[:, :1]), 1)
    exact, shares = found(model, Y, 2000)
    want = torch.where(seen[:, None], want, prior)
    torch.testing.assert_close(exact["k"], want, rtol=0, atol=1e-12)
    torch.testing.assert_close(shares["k"], want, rtol=0, atol=5 * 0.5 / 2000**0.5)


def test_states_have_their_values():
    def model(y):
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Binomial(3, torch.tensor(0.3, dtype=F64)))
            hot = pyro.sample("hot", dist.OneHotCategorical(MOVE[0]))
            pyro.sample("y", dist.Normal(k + hot @ MEANS, 1.0), obs=y[:, 0])

    marginal = Marginal(model, "data", row_sites(PlatedModel(model, ("y",)), Batch.whole({"y": Y})))
    states = states_of(marginal.factors({"y": Y}, {}), "data")
    assert states["k"].values.tolist() == [0, 1, 2, 3]
    assert torch.equal(states["hot"].values, torch.eye(3, dtype=F64))
    exact, _ = found(model, Y)
    assert exact["hot"].shape == (5, 3)
