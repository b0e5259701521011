"""What every program keeps to, whatever runs its steps: run for each of them."""

import pytest
import torch
from svi_problems import F64, build, chunk_of, regression

from trainer.distributed.comm import ALONE
from trainer.inference.optim.optimizers import Adam
from trainer.inference.optim.rounds import one_round
from trainer.inference.optim.schedules import Constant
from trainer.inference.programs.auto import Auto
from trainer.inference.programs.fused import Fused
from trainer.inference.programs.local_steps import LocalSteps
from trainer.inference.programs.program import Eager

STEPS = 6
MEMBERS = {
    "eager": Eager,
    "auto": Auto,
    "local steps": lambda *given: LocalSteps(*given, sync_every=2, program=Eager),
    "fused": Fused,
}
GROUP = pytest.mark.xdist_group("fused")


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.slow, GROUP] if name == "fused" else []) for name in MEMBERS]
)
def member(request, compiled_folder, monkeypatch):
    """(program, its first state, a chunk)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(compiled_folder))
    chunk = chunk_of(STEPS, 1, 8, F64, x=(2,), y=())
    inference, theta = build(regression, **{name: column[0, 0] for name, column in chunk.columns.items()})
    update = one_round(Adam(lr=0.01), Constant(), STEPS, 2)
    program = MEMBERS[request.param](inference, update, 3, [0], ALONE)
    state = update.init(theta)
    program.begin(state, chunk, lambda sentence: None)
    program.prepare(state, chunk, lambda sentence: None)
    yield program, state, chunk
    program.abandon()


def test_its_steps_are_those_of_its_reference(member):
    program, state, chunk = member
    want, got = (each.run(state, chunk, STEPS) for each in (program.reference, program))
    assert got.terms.shape == (STEPS, len(program.inference.sites))
    assert got.grad_norm.shape == (STEPS,)
    for one, other in zip((*want.state, want.terms, want.grad_norm), (*got.state, got.terms, got.grad_norm)):
        for a, b in zip(*(each if isinstance(each, tuple) else (each,) for each in (one, other)), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)
    assert int(got.state.step) == STEPS


def test_a_chunk_may_end_at_any_multiple_of_its_unit(member):
    """Two runs of parts have the bits of one run; slots that are not used change nothing."""
    program, state, chunk = member
    whole = program.run(state, chunk, STEPS).state
    for cut in range(program.sync_every, STEPS, program.sync_every):
        first = program.run(state, chunk, cut).state
        rest = program.run(first, chunk.part(cut, STEPS), STEPS - cut).state
        assert torch.equal(rest.theta, whole.theta)
        assert torch.equal(rest.average, whole.average)


def test_it_says_where_it_changes_and_who_runs_it(member):
    program, state, chunk = member
    assert program.comm is ALONE
    assert list(program.stages) == sorted(set(program.stages))
    batch = chunk.slot(0)
    elements = program.reference.noise(0, batch, F64).elements
    assert elements.shape == (1, 1, program.inference.guide.noise_size[0])
    assert torch.equal(elements, program.reference.noise(0, batch, F64).elements)
    assert not torch.equal(elements, program.reference.noise(1, batch, F64).elements)
    assert len(state.theta) == program.inference.parameters.size
