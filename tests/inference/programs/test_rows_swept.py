"""Rows evaluated by the compiled step: the gradient and the ELBO over all rows that the eager passes give."""

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from svi_problems import F64, build, chunk_of, effects

from trainer.distributed.comm import ALONE
from trainer.inference.estimates.full_elbo import full_elbo
from trainer.inference.estimates.full_gradient import Draws, full_gradient
from trainer.inference.estimates.many_draws import terms_together
from trainer.inference.estimates.passes import Block, Pass
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.optim.optimizers import Adam
from trainer.inference.optim.rounds import one_round
from trainer.inference.optim.schedules import Constant
from trainer.inference.optim.variance_reduction import Preconditioner
from trainer.inference.programs import fused as fused_module
from trainer.inference.programs import sweep as module
from trainer.inference.programs.fused import Fused
from trainer.inference.programs.program import Eager
from trainer.inference.programs.replay import Replay
from trainer.inference.programs.sweep import gives_gradients

ONE, N = torch.ones((), dtype=F64), 40
COLUMNS = {name: column[0, 0] for name, column in chunk_of(1, 1, N, x=(), y=()).columns.items()}


def plain(x, y):
    b = pyro.sample("b", dist.Normal(0 * ONE, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(b * x, 0.8), obs=y)


def problem(model=effects, **objective):
    inference, theta = build(model, num_obs=N, **COLUMNS)
    return replace(inference, objective=ELBO(**objective)), theta


@pytest.fixture(scope="module")
def prepared():
    """(program, a theta, a preconditioner): the traced step, which Python calls."""
    return ready()


def ready(again=None):
    """With integrals as fine as ``again`` says, after the program was prepared before."""
    inference, theta = problem()
    preconditioner = Preconditioner(0.3 * torch.eye(2, dtype=F64), 2.0 + torch.eye(2, dtype=F64))
    update = one_round(Adam(lr=0.05), Constant(), 10, 5, whitened=True)
    program, chunk = Fused(inference, update, 3, [0]), chunk_of(2, 1, 7, x=(), y=())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_module.Fused, "_made", made)
        program.prepare(update.init(theta, preconditioner), chunk, lambda said: None)
        if again is not None:
            inference.model.refine(again)
            program.prepare(update.init(theta, preconditioner), chunk, lambda said: None)
    return program, theta + 0.2, preconditioner


def made(self, traced, rates, state, chunk, say):
    scan = fused_module.Scan(traced.graph, rates.graph, len(rates.constants))
    return lambda: Replay(scan.before, scan.step, lambda work: work)


def rows():
    """Two blocks, whose rows are no multiple of a slot's 7."""
    parts = (slice(0, N // 2), slice(N // 2, N))
    blocks = [Block(n, {k: c[part] for k, c in COLUMNS.items()}, torch.arange(N)[part]) for n, part in enumerate(parts)]
    return Pass(blocks, len(blocks), 5, lambda each: each)


def test_a_pass_gives_the_gradient_of_the_eager_one(prepared, monkeypatch):
    program, theta, preconditioner = prepared
    monkeypatch.setattr(module, "_SLOTS", 2)
    for known in (preconditioner, None):
        given = terms_together(program.inference), theta, rows(), known, Draws(5, 8)
        torch.testing.assert_close(full_gradient(*given, program.sweep()), full_gradient(*given), rtol=1e-10, atol=1e-9)


def test_finer_integrals_leave_nothing_behind():
    program, theta, preconditioner = ready(again=(1, 3, 8))
    together = terms_together(program.inference)
    found = []
    for fineness in ((1, 5, 8), (1, 3, 8)):
        program.inference.model.refine(fineness)
        given = theta, rows(), preconditioner, Draws(5, 8)
        found.append(full_gradient(together, *given))
        assert torch.equal(found[-1], full_gradient(terms_together(program.inference), *given))
    assert not torch.allclose(*found, rtol=1e-6)
    torch.testing.assert_close(full_gradient(together, *given, program.sweep()), found[-1], rtol=1e-10, atol=1e-9)


def test_the_elbo_of_all_rows_is_that_of_the_eager_pass(prepared):
    program, theta, preconditioner = prepared
    want = full_elbo(program.inference, theta, rows(), preconditioner)
    got = full_elbo(program.inference, theta, rows(), preconditioner, program.sweep())
    assert got.__dict__ == pytest.approx(want.__dict__, rel=1e-9)


def test_no_state_of_the_program_is_changed(prepared):
    program, theta, _ = prepared
    sweep = program.sweep()
    before = sweep.state.each(torch.clone)
    found = [sweep(theta, COLUMNS, torch.arange(N), torch.ones(1, 2, dtype=F64)).gradient for _ in range(2)]
    assert torch.equal(*found)
    assert all(torch.equal(a, b) for a, b in zip(before.named().values(), sweep.state.named().values()))


OTHERS = {
    "plain": {"model": plain},
    "pairs": {"pairs": 2},
    "weight": {"kl_weight": 0.5},
    "single": {"antithetic": False},
}


@pytest.mark.parametrize("given", OTHERS.values(), ids=OTHERS)
def test_there_is_none_of_a_model_without_latents_of_rows_or_of_another_objective(given):
    assert gives_gradients(problem()[0], ALONE)
    assert not gives_gradients(problem(**given)[0], ALONE)


def test_there_is_none_before_it_is_prepared_nor_of_several_groups(prepared):
    program, *_ = prepared
    again = program.inference, program.update, 3, [0], ALONE
    assert Fused(*again).sweep() is None
    assert Eager(*again).sweep() is None
    assert module.Sweep.of(None, program.inference, program.sweep().state, chunk_of(2, 2, 7, x=(), y=())) is None
