"""Snapshots are taken where an epoch begins, of the parameters and the gradient there."""

from types import SimpleNamespace

import pytest
import torch

from trainer.engine.module import ChunkModule
from trainer.inference.optim.optimizers import Adam
from trainer.inference.optim.rounds import one_round
from trainer.inference.optim.schedules import Constant
from trainer.training.svrg import TakeSnapshot

N, P, D = 50.0, 5, 2
CURVATURE = torch.arange(1.0, 1 + P, dtype=torch.float64)


class Loss:
    """Of 1/2 sum of c theta^2: its gradient is c theta, in float64."""

    def __init__(self):
        self.asked = []

    def gradient(self, step, theta):
        self.asked.append((step, theta))
        return CURVATURE * theta.double()


def module_at(step, dtype=torch.float64):
    module = ChunkModule()
    module.update = one_round(Adam(), Constant(), 100, 100, anchored=D)
    module.inference = SimpleNamespace(num_obs=N)
    theta = torch.linspace(-1, 1, P, dtype=dtype)
    module.state = module.update.init(torch.zeros_like(theta))._replace(theta=theta, step=torch.tensor(step))
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [0, 10, 20])
def test_a_snapshot_has_theta_and_the_gradient_of_the_locations_a_row(step, dtype):
    module, loss = module_at(step, dtype), Loss()
    TakeSnapshot(loss, lambda at: at % 10 == 0).on_train_batch_start(None, module)
    snapshot, theta = module.state.snapshot, module.state.theta
    assert [at for at, _ in loss.asked] == [step]
    assert torch.equal(snapshot.theta, theta)
    assert snapshot.theta.data_ptr() != theta.data_ptr()
    assert snapshot.gradient.dtype == dtype
    torch.testing.assert_close(snapshot.gradient, (CURVATURE * theta / N)[:D].to(dtype))
    assert int(module.state.step) == step


@pytest.mark.parametrize("step", [1, 9, 11])
def test_within_an_epoch_the_snapshot_stays(step):
    module, loss = module_at(step), Loss()
    before = module.state
    TakeSnapshot(loss, lambda at: at % 10 == 0).on_train_batch_start(None, module)
    assert module.state is before
    assert loss.asked == []
