"""The replayed step, as on a GPU but for the capture (here a step is done again by calling it): equal to eager."""

import pytest
import torch
from svi_problems import F64, build, chunk_of, regression, regression_data

from trainer.inference.optim.optimizers import Adam
from trainer.inference.optim.rounds import Round, Update, one_round
from trainer.inference.optim.schedules import Cosine
from trainer.inference.optim.variance_reduction import Preconditioner
from trainer.inference.programs.fused import Fused
from trainer.inference.programs.program import Eager
from trainer.inference.programs.replay import Replay
from trainer.inference.programs.scan import Scan
from trainer.inference.programs.tracing import trace

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees")


def replayed(fused, state, chunk):
    """`Fused.prepare` without a compiler: the program replays the traced step."""
    function, (first, second) = fused.flat(state, chunk.part(0, 2))
    traced, numbers = trace(function, first, second), fused._numbers(state)
    rates = trace(fused._rates, [state.step, *numbers], [state.step + 1, *numbers])
    fused._constants = (*rates.constants, *traced.constants)
    module = Scan(traced.graph, rates.graph, len(rates.constants))
    fused._call = Replay(module.before, module.step, lambda work: work)
    return fused


@pytest.mark.parametrize("whitened", [False, True])
def test_chunks_of_any_length_equal_eager_steps(whitened):
    """Longer chunks than any before, then shorter ones; the average and the schedule's end among them."""
    inference, theta = build(regression, **regression_data())
    adam, cosine = Adam(lr=0.05), Cosine()
    update = Update((Round(adam, cosine, 9, 7), Round(adam, cosine, 16, 12, start=9)), whitened=whitened)
    factor = torch.tensor([[1.0, 0, 0], [0.3, 0.5, 0], [0.1, -0.2, 2.0]], dtype=F64) if whitened else None
    preconditioner = None if factor is None else Preconditioner(factor, torch.linalg.inv(factor @ factor.T))
    chunk, state = chunk_of(16, 1, 12, x=(3,), y=()), update.init(theta, preconditioner)
    eager = Eager(inference, update, 7, [0])
    program = replayed(Fused(inference, update, 7, [0]), state, chunk)
    wanted, at = state, 0
    for steps in (2, 7, 1, 6):
        part = chunk.part(at, at + steps)
        want, got = eager.run(wanted, part, steps), program.run(state, part, steps)
        for a, b in zip(want.state.named().values(), got.state.named().values()):
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(got.terms, want.terms, rtol=1e-12, atol=0)
        torch.testing.assert_close(got.grad_norm, want.grad_norm, rtol=1e-12, atol=0)
        wanted, state, at = want.state, got.state, at + steps
    assert int(state.step) == 16


def test_what_a_chunk_gave_stays_when_the_next_one_runs():
    inference, theta = build(regression, **regression_data())
    update = one_round(Adam(lr=0.05), Cosine(), 14, 9)
    chunk, state = chunk_of(4, 1, 12, x=(3,), y=()), update.init(theta)
    program = replayed(Fused(inference, update, 7, [0]), state, chunk)
    one = program.run(state, chunk, 2)
    kept = [each.clone() for each in (*one.state.named().values(), one.terms, one.grad_norm)]
    program.run(one.state, chunk.part(2, 4), 2)
    assert all(torch.equal(a, b) for a, b in zip(kept, (*one.state.named().values(), one.terms, one.grad_norm)))


@gpu
def test_a_captured_step_equals_eager_on_a_gpu():
    inference, theta = build(regression, **{k: v.cuda() for k, v in regression_data().items()})
    update = one_round(Adam(lr=0.05), Cosine(), 14, 9)
    chunk = chunk_of(6, 1, 12, x=(3,), y=())
    columns = {name: column.cuda() for name, column in chunk.columns.items()}
    chunk = chunk._replace(columns=columns, valid=chunk.valid.cuda(), batch_rows=chunk.batch_rows.cuda(), row_id=None)
    state = update.init(theta.cuda())
    program = Fused(inference, update, 7, [0])
    program.prepare(state, chunk)
    want, got = Eager(inference, update, 7, [0]).run(state, chunk, 6), program.run(state, chunk, 6)
    for a, b in zip(want.state.named().values(), got.state.named().values()):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)
    assert got.state.theta.dtype == F64
