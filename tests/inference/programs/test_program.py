"""`Eager`'s noise: numbered by the step, the lane group and the pair, whoever holds the group."""

from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import torch
from svi_problems import F64, build, chunk_of, with_objective

from trainer.inference.guides.pyro_guides import PyroGuide
from trainer.inference.model.noise import element_noise, mixed_seed, row_noise
from trainer.inference.model.plates import PlatedModel
from trainer.inference.optim.optimizers import SGD
from trainer.inference.optim.rounds import one_round
from trainer.inference.optim.schedules import Constant
from trainer.inference.programs.program import Eager

PAIRS = 2


def model(x):
    m = pyro.sample("m", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def guide(x):
    pyro.sample("m", dist.Normal(pyro.param("m_loc", torch.zeros((), dtype=F64)), 0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.4, dtype=F64)) * x, 0.2))


def eager(groups, seed=9):
    amortized = lambda _, batch: PyroGuide(PlatedModel(guide, batch.columns))  # noqa: E731
    inference, theta = build(model, amortized, x=torch.linspace(-1, 1, 5, dtype=F64))
    update = one_round(SGD(), Constant(), 10, 10)
    return Eager(with_objective(inference, antithetic=True, pairs=PAIRS), update, seed, groups), update.init(theta)


def part(batch, groups):
    columns = {name: column[groups] for name, column in batch.columns.items()}
    return batch._replace(columns=columns, valid=batch.valid[groups], row_id=batch.row_id[groups])


def test_noise_is_numbered_by_step_group_and_pair():
    program, _ = eager([2, 5])
    batch = chunk_of(1, 2, 5, x=()).slot(0)
    noise = program.noise(7, batch, F64)
    step = torch.tensor(7)
    assert noise.elements.shape == (2, PAIRS, 1)
    assert noise.rows.shape == (2, PAIRS, 5, 1)
    for a, group in enumerate((2, 5)):
        for r in range(PAIRS):
            draw = torch.tensor([group * PAIRS + r])
            assert torch.equal(noise.elements[a, r], element_noise(9, step, draw, 1, F64)[0])
            assert torch.equal(noise.rows[a, r], row_noise(9, step, draw, batch.row_id[a][None], 1, F64)[0])
            assert noise.seeds[a][r] == mixed_seed(9, 7, int(draw))
    everything = torch.cat([noise.elements.flatten(), noise.rows.flatten()])
    assert len(everything.unique()) == len(everything)


def test_whoever_holds_a_group_draws_its_noise():
    batch = chunk_of(1, 4, 5, x=()).slot(0)
    whole = eager([0, 1, 2, 3])[0].noise(3, batch, F64)
    for groups in ([0, 1], [2, 3], [3]):
        mine = eager(groups)[0].noise(3, part(batch, groups), F64)
        assert torch.equal(mine.elements, whole.elements[groups])
        assert torch.equal(mine.rows, whole.rows[groups])
        assert mine.seeds == tuple(whole.seeds[g] for g in groups)


def test_the_step_of_the_state_and_the_seed_number_the_noise():
    """A run that starts at step 3 takes step 3's noise: its terms are those of a run from 0; another seed's are not."""
    chunk = chunk_of(4, 1, 5, x=())
    program, start = eager([0])
    whole = program.run(start, chunk, 4)
    last = type(chunk)({"x": chunk.columns["x"][3:]}, chunk.valid[3:], chunk.batch_rows[3:], chunk.row_id[3:])
    before = program.run(start, chunk, 3).state
    assert torch.equal(program.run(before, last, 1).terms[0], whole.terms[3])
    assert not torch.equal(program.run(before._replace(step=torch.tensor(0)), last, 1).terms[0], whole.terms[3])
    assert not torch.equal(eager([0], seed=8)[0].run(start, chunk, 1).terms, whole.terms[:1])


def test_the_terms_and_the_gradient_are_summed_over_the_ranks():
    """A sum that doubles stands for two ranks with the same rows, each with half of what counts once."""
    chunk = chunk_of(1, 1, 5, x=())
    chunk = chunk._replace(batch_rows=chunk.batch_rows * 2)
    program, start = eager([0])
    ranks = SimpleNamespace(size=2, sum=lambda tensor: 2 * tensor)
    two = Eager(program.inference, program.update, program.seed, [0], ranks)
    twice = type(chunk)(
        {"x": chunk.columns["x"].repeat(1, 2, 1)},
        chunk.valid.repeat(1, 2),
        chunk.batch_rows,
        chunk.row_id.repeat(1, 2, 1),
    )
    one = Eager(program.inference, program.update, program.seed, [0, 0])
    ours, theirs = two.run(start, chunk, 1), one.run(start, twice, 1)
    torch.testing.assert_close(ours.terms, theirs.terms, rtol=1e-13, atol=0)
    torch.testing.assert_close(ours.state.theta, theirs.state.theta, rtol=1e-13, atol=0)
