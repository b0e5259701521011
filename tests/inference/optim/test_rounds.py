"""States by name, and rounds against torch's own optimizers and plain means of the iterates."""

import pytest
import torch
from svi_problems import F64

from trainer.inference.optim.optimizers import SGD, Adam
from trainer.inference.optim.rounds import Round, State, Update, one_round
from trainer.inference.optim.schedules import Constant, Cosine, RobbinsMonro
from trainer.inference.optim.variance_reduction import Preconditioner, Snapshot

P, D = 5, 2


def vector(seed, size=P, dtype=F64):
    return torch.randn(size, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def state_of(optimizer=None, dtype=F64, preconditioner=None, snapshot=None):
    theta = vector(0, dtype=dtype)
    zero = torch.zeros((), dtype=torch.int64)
    moments = (optimizer or Adam()).init(theta)
    return State(zero, theta, theta.clone(), zero.clone(), moments, preconditioner, snapshot)


FACTOR = torch.tensor([[2.0, 0.0], [0.5, 3.0]], dtype=F64)
PARTS = {
    "plain": {},
    "preconditioner": {"preconditioner": Preconditioner(FACTOR, torch.eye(D, dtype=F64))},
    "units": {"preconditioner": Preconditioner(FACTOR, torch.eye(D, dtype=F64), vector(3, P - D))},
    "snapshot": {"snapshot": Snapshot(vector(1), vector(2, D))},
}
PARTS["both"] = PARTS["preconditioner"] | PARTS["snapshot"]


@pytest.mark.parametrize("parts", PARTS)
def test_a_state_goes_through_its_names(parts):
    state = state_of(**PARTS[parts])
    named = state.named()
    want = ["step", "theta", "average", "averaged", "optimizer.mean", "optimizer.square"]
    want += ["preconditioner.factor", "preconditioner.curvature"] if state.preconditioner else []
    want += ["preconditioner.units"] if parts == "units" else []
    want += ["snapshot.theta", "snapshot.gradient"] if state.snapshot else []
    assert list(named) == want
    back = State.of_named(named)
    assert list(back.named()) == want
    for stored in (back, State.of_named(dict(sorted(named.items())))):  # in whatever order they were stored
        assert stored.named().keys() == named.keys()
        assert all(value is named[name] for name, value in stored.named().items())
    assert (back.preconditioner is None, back.snapshot is None) == (
        state.preconditioner is None,
        state.snapshot is None,
    )


def test_an_optimizer_may_remember_nothing():
    state = state_of()._replace(moments={})
    assert State.of_named(state.named()).moments == {}


def test_a_change_is_made_to_every_tensor_once():
    state, seen = state_of(**PARTS["both"]), []

    def change(tensor):
        seen.append(tensor)
        return tensor.clone()

    changed = state.each(change)
    assert len(seen) == len(state.named()) == 10
    for name, value in changed.named().items():
        assert torch.equal(value, state.named()[name])
        assert value is not state.named()[name]


def walked(rounds, optimizer, state, num_obs=1.0):
    """Every state of an update on gradients of its own."""
    update, states = Update(tuple(rounds)), []
    for k in range(update.horizon):
        here = update.at(k)
        state = here(state, vector(100 + k, dtype=state.theta.dtype), here.rates(state.step, num_obs))
        states.append(state)
    return states


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_round_is_torchs_optimizer_begun_afresh(kind):
    """Its moments too, and the schedule by the steps since its start."""
    ours = Adam(lr=0.1) if kind == "adam" else SGD(lr=0.1, momentum=0.9)
    rounds = [Round(ours, Cosine(), 4, 4), Round(ours, Cosine(), 10, 10, 4)]
    states = walked(rounds, ours, state_of(ours))
    theta = torch.nn.Parameter(state_of().theta.clone())
    step = 0
    for steps in (4, 6):
        theirs = torch.optim.Adam([theta], 0.1) if kind == "adam" else torch.optim.SGD([theta], 0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, steps)
        for _ in range(steps):
            theta.grad = vector(100 + step)
            theirs.step()
            schedule.step()
            torch.testing.assert_close(states[step].theta, theta.detach(), rtol=1e-12, atol=1e-12)
            step += 1
            assert int(states[step - 1].step) == step


@pytest.mark.parametrize(("average_from", "start"), [(0, 0), (3, 0), (7, 0), (8, 0), (5, 4)])
def test_the_average_is_the_mean_of_the_iterates_from_its_first_step_on(average_from, start):
    optimizer = SGD(lr=0.1)
    rounds = [Round(optimizer, Constant(), 8, average_from, start)]
    rounds = [Round(optimizer, Constant(), start, 2), *rounds] if start else rounds
    states = walked(rounds, optimizer, state_of(optimizer))
    for k in range(start, 8):
        mine = torch.stack([states[i].theta for i in range(average_from, k + 1)]) if k >= average_from else None
        want = states[k].theta if mine is None else mine.mean(0)
        torch.testing.assert_close(states[k].average, want, rtol=1e-12, atol=1e-14)
        assert int(states[k].averaged) == (0 if mine is None else len(mine))


def test_the_rates_are_those_of_the_schedule_from_the_start():
    optimizer = SGD(lr=0.4)
    here = Round(optimizer, RobbinsMonro(delay=1.0, forgetting=1.0), 30, 30, 10)
    assert [float(here.lr(torch.tensor(10 + t))) for t in (0, 1, 2)] == pytest.approx([0.4, 0.4 * 2 / 3, 0.4 / 2])
    assert float(here.rates(torch.tensor(12), 7.0)[0]) == pytest.approx(0.2)
    adam = Round(Adam(lr=1.0, beta1=0.5), Constant(), 30, 30, 10)
    assert float(adam.rates(torch.tensor(10), 1.0)[0]) == pytest.approx(1 / (1 - 0.5))  # the first update of its own


def test_a_whitened_step_of_the_locations_is_one_by_the_inverse_hessian():
    """loc - lr L L' g; the other parameters step as ever, and the curvature has no part in it."""
    optimizer, preconditioner = SGD(lr=0.1), PARTS["preconditioner"]["preconditioner"]
    state = state_of(optimizer, preconditioner=preconditioner)
    here = Round(optimizer, Constant(), 5, 5)
    grad = vector(3)
    made = here(state, grad, here.rates(state.step, 1.0))
    torch.testing.assert_close(made.theta[:D], state.theta[:D] - 0.1 * FACTOR @ FACTOR.T @ grad[:D])
    torch.testing.assert_close(made.theta[D:], state.theta[D:] - 0.1 * grad[D:])
    assert made.preconditioner is preconditioner


@pytest.mark.parametrize("whitened", [False, True])
def test_float32_stays_float32(whitened):
    """Though rates are float64."""
    parts = Preconditioner(FACTOR.float(), torch.eye(D)) if whitened else None
    state = state_of(dtype=torch.float32, preconditioner=parts)
    here = Round(Adam(), Cosine(), 5, 1)
    for k in range(3):
        state = here(state, vector(k, dtype=torch.float32), here.rates(state.step, 10.0))
    dtypes = {name: value.dtype for name, value in state.named().items()}
    assert dtypes.pop("step") == dtypes.pop("averaged") == torch.int64
    assert set(dtypes.values()) == {torch.float32}


def test_a_step_lies_in_the_round_that_has_begun():
    rounds = tuple(Round(SGD(), Constant(), end, end, start) for start, end in ((0, 3), (3, 4), (4, 10)))
    update = Update(rounds)
    assert update.horizon == 10
    assert [rounds.index(update.at(step)) for step in range(12)] == [0, 0, 0, 1, *[2] * 8]


def test_the_first_state_shares_nothing_with_what_made_it():
    theta, preconditioner = vector(0), PARTS["preconditioner"]["preconditioner"]
    update = one_round(Adam(), Constant(), 5, 2, whitened=True, anchored=D)
    state = update.init(theta, preconditioner)
    assert (int(state.step), int(state.averaged), state.step.dtype) == (0, 0, torch.int64)
    assert torch.equal(state.snapshot.theta, theta)
    assert state.snapshot.gradient.tolist() == [0.0] * D
    for name, value in state.named().items():
        value.add_(1)
        assert name in ("step", "averaged") or value.data_ptr() not in (
            theta.data_ptr(), preconditioner.factor.data_ptr(), preconditioner.curvature.data_ptr(),
        )  # fmt: skip
    assert torch.equal(theta, vector(0))
    assert len({value.data_ptr() for value in state.named().values()}) == len(state.named())
    plain = one_round(Adam(), Constant(), 5, 2).init(theta)
    assert plain.preconditioner is plain.snapshot is None
