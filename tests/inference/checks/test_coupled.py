"""A chain over the rows of a table is refused, whatever way its states go from row to row."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from svi_problems import F64, batch_of, build

from trainer.errors import UserError
from trainer.inference.checks.coupled import check_states
from trainer.inference.model.plates import PlatedModel
from trainer.inference.setup import mean_field

ONE = torch.ones((), dtype=F64)
Y = torch.randn(30, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
STAY = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=F64)


def means():
    return pyro.sample("means", dist.Normal(0 * ONE, 3.0).expand([2]).to_event(1))


def lagged(y):
    """Each row a time, whose state is likely that of the row before."""
    level = means()
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2, dtype=F64)))
        before = torch.cat([z[..., :1], z[..., :-1]], -1)
        pyro.factor("moved", STAY[before, z].log())
        pyro.sample("y", dist.Normal(level[z], 1.0), obs=y[:, 0])


def of_its_own_moves(y):
    """Where all moves are as likely, as they are at u = 0, the states before do not matter."""
    level = means()
    moves = pyro.sample("moves", dist.Dirichlet(torch.ones(2, 2, dtype=F64)).to_event(1))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2, dtype=F64)))
        before = torch.cat([z[..., :1], z[..., :-1]], -1)
        pyro.sample("moved", dist.Categorical(moves[before]), obs=0 * z)
        pyro.sample("y", dist.Normal(level[z], 1.0), obs=y[:, 0])


def of_the_mean(y):
    level = means()
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.5 * ONE))
        pyro.sample("y", dist.Normal(level[0] + z + z.mean(-1, keepdim=True), 1.0), obs=y[:, 0])


def mixture(y):
    level = means()
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2, dtype=F64)))
        pyro.sample("y", dist.Normal(level[z], 1.0), obs=y[:, 0])


def chain(y):
    level = means()
    with pyro.plate("data", len(y)):
        z = 0
        for t in pyro.markov(range(3)):
            z = pyro.sample(f"z_{t}", dist.Categorical(STAY[z]))
            pyro.sample(f"y_{t}", dist.Normal(level[z], 1.0), obs=y[:, t])


def nested(y):
    level = means()
    with pyro.plate("data", len(y), dim=-2):
        group = pyro.sample("group", dist.OneHotCategorical(torch.ones(2, dtype=F64)))
        with pyro.plate("entries", 3, dim=-1):
            z = pyro.sample("z", dist.Bernoulli(0.3 * ONE))
            pyro.sample("y", dist.Normal((group * level).sum(-1) + z, 1.0), obs=y)


@pytest.mark.parametrize(("model", "site"), [(lagged, "moved"), (of_its_own_moves, "moved"), (of_the_mean, "y")])
def test_states_that_reach_other_rows_are_refused(model, site):
    with pytest.raises(UserError, match=rf'not exchangeable over rows: site "{site}" of a row depends on.*group_by='):
        build(model, mean_field, y=Y)


@pytest.mark.parametrize("model", [mixture, chain, nested])
def test_states_of_a_row_pass(model):
    check_states(PlatedModel(model, ("y",)), batch_of(y=Y))
    check_states(PlatedModel(model, ("y",)), batch_of(y=Y[:1]))


def test_a_model_for_enumerated_states_alone_is_left_alone():
    def model(y):
        level = means()
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2, dtype=F64)))
            pyro.sample("y", dist.Normal(level[z.reshape(2, 1)].sum(0), 1.0), obs=y[:, 0])

    check_states(PlatedModel(model, ("y",)), batch_of(y=Y))
