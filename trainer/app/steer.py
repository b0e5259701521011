"""What training steers by, taken anew from where it is: the curvature at each round, the anchor at each epoch."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback

from trainer.app.blocks import AllRows
from trainer.lit.module import VariationalModule
from trainer.lit.strategy import from_rank_zero
from trainer.svi.start import whitening_at
from trainer.svi.step import StepBatch
from trainer.svi.variance import Anchor


class MoveAnchor(Callback):
    """Sets the state's `Anchor` every ``every`` steps (an epoch), from a pass over all rows."""

    def __init__(self, rows: AllRows, every: int):
        self.rows, self.every = rows, every

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        assert isinstance(module, VariationalModule)
        if module.step % self.every == 0:
            theta = module.state.theta.clone()
            gradient = self.rows.gradient(trainer, theta) / module.inference.num_obs
            anchor = Anchor(theta, gradient[: module.update.anchored].to(theta.dtype))
            module.state = module.state._replace(slots=(*module.state.slots[:-2], *anchor))


class RefreshWhitening(Callback):
    """Sets the state's `Whitening` at the start of each round but the first, from a sample of the rows."""

    def __init__(self, sample: StepBatch):
        self.sample = sample

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        assert isinstance(module, VariationalModule)
        if module.step and module.step == module.update.at(module.step).start:
            made = whitening_at(module.inference, module.theta.cpu(), self.sample)
            whitening = [from_rank_zero(each.to(module.device)) for each in made]
            own, _, anchor = module.update.split(module.state.slots)
            module.state = module.state._replace(slots=(*own, *whitening, *(anchor or ())))
