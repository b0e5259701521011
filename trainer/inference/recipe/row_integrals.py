"""Whether latents of rows are integrated finely enough, by how far finer integrals would move the answer.

The error of a row's integral is much the same in every row, so beside a posterior sd it grows with the root of their
number, and no number of nodes is enough for all. What it adds to the gradient over all rows is the gradient by our
integrals less that by finer ones, and the Newton step by this is how far the answer is off.

Shapes: P parameters, R draws.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.inference.guides.gaussian import GaussianView
from trainer.inference.model.noise import element_noise, mixed_seed
from trainer.inference.model.plates import Batch
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.optim.variance_reduction import Preconditioner
from trainer.inference.recipe.convergence import axis_step, newton_step, step_to_go
from trainer.inference.rows.integral import GRID, Fineness
from trainer.inference.step import Inference, in_dtype

LIMIT, NATS = 0.05, 0.1  # scales that the answer may be off, and nats that the ELBO may be
_TOGETHER, _FEWEST = 2**18, 256  # rows without latents of their own whose memory a measurement takes, and rows of it
_MOST = 512  # rows without latents of their own whose memory a row may take: 4,096 pairs of such rows take 4 GiB
_PAIRS, _DRAWS, _SEED = 2, 16, 0xF19E


class Move(NamedTuple):
    """What other integrals change."""

    scales: float
    """How far the answer moves, in scales."""
    nats: float
    """By how much the ELBO changes."""

    def matters(self, numbers: int) -> bool:
        """Whether that is too much, of rows of so many ``numbers``: on a grid a few more nodes make the ELBO exact."""
        return self.scales > LIMIT or (numbers <= GRID and self.nats > NATS)


class Refined(NamedTuple):
    """What a measurement has come to."""

    fineness: Fineness
    """Of integrals that are fine enough, or as fine as they can be."""
    moved: Move
    """From what they were to these."""
    off: Move
    """From these to even finer ones."""


class _Effect(NamedTuple):
    """Of integrals of some fineness."""

    elbo: Tensor
    """[R] nats."""
    gradient: Tensor | None
    """[P] of minus the ELBO (nats), for a guide that is Gaussian."""


def refined(inference: Inference, theta: Tensor, rows: Batch, preconditioner: Preconditioner | None) -> Refined | None:
    """How finely rows have to be integrated at ``theta`` [P], at least as they are, to be off by at most 0.05 scales.

    ``rows``: one lane group of a sample. None where nothing is integrated, or in closed form. Leaves the model as it
    is.
    """
    before = inference.model.fineness
    if before is None:
        return None
    move = _move_of(inference, theta.detach().cpu(), rows, preconditioner)
    fine, size = before, before.size
    try:
        while move(fine, fine.with_more_steps()).matters(size) and _is_possible(inference, fine.with_more_steps()):
            fine = fine.with_more_steps()
        while move(fine, fine.with_twice_the_points()).matters(size) and _is_possible(
            inference, fine.with_more_points()
        ):
            fine = fine.with_more_points()
        moved, off = move(before, fine), move(fine, fine.with_twice_the_points())
    finally:
        inference.model.refine(before)
    return Refined(fine, moved, off)


def _is_possible(inference: Inference, fineness: Fineness) -> bool:
    """Whether a step of some thousand rows fits memory."""
    inference.model.refine(fineness)
    return fineness.is_possible and inference.model.copies <= _MOST


def _move_of(
    inference: Inference, theta: Tensor, rows: Batch, preconditioner: Preconditioner | None
) -> Callable[[Fineness, Fineness], Move]:
    """What changes from one to another."""
    view, group = inference.gaussian, rows.slot(0)

    @cache
    def effect(fineness: Fineness, among: int) -> _Effect:
        inference.model.refine(fineness)
        some = group.at(torch.arange(among)).as_group()
        return _values(inference, theta, some) if view is None else _gradient(inference, theta, some)

    def fitting(fineness: Fineness) -> int:
        inference.model.refine(fineness)
        return min(group.size, max(_FEWEST, _TOGETHER // inference.model.copies))

    def move(one: Fineness, other: Fineness) -> Move:
        if one == other:
            return Move(0.0, 0.0)
        among = min(fitting(one), fitting(other))
        after, before = effect(other, among), effect(one, among)
        elbo = after.elbo - before.elbo
        if view is None or after.gradient is None or before.gradient is None:
            return Move(float(elbo.std()), abs(float(elbo.mean())))
        scales = _in_scales(view, theta, after.gradient - before.gradient, preconditioner)
        return Move(scales, abs(float(elbo.mean())))

    return move


def _in_scales(view: GaussianView, theta: Tensor, gradient: Tensor, preconditioner: Preconditioner | None) -> float:
    if preconditioner is None:
        return step_to_go(view, theta, axis_step(view, theta, gradient))
    return step_to_go(view, theta, newton_step(view, theta, gradient, preconditioner.each(lambda part: part.cpu())))


def _gradient(inference: Inference, theta: Tensor, rows: Batch) -> _Effect:
    """At the mean of a few fixed draws."""
    with in_dtype(inference.float_type), torch.enable_grad():
        at = theta.to(inference.float_type).clone().requires_grad_()
        elbo = _elbo(inference, ELBO("analytic", True, _PAIRS), at, range(_PAIRS), rows)
        (gradient,) = torch.autograd.grad(-elbo, at)
    return _Effect(elbo.detach()[None], gradient)


def _values(inference: Inference, theta: Tensor, rows: Batch) -> _Effect:
    """At single draws of the guide: a difference that is linear in the latents varies over them by as many nats as the
    posterior sds by which it moves the answer.
    """
    single = ELBO("monte_carlo", False, 1)
    with in_dtype(inference.float_type), torch.no_grad():
        elbos = [_elbo(inference, single, theta, range(n, n + 1), rows) for n in range(_DRAWS)]
    return _Effect(torch.stack(elbos), None)


def _elbo(inference: Inference, objective: ELBO, theta: Tensor, numbers: range, rows: Batch) -> Tensor:
    """[] nats, by the draws ``numbers``."""
    when, size = torch.zeros((), dtype=torch.int64), inference.guide.noise_size[0]
    normals = element_noise(_SEED, when, torch.tensor(numbers), size, torch.float64)
    seeds = [mixed_seed(_SEED, 0, n) for n in numbers]
    return inference.of_sample(objective, theta, normals, rows, seeds).sum()
