"""A checkpoint gives back the state by name, also one that was written before tensors had names."""

import pytest
import torch

from trainer.engine.checkpoint import load, packed, save, unpacked
from trainer.errors import UserError
from trainer.inference.optim.optimizers import SGD, Adam
from trainer.inference.optim.rounds import State, one_round
from trainer.inference.optim.schedules import Constant
from trainer.inference.optim.variance_reduction import Preconditioner

THETA = torch.arange(6.0)
CURVATURE = Preconditioner(torch.eye(3) * 2, torch.eye(3) * 5)
KINDS = [(optimizer, whitened, anchored) for optimizer in (Adam(), SGD()) for whitened in (0, 1) for anchored in (0, 3)]


def state_of(optimizer, whitened: bool, anchored: int) -> State:
    """A state of which all tensors differ."""
    update = one_round(optimizer, Constant(), 10, 5, whitened=bool(whitened), anchored=anchored)
    made = update.init(THETA, CURVATURE if whitened else None)
    numbers = iter(range(100))
    return made.each(lambda tensor: tensor + next(numbers))


def same(one: State, other: State) -> bool:
    a, b = one.named(), other.named()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_saved_comes_back(kind, tmp_path):
    state = state_of(*kind)
    save(tmp_path / "a.ckpt", state, {"told": 1})
    again, record = load(tmp_path / "a.ckpt")
    assert same(state, again)
    assert record == {"told": 1}
    assert type(again.preconditioner) is type(state.preconditioner)
    assert type(again.snapshot) is type(state.snapshot)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_one_of_format_1_held_the_tensors_in_this_order(kind):
    state = state_of(*kind)
    own = [state.step, state.theta, state.average, state.averaged, *state.moments.values()]
    parts = [*(state.preconditioner or ()), *(state.snapshot or ())]
    old = [*own, *(part for part in parts if part is not None)]
    again, record = unpacked({"format": 1, "state": old, "facts": {"told": 1}}, "it")
    assert same(state, again)
    assert record == {"told": 1}


def test_the_names_are_those_of_the_parts():
    names = list(packed(state_of(Adam(), True, 3), {})["state"])
    assert names == [
        *("step", "theta", "average", "averaged", "optimizer.mean", "optimizer.square"),
        *("preconditioner.factor", "preconditioner.curvature", "snapshot.theta", "snapshot.gradient"),
    ]


def test_one_of_a_later_version_is_refused():
    with pytest.raises(UserError, match="it has format 3 where this version reads 2: resume it with the version"):
        unpacked({"format": 3, "state": {}, "facts": {}}, "it")
