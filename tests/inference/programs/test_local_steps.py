"""Where local steps are averaged and what is: with a program and ranks whose numbers are known."""

from types import SimpleNamespace

import pytest
import torch
from svi_problems import F64

from trainer.errors import UserError
from trainer.inference.model.plates import Batch
from trainer.inference.optim.optimizers import Adam
from trainer.inference.optim.rounds import one_round
from trainer.inference.optim.schedules import Constant
from trainer.inference.programs.local_steps import LocalSteps
from trainer.inference.programs.program import ChunkResult

UPDATE = one_round(Adam(), Constant(), 100, 0)
OTHER = 3.0
"""The other rank's numbers are so many times this one's."""


class Counting:
    """A program whose every step adds x of its slot to theta; it keeps what it was given."""

    def __init__(self, inference, update, seed, groups):
        self.given, self.runs, self.told = (inference, update, seed, groups), [], []

    def run(self, state, chunk, steps):
        self.runs.append((int(state.step), steps, chunk))
        x = chunk.columns["x"][:steps, 0, 0]
        moments = {name: each + 1 for name, each in state.moments.items()}
        state = state._replace(
            step=state.step + steps, theta=state.theta + x.sum(), average=state.average + 1, moments=moments
        )
        return ChunkResult(state, torch.stack([x, -x], 1), 10 * x)

    def begin(self, state, chunk, say):
        self.told.append(("begin", chunk))

    def prepare(self, state, chunk, say):
        self.told.append(("prepare", chunk))

    def abandon(self):
        self.told.append("abandon")


class Ranks:
    """This rank of two, as a comm."""

    rank, size = 0, 2

    def __init__(self):
        self.sums = []

    def sum(self, tensor):
        self.sums.append(tensor)
        return tensor + OTHER * tensor


def chunk_of(steps, valid=2, batch_rows=4):
    x = torch.arange(1.0, 1 + steps, dtype=F64).view(steps, 1, 1).expand(steps, 1, 2).clone()
    return Batch({"x": x}, torch.full((steps, 1), valid), torch.full((steps,), batch_rows))


def local(sync_every=4, comm=None):
    return LocalSteps(None, UPDATE, 7, [0], comm or Ranks(), sync_every, Counting)


@pytest.mark.parametrize(
    ("begin", "steps", "parts"),
    [
        (0, 4, [(0, 4)]),
        (0, 10, [(0, 4), (4, 4), (8, 2)]),
        (3, 6, [(3, 1), (4, 4), (8, 1)]),
        (8, 3, [(8, 3)]),
        (5, 1, [(5, 1)]),
    ],
)
def test_ranks_are_averaged_at_multiples_of_the_steps_and_at_the_end(begin, steps, parts):
    program, chunk = local(), chunk_of(12)
    state = UPDATE.init(torch.zeros(3, dtype=F64))._replace(step=torch.tensor(begin))
    made = program.run(state, chunk, steps)
    assert [run[:2] for run in program.local.runs] == parts
    assert [run[2].columns["x"][:, 0, 0].tolist() for run in program.local.runs] == [
        [float(1 + at - begin + k) for k in range(count)] for at, count in parts
    ]
    assert int(made.state.step) == begin + steps
    theta = 0.0
    for at, count in parts:
        theta = (1 + OTHER) / 2 * (theta + sum(range(1 + at - begin, 1 + at - begin + count)))
    assert made.state.theta.tolist() == [theta] * 3
    x = torch.arange(1.0, 1 + steps, dtype=F64) * (1 + OTHER) / 2  # figures are means of the ranks too
    torch.testing.assert_close(made.terms, torch.stack([x, -x], 1))
    torch.testing.assert_close(made.grad_norm, 10 * x)


def test_theta_its_average_and_the_moments_are_averaged_in_one_message_and_nothing_else_is():
    comm = Ranks()
    state = UPDATE.init(torch.ones(3, dtype=F64))._replace(averaged=torch.tensor(5))
    made = local(4, comm).run(state, chunk_of(4), 4).state
    assert [len(each) for each in comm.sums] == [4 * 3, 4]  # theta, average and Adam's two; then the figures
    assert made.average.tolist() == [4.0] * 3
    assert {name: each.tolist() for name, each in made.moments.items()} == {"mean": [2.0] * 3, "square": [2.0] * 3}
    assert int(made.averaged) == 5


@pytest.mark.parametrize("valid", [0, 1, 2])
def test_a_ranks_rows_are_its_whole_batch(valid):
    """Of none, one that divides nothing by zero."""
    program, state = local(), UPDATE.init(torch.zeros(3, dtype=F64))
    program.run(state, chunk_of(3, valid), 3)
    program.begin(state, chunk_of(3, valid), print)
    program.prepare(state, chunk_of(3, valid), print)
    program.abandon()
    seen = [program.local.runs[0][2], *(told[1] for told in program.local.told[:2])]
    assert [chunk.batch_rows.tolist() for chunk in seen] == [[max(valid, 1)] * 3] * 3
    assert [each if isinstance(each, str) else each[0] for each in program.local.told] == [
        "begin", "prepare", "abandon",
    ]  # fmt: skip


def test_the_inner_program_is_alone_and_the_reference_runs_its_reference():
    program = local()
    assert program.local.given == (None, UPDATE, 7, [0])  # without the ranks
    program.local.reference = SimpleNamespace(noise=lambda *given: given)
    reference = program.reference
    assert (reference.local, reference.sync_every, reference.comm) == (program.local.reference, 4, program.comm)
    assert program.noise(3, "batch", F64) == (3, "batch", F64)


@pytest.mark.parametrize("sync_every", [0, -1])
def test_at_least_one_step_lies_between_two_averages(sync_every):
    with pytest.raises(UserError, match=f"program.sync_every={sync_every} must be at least 1"):
        local(sync_every)
