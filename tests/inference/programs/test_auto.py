"""The default program is the eager one up to a step that counts alone decide, and the compiled one from there on."""

import pytest
import torch
from svi_problems import build, chunk_of, regression

from trainer.errors import UserError
from trainer.inference.optim.optimizers import Adam
from trainer.inference.optim.rounds import Round, Update
from trainer.inference.optim.schedules import Constant
from trainer.inference.programs import auto
from trainer.inference.programs.auto import Auto, stages
from trainer.inference.programs.program import Eager
from trainer.inference.programs.tracing import Untraceable


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([157, 472, 1102, 2362, 4881, 9921, 20_000], (472, 1102)),  # 20,000 steps in seven rounds
        ([645, 1935, 4516], (0, 645)),  # compiled during the first round, which is an epoch of 2.6 million rows
        ([1999, 5997], (0, 1999)),
        ([2000, 6000], (0, 1000)),  # a long first round goes on compiled
        ([20_000], (0, 1000)),
        ([1999], ()),
        ([150, 450, 1050], ()),  # too few steps to be worth a compiler
        ([300, 500, 1600], (300, 500)),  # rounds of a run that was given another end
        ([1], ()),
    ],
)
def test_rounds_decide_when_to_compile(ends, expected):
    assert stages(ends) == expected


class Compiled(Eager):
    """In place of `Fused`: steps of other noise, so that it shows which program took them."""

    def __init__(self, inference, update, seed, *others):
        super().__init__(inference, update, seed + 1, *others)
        self.__dict__["called"] = []

    def begin(self, state, chunk, say=print):
        self.called.append(("begin", int(state.step)))

    def prepare(self, state, chunk, say=print):
        self.called.append(("prepare", int(state.step)))

    def abandon(self):
        self.called.append(("abandon", None))


@pytest.fixture
def made(monkeypatch):
    """Auto with rounds to step 3 and to step 9, 9 slots, and the state before them."""
    monkeypatch.setattr(auto, "Fused", Compiled)
    monkeypatch.setattr(auto, "WORTH", 5)
    chunk = chunk_of(9, 1, 8, x=(2,), y=())
    columns = {name: column[0, 0] for name, column in chunk.columns.items()}
    inference, theta = build(regression, **columns)
    adam, constant = Adam(lr=0.1), Constant()
    update = Update((Round(adam, constant, 3, 2), Round(adam, constant, 9, 6, start=3)))
    return Auto(inference, update, 11, [0]), update.init(theta), chunk


def run(program, state, chunk, stop):
    first = int(state.step)
    return program.run(state, chunk.part(first, stop), stop - first).state


def test_the_steps_before_the_switch_are_eager_and_those_from_it_on_compiled(made):
    program, start, chunk = made
    assert program.stages == (0, 3)
    first = run(program.reference, start, chunk, 3)
    whole = run(program.fused, first, chunk, 9)
    assert torch.equal(run(program, run(program, start, chunk, 3), chunk, 9).theta, whole.theta)
    assert torch.equal(run(program, start, chunk, 3).theta, first.theta)
    assert not torch.equal(run(program.reference, first, chunk, 9).theta, whole.theta)
    assert not torch.equal(run(program.fused, start, chunk, 3).theta, first.theta)


def test_it_is_prepared_for_the_step_that_it_stands_at(made):
    """At the start and at each stage, as at the step at which a run is resumed."""
    program, state, chunk = made
    for at in (0, 2, 3, 7):
        program.prepare(state._replace(step=torch.tensor(at)), chunk)
    program.abandon()
    assert program.fused.called == [("begin", 0), ("begin", 2), ("prepare", 3), ("prepare", 7), ("abandon", None)]


def test_too_few_steps_never_begin(made, monkeypatch):
    program, state, chunk = made
    monkeypatch.setattr(auto, "WORTH", 7)
    small = Auto(program.inference, program.update, 11, [0])
    assert small.stages == ()
    for at in (0, 3, 8):
        small.prepare(state._replace(step=torch.tensor(at)), chunk)
    assert small.fused.called == []
    assert torch.equal(run(small, state, chunk, 9).theta, run(small.reference, state, chunk, 9).theta)


@pytest.mark.parametrize("error", [UserError("two traces differ"), Untraceable("two traces differ")])
@pytest.mark.parametrize(("method", "at"), [("begin", 0), ("prepare", 3)])
def test_what_cannot_be_compiled_is_left_to_the_eager_program(made, monkeypatch, error, method, at):
    """Also what `program=fused` refuses as an error of the user's."""
    program, state, chunk = made

    def refuse(*_):
        raise error

    monkeypatch.setattr(Compiled, method, refuse)
    with pytest.raises(Untraceable, match="two traces differ"):
        program.prepare(state._replace(step=torch.tensor(at)), chunk)
