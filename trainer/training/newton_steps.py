"""The end of a round: its average, brought to the optimum by Newton steps where the curvature is known, and the
curvature there.
"""

import math

import torch
from torch import Tensor

from trainer.engine.module import ChunkModule
from trainer.engine.train_state import TrainState
from trainer.inference.estimates.full_gradient import MANY, Draws
from trainer.inference.guides.gaussian import GaussianView
from trainer.inference.model.noise import mixed_seed
from trainer.inference.model.plates import Batch
from trainer.inference.optim.variance_reduction import Preconditioner
from trainer.inference.recipe.convergence import Rule, newton_step, step_to_go
from trainer.inference.recipe.laplace import preconditioner_at
from trainer.inference.recipe.newton import NEAR, polished, step_by_products
from trainer.inference.recipe.off_saddle import falls_at, left
from trainer.inference.recipe.optimum import settled
from trainer.posterior.full_data import FullLoss

_FEW_ROWS = 64  # of the sample, for guides that look at columns
_AGAIN = 4  # times as many steps, before what failed is tried again
_SAME = 0.001  # scales that the covariance may be off where it is taken as that of its own curvature
_CURVATURES = 8  # of a covariance that is made of them, until it is that of its own draws
_SADDLE = "not converged, since the ELBO rises to both sides of a saddle"
_LEVELS = tuple(MANY._replace(pairs=times * MANY.pairs) for times in (1, 4, 16))


class EndRound:
    """Continues from the round's average after Newton steps: with a `Preconditioner` by that curvature, which is then
    taken anew at that place; without one by passes over all rows, after ``afford`` steps (None: never), and where they
    fail, after four times as many.

    A guide of Pyro's or the user's is brought to its optimum over all rows, what is left in nats for each parameter.
    ``sample``: the rows that give the curvature.
    """

    def __init__(self, loss: FullLoss, sample: Batch, afford: int | None, record: TrainState):
        self.loss, self.sample, self.afford, self.record = loss, sample, afford, record

    def __call__(self, module: ChunkModule) -> tuple[bool, float]:
        """Whether Newton steps have replaced the average, and what is left to go, in scales (nan: not known)."""
        average, preconditioner, left, record = module.theta, module.state.preconditioner, math.nan, self.record
        theta = average
        view = module.inference.gaussian
        if preconditioner is not None and view is not None:
            theta, preconditioner, left = self._by_curvature(module, view, average, preconditioner)
        elif self._can_afford(module.step) and (view is None or view.covariance.independent):
            if view is None:
                theta, left = self._settled(module, average)
            else:
                theta, left = self._by_products(module, view, average)
            if theta is average:
                record.no_newton_at = module.step
        module.state = module.state._replace(theta=theta, average=theta.clone(), preconditioner=preconditioner)
        return theta is not average, left

    def off_saddle(self, module: ChunkModule, last: bool) -> bool:
        """Whether the ELBO of the sample curves upwards at the round's average, which then is no optimum.

        Training goes on from where the best of several pushes leads, unless this round is the ``last``.
        """
        known, theta, here = module.state.preconditioner, module.theta.cpu(), f"step {module.step:,}"
        if known is not None and known.factor.count_nonzero() > len(known.factor):  # of a curvature that is positive
            return False
        seed = mixed_seed(self.loss.seed, module.step, 0x5ADD1E)
        directions = falls_at(module.inference, theta, self.sample, seed)
        if not module.comm.largest(len(directions), module.device):
            return False
        if last:
            module.say(f"{here}: {_SADDLE}; train longer with max_epochs= or max_steps=")
            return True
        theta, best = left(module.inference, theta, self.sample, directions, seed)
        module.say(f"{here}: {_SADDLE}; {best.sentence() if best else 'no push has found a better place'}")
        if known is not None:
            made = preconditioner_at(module.inference, theta, self.sample)
            known = made.each(lambda part: module.comm.from_first(part.to(module.device)))
        theta = module.comm.from_first(theta.to(module.device))
        module.state = module.state._replace(theta=theta, average=theta.clone(), preconditioner=known)
        return True

    def _can_afford(self, step: int) -> bool:
        return self.afford is not None and step > max(self.afford, _AGAIN * self.record.no_newton_at)

    def _by_curvature(
        self, module: ChunkModule, view: GaussianView, theta: Tensor, preconditioner: Preconditioner
    ) -> tuple[Tensor, Preconditioner, float]:
        """By the curvature known so far, then by that of the place this leads to, which also says what is left.

        A covariance that is the inverse of the mean curvature under itself is taken again until it is, and what is left
        is that by the curvature of other draws.
        """
        repeats = not view.covariance.independent
        steps = _Curved(self, module, view, preconditioner)
        theta, found = steps.moved(theta, steps.gradient(theta), _SAME if repeats else NEAR)
        for _ in range(_CURVATURES if repeats else 1):
            before = theta
            steps.preconditioner = self._curvature(module, theta)
            theta, found = steps.moved(theta, found, NEAR)
            theta = steps.widened(theta, found) if repeats else theta
            if theta is before:
                break
        if repeats:
            steps.preconditioner = self._curvature(module, theta, seed=1)
        left = steps.left(theta, found)
        if left <= Rule().gradient:  # one of many readings may be so small by luck: four times the draws tell
            left = steps.left(theta, steps.gradient(theta, _LEVELS[1]))
        return theta, steps.preconditioner, left

    def _curvature(self, module: ChunkModule, theta: Tensor, seed: int = 0) -> Preconditioner:
        made = preconditioner_at(module.inference, theta.cpu(), self.sample, seed)
        return made.each(lambda part: module.comm.from_first(part.to(module.device)))

    def _by_products(self, module: ChunkModule, view: GaussianView, theta: Tensor) -> tuple[Tensor, float]:
        full, step = self.loss, module.step

        def gradient(theta: Tensor, draws: Draws, fresh: bool) -> Tensor:
            return full.gradient(step, theta, None, draws, fresh)

        def solve(theta: Tensor, found: Tensor) -> Tensor | None:
            return step_by_products(view, theta, found, lambda along: full.product(step, theta, along))

        module.say(f"step {module.step:,}: Newton steps, in some dozens of passes over all rows")
        try:
            made = polished(view, theta, solve, gradient, _LEVELS)
        except RuntimeError as error:  # an operation without a second derivative
            module.say(f"step {module.step:,}: no Newton steps, since curvature is not to be had: {error}")
            made = None
        return (theta, math.nan) if made is None else (module.comm.from_first(made.theta), made.left)

    def _settled(self, module: ChunkModule, theta: Tensor) -> tuple[Tensor, float]:
        inference, device, dtype = module.inference, theta.device, theta.dtype
        of_one = {name: column[0][:_FEW_ROWS] for name, column in self.sample.columns.items()}
        count = len(next(iter(of_one.values())))
        rows = Batch.whole(of_one, torch.arange(count), inference.num_obs)

        def loss(theta: Tensor, draws: Draws, number: int) -> tuple[float, Tensor]:
            value, gradient = self.loss.loss(module.step, theta.to(device, dtype), draws, number)
            return value, gradient.cpu()

        module.say(f"step {module.step:,}: finding the optimum over all rows, in some dozens of passes")
        found = settled(inference, theta.cpu(), loss, rows)
        if found is None:
            return theta, math.nan
        return module.comm.from_first(found.theta.to(device, dtype)), found.gain / len(theta)


class _Curved:
    """Newton steps by a ``preconditioner``, which may be changed."""

    def __init__(self, ends: EndRound, module: ChunkModule, view: GaussianView, preconditioner: Preconditioner):
        self.ends, self.module, self.view, self.preconditioner = ends, module, view, preconditioner
        self.told = False

    def gradient(self, theta: Tensor, draws: Draws = MANY, fresh: bool = True) -> Tensor:
        return self.ends.loss.gradient(self.module.step, theta, self.preconditioner, draws, fresh)

    def solve(self, theta: Tensor, found: Tensor) -> Tensor:
        return newton_step(self.view, theta, found, self.preconditioner)

    def left(self, theta: Tensor, found: Tensor) -> float:
        """What the gradient ``found`` [P] leaves to go, in scales."""
        return step_to_go(self.view, theta, self.solve(theta, found))

    def moved(self, theta: Tensor, found: Tensor, near: float) -> tuple[Tensor, Tensor]:
        """theta [P] and the gradient there, after steps that agree, if more than ``near`` scales are left."""
        if self.left(theta, found) <= near:
            return theta, found
        if not self.told:
            self.module.say(f"step {self.module.step:,}: Newton steps, in passes over all rows")
            self.told = True
        made = polished(self.view, theta, self.solve, self.gradient, _LEVELS[:2])
        return (theta, found) if made is None or not made.agreed else (self._alike(made.theta), made.gradient)

    def widened(self, theta: Tensor, found: Tensor) -> Tensor:
        """With the covariance of the curvature, at no cost of a pass; ``theta`` itself where that is as good as it."""
        step = self.view.covariance.step(theta, found, self.preconditioner.factor)
        near = step_to_go(self.view, theta, step) <= _SAME
        return theta if near else self._alike(theta + step.to(theta.dtype))

    def _alike(self, theta: Tensor) -> Tensor:
        return self.module.comm.from_first(theta)
