"""The weight of the KL terms: in the gradient alone, a function of the step, an input of the compiled step."""

from dataclasses import replace

import pytest
import torch
from svi_problems import F64, build, chunk_of, grad, noise_of, one_group, regression, regression_data, with_objective

from trainer.distributed.comm import ALONE
from trainer.inference.optim.optimizers import SGD, Adam
from trainer.inference.optim.rounds import one_round
from trainer.inference.optim.schedules import Constant
from trainer.inference.programs.fused import Fused
from trainer.inference.programs.program import Eager
from trainer.inference.step import StepInput, step

DATA = regression_data()


def problem(**warmup):
    inference, theta = build(regression, **DATA)
    return with_objective(inference, **warmup), theta + 0.3


def test_it_rises_in_a_line_to_one_and_stays_there():
    objective = problem(kl_weight=0.2, kl_warmup=4)[0].objective
    weights = [float(objective.kl_weight_at(torch.tensor(at))) for at in (0, 1, 2, 4, 5, 10**12)]
    assert weights == pytest.approx([0.2, 0.4, 0.6, 1.0, 1.0, 1.0], abs=1e-15)
    assert objective.warmup == 4
    assert replace(objective, kl_weight=1.0).warmup == 0


@pytest.mark.parametrize(("at", "weight"), [(0, 0.2), (1, 0.4), (7, 1.0)])
def test_a_step_raises_the_likelihood_and_weighted_others_and_reports_the_elbo(at, weight):
    """By the gradients of either part: theta of a model without data has no likelihood."""
    inference, theta = problem(kl_weight=0.2, kl_warmup=4)
    noise, batch = noise_of(torch.full((1, 1, 3), 0.7, dtype=F64)), one_group(**DATA)
    update = one_round(SGD(lr=1.0), Constant(), 10, 10)
    state = update.init(theta)._replace(step=torch.tensor(at))
    (round_,) = update.rounds
    made, terms, norm = step(
        inference, round_, ALONE, state, StepInput(noise, batch, inference.rates(round_, state.step))
    )
    of_all = grad(inference, theta, noise, batch)
    of_kl = grad(replace(inference, sites=("w",), kinds=("kl_global",)), theta, noise, batch)
    want = (of_all - (1 - weight) * of_kl) / inference.num_obs
    torch.testing.assert_close(made.theta - theta, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(norm, want.norm(), rtol=1e-12, atol=0)
    assert torch.equal(terms, inference.terms(theta, noise, batch, 1.0))
    assert torch.equal(terms, replace(inference, objective=problem()[0].objective).terms(theta, noise, batch, 1.0))


def test_a_run_cut_within_it_is_bit_equal():
    inference, theta = problem(kl_weight=0.0, kl_warmup=6)
    chunk, update = chunk_of(8, 2, 4, x=(3,), y=()), one_round(Adam(lr=0.05), Constant(), 8, 8)
    eager = Eager(inference, update, 5, [0, 1])
    whole = eager.run(update.init(theta), chunk, 8)
    first = eager.run(update.init(theta), chunk, 3)
    second = eager.run(first.state, chunk.part(3, 8), 5)
    assert torch.equal(second.state.theta, whole.state.theta)
    plain = replace(eager, inference=problem()[0]).run(update.init(theta), chunk, 8)
    assert not torch.allclose(plain.state.theta, whole.state.theta, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.xdist_group("fused")
def test_the_compiled_step_takes_it_as_an_input(compiled_folder, monkeypatch):
    """Equal to the eager one, and another warm-up compiles nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(compiled_folder))
    chunk = chunk_of(6, 1, 8, F64, x=(3,), y=())
    said: list[str] = []
    for warmup in ({"kl_weight": 0.1, "kl_warmup": 4}, {"kl_weight": 0.5, "kl_warmup": 3}):
        inference, theta = problem(**warmup)
        update = one_round(Adam(lr=0.05), Constant(), 6, 6)
        fused = Fused(inference, update, 3, [0])
        fused.prepare(update.init(theta), chunk, said.append)
        want, got = (each.run(update.init(theta), chunk, 6) for each in (fused.reference, fused))
        torch.testing.assert_close(got.state.theta, want.state.theta, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(got.terms, want.terms, rtol=1e-10, atol=1e-10)
    assert said[-1] == "compiled step found in the cache"
    assert "compiled step found in the cache" not in said[0], said
