"""What training steers by, taken anew from where it is: the anchor at each epoch; at the end of each round its average,
brought to the optimum by Newton steps where the curvature is known, and the curvature there.
"""

import math
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback
from torch import Tensor

from trainer.app.blocks import AllRows
from trainer.lit.module import VariationalModule
from trainer.lit.strategy import from_rank_zero
from trainer.posterior.convergence import step_to_go
from trainer.posterior.newton import polished
from trainer.svi.start import whitening_at
from trainer.svi.step import StepBatch
from trainer.svi.variance import Anchor, Whitening


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


class EndRound:
    """Goes on from the round's average; with a `Whitening`, after Newton steps, and with the curvature at that place.

    ``sample``: the rows that give the curvature.
    """

    def __init__(self, rows: AllRows, sample: StepBatch):
        self.rows, self.sample = rows, sample

    def __call__(self, trainer: pl.Trainer, module: VariationalModule) -> tuple[bool, float]:
        """Whether Newton steps have replaced the average, and what is left to go, in scales (nan: not known)."""
        average, slots, left = module.theta, module.state.slots, math.nan
        own, whitening, _ = module.update.split(slots)
        theta = average
        if whitening is not None:
            theta, whitening, left = self._to_optimum(trainer, module, average, whitening)
            slots = (*own, *whitening)
        module.state = module.state._replace(theta=theta, average=theta.clone(), slots=slots)
        return theta is not average, left

    def _to_optimum(
        self, trainer: pl.Trainer, module: VariationalModule, theta: Tensor, whitening: Whitening
    ) -> tuple[Tensor, Whitening, float]:
        """By the curvature known so far, then by that of the place this leads to, which also says what is left."""
        inference, rows = module.inference, self.rows

        def moved(theta: Tensor, found: Tensor, by: Whitening) -> tuple[Tensor, Tensor]:
            made, found = polished(inference, theta, found, by, lambda at, new: rows.gradient(trainer, at, by, new))
            return (theta if made is theta else from_rank_zero(made)), found

        theta, found = moved(theta, rows.gradient(trainer, theta, whitening, fresh=True), whitening)
        made = whitening_at(inference, theta.cpu(), self.sample)
        whitening = Whitening(*(from_rank_zero(each.to(module.device)) for each in made))
        theta, found = moved(theta, found, whitening)
        return theta, whitening, step_to_go(inference, theta, found, whitening)
