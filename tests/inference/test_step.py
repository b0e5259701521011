"""The pure step: inert slots, splitting a run, the average of the iterates, and a cost that does not know N."""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from svi_problems import F64, batch_of, build, chunk_of, grad, regression, regression_data, with_objective
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.inference.guides.mean_field import MeanField
from trainer.inference.guides.pyro_guides import PyroGuide
from trainer.inference.model.plates import Batch, PlatedModel
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.optim.optimizers import SGD, Adam, ClippedAdam
from trainer.inference.optim.rounds import Round, State, Update, one_round
from trainer.inference.optim.schedules import Cosine, OneCycle, RobbinsMonro
from trainer.inference.programs.program import Eager
from trainer.inference.setup import set_up

GUIDES = {"mean_field": MeanField, "AutoNormal": lambda model, _: PyroGuide(AutoNormal(model))}


def program(optimizer=None, guide=MeanField, average_from=3, dtype=F64, schedule=None):
    data = {name: column.to(dtype) for name, column in regression_data().items()}
    inference, theta = build(regression, guide, **data)
    inference = with_objective(inference, 1000, antithetic=True, pairs=2)
    update = one_round(optimizer or Adam(lr=0.05), schedule or Cosine(), 8, average_from)
    return Eager(inference, update, 5, [0, 1]), update.init(theta)


def equal(a: State, b: State) -> bool:
    one, other = a.named(), b.named()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def part(chunk: Batch, first: int, last: int) -> Batch:
    columns = {name: column[first:last] for name, column in chunk.columns.items()}
    return Batch(columns, chunk.valid[first:last], chunk.batch_rows[first:last], chunk.row_id[first:last])


OPTIMIZERS = [Adam(lr=0.05, weight_decay=0.1, decoupled=True), ClippedAdam(lr=0.05), SGD(lr=0.1, momentum=0.9)]


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("schedule", [Cosine(), OneCycle(), RobbinsMonro()], ids=lambda s: type(s).__name__)
def test_eight_steps_are_five_and_three_bit_for_bit(guide, schedule):
    chunk = chunk_of(8, 2, 4, x=(3,), y=())
    eager, start = program(guide=GUIDES[guide], schedule=schedule)
    whole = eager.run(start, chunk, 8)
    first = eager.run(start, part(chunk, 0, 5), 5)
    torch.randn(3)
    second = eager.run(first.state, part(chunk, 5, 8), 3)
    assert equal(second.state, whole.state)
    assert torch.equal(torch.cat([first.terms, second.terms]), whole.terms)
    assert torch.equal(torch.cat([first.grad_norm, second.grad_norm]), whole.grad_norm)
    assert equal(eager.run(start, chunk, 5).state, first.state)  # unused slots at the end are not reached


@pytest.mark.parametrize("average_from", [0, 3, 8])
def test_the_average_is_the_mean_of_the_iterates_since_its_start(average_from):
    chunk = chunk_of(8, 2, 4, x=(3,), y=())
    eager, state = program(average_from=average_from)
    iterates = []
    for k in range(8):
        state = eager.run(state, part(chunk, k, k + 1), 1).state
        iterates.append(state.theta)
        counted = iterates[average_from:] or iterates[-1:]  # before its start: the last iterate
        assert int(state.averaged) == max(0, k + 1 - average_from)
        torch.testing.assert_close(state.average, torch.stack(counted).mean(0), rtol=1e-13, atol=1e-13)
    assert int(state.step) == 8


def test_rounds_are_schedules_and_averages_one_after_the_other():
    """The second starts at the full rate where the first ended, with the optimizer's vectors, and an average anew."""
    chunk = chunk_of(8, 2, 4, x=(3,), y=())
    first, second = Round(Adam(lr=0.05), Cosine(), 3, 2), Round(Adam(lr=0.05), Cosine(), 8, 6, start=3)
    both = Update((first, second))
    assert [both.at(step) for step in (0, 2, 3, 7, 8)] == [first, first, second, second, second]
    eager, state = program(average_from=8)
    eager = replace(eager, update=both)
    iterates = []
    for k in range(8):
        round_ = first if k < 3 else second
        rates = round_.rates(torch.tensor(k), eager.inference.num_obs)
        rate = 0.05 * 0.5 * (1 + math.cos(math.pi * (k - round_.start) / (round_.horizon - round_.start)))
        assert float(rates[0]) == pytest.approx(rate / (1 - 0.9 ** (k - round_.start + 1)), rel=1e-12)
        want = round_(state, torch.ones_like(state.theta), rates)
        state = eager.run(state, part(chunk, k, k + 1), 1).state
        iterates.append(state.theta)
        counted = iterates[2:3] if k == 2 else iterates[6:] if k >= 6 else iterates[-1:]
        torch.testing.assert_close(state.average, torch.stack(counted).mean(0), rtol=1e-13, atol=1e-13)
        assert int(state.averaged) == int(want.averaged) == {2: 1, 6: 1, 7: 2}.get(k, 0)


def test_a_step_is_the_gradient_of_the_loss_over_n_at_its_own_rate():
    """SGD, written out: theta_t+1 = theta_t + lr * schedule(t) * grad ELBO / N; the norm and the terms reported are
    those at theta_t."""
    schedule = RobbinsMonro()
    eager, state = program(SGD(lr=0.3), schedule=schedule)
    chunk = chunk_of(4, 2, 4, x=(3,), y=())
    result = eager.run(state, chunk, 4)
    theta = state.theta
    for t in range(4):
        batch, noise = chunk.slot(t), eager.noise(t, chunk.slot(t), F64)
        g = grad(eager.inference, theta, noise, batch, share=0.5) / 1000
        torch.testing.assert_close(result.terms[t], eager.inference.terms(theta, noise, batch, 0.5))
        assert float(result.grad_norm[t]) == pytest.approx(float(g.norm()), rel=1e-12)
        theta = theta + 0.3 * ((t + 2) / 2) ** -0.7 * g
    torch.testing.assert_close(result.state.theta, theta, rtol=1e-12, atol=1e-13)


class Largest(TorchDispatchMode):
    """The most elements that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


PLATES = {
    "len": lambda x, n: pyro.plate("data", len(x)),
    "N, subsampled": lambda x, n: pyro.plate("data", n, subsample_size=len(x)),
}


@pytest.mark.parametrize("plate", PLATES)
@pytest.mark.parametrize("guide", ["mean_field", "AutoNormal", "amortized"])
def test_no_operation_of_a_step_makes_a_tensor_of_n_elements(plate, guide):
    n, rows = 10**8, 32

    def model(x):
        m = pyro.sample("m", dist.Normal(x.new_zeros(()), 1.0))
        with PLATES[plate](x, n):
            z = pyro.sample("z", dist.Normal(m, 1.0)) if guide == "amortized" else m
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def amortized(x):
        pyro.sample("m", dist.Normal(pyro.param("a", torch.zeros((), dtype=F64)), 0.1))
        with PLATES[plate](x, n):
            pyro.sample("z", dist.Normal(pyro.param("b", torch.zeros((), dtype=F64)) * x, 0.1))

    make = {**GUIDES, "amortized": lambda _, batch: PyroGuide(PlatedModel(amortized, batch.columns))}[guide]
    chunk = chunk_of(2, 1, rows, x=())
    update = one_round(Adam(), Cosine(), 2, 0)
    with Largest() as seen:
        batch = batch_of(num_obs=n, x=chunk.columns["x"][0, 0])
        inference, theta = set_up(model, make, batch, n, ELBO("monte_carlo"))
        Eager(inference, update, 0, [0]).run(update.init(theta), chunk, 2)
    assert rows <= seen.elements <= 64 * rows


def test_stock_pyro_does_make_one():
    """What the test above would see without the handler, at a size that this machine can bear."""
    n = 10**5

    def model(x):
        with pyro.plate("data", n, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with Largest() as seen:
        model(torch.zeros(32))
    assert seen.elements >= n
