"""SVRG: the gradient over all rows at a snapshot of the parameters, taken anew at each epoch.

Source: Johnson and Zhang, "Accelerating stochastic gradient descent using predictive variance reduction", NIPS 2013.
"""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback

from trainer.engine.module import ChunkModule
from trainer.inference.optim.variance_reduction import Snapshot
from trainer.posterior.full_data import FullLoss


class TakeSnapshot(Callback):
    """Sets the state's `Snapshot` before each step at which an epoch ``begins``, from a pass over all rows."""

    def __init__(self, loss: FullLoss, begins: Callable[[int], bool]):
        self.loss, self.begins = loss, begins

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        assert isinstance(module, ChunkModule)
        if self.begins(module.step):
            theta = module.state.theta.clone()
            gradient = self.loss.gradient(module.step, theta) / module.inference.num_obs
            snapshot = Snapshot(theta, gradient[: module.update.anchored].to(theta.dtype))
            module.state = module.state._replace(snapshot=snapshot)
