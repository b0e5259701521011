"""The gradient of the loss over all rows, and the Hessian times a vector, from one streamed pass: what an anchor needs,
and what says how far it is to the optimum.

Where a block has several draws they are points of a scrambled Sobol sequence, which fill each axis evenly (Buchholz,
Wenzel and Mandt, "Quasi-Monte Carlo variational inference", ICML 2018): for the errors of 64 of them it took 700 that
were independent. Noise is a function of the block, so the figure does not depend on the number of ranks, but for
rounding.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import pyro
import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from trainer.posterior.elbo import Block
from trainer.svi.noise import chunk_noise, mixed_seed
from trainer.svi.start import second_derivative
from trainer.svi.step import Inference, StepBatch, StepNoise
from trainer.svi.variance import Whitening


class Draws(NamedTuple):
    """How many antithetic pairs there are at least, over all rows, and on how many rows each, as far as there are."""

    pairs: int
    part_rows: int


ONE = Draws(1, 1)
FEW = Draws(16, 1)
MANY = Draws(64, 16_384)  # in smaller parts rows are not alike, as a control variate takes them to be


class Pass(NamedTuple):
    """Once over all rows."""

    blocks: Iterable[Block]
    """This rank's."""
    num_blocks: int
    """Of all ranks."""
    seed: int
    """Names the draws."""
    reduce: Callable[[Tensor], Tensor]
    """The sum over the ranks."""


Derivative = Callable[[Tensor, Tensor, StepNoise, int], Tensor]
"""Of a part's loss [] (nats) by theta [P], which it was made from by the noise, on so many rows."""


def full_gradient(
    inference: Inference,
    theta: Tensor,
    rows: Pass,
    whitening: Whitening | None = None,
    draws: Draws = FEW,
) -> Tensor:
    """The gradient [P] of minus the ELBO in nats at ``theta`` over all rows.

    Each part of a block has its own antithetic pairs: S draws, each on 1/S of the rows, say as much as S draws on all
    of them; where there are fewer rows than ``draws`` asks for, they are gone through once for each draw.
    ``whitening`` gives a control variate, without which the log scales' part is too noisy to judge them by.
    """

    def derivative(loss: Tensor, at: Tensor, noise: StepNoise, count: int) -> Tensor:
        grad = torch.autograd.grad(loss, at)[0].double()
        if whitening is None:
            return grad
        return grad - whitening.control_variate(theta, noise.elements, count / inference.num_obs).double()

    return _over_parts(inference, theta, rows, draws, derivative, len(theta))


def full_product(inference: Inference, theta: Tensor, along: Tensor, rows: Pass) -> Tensor:
    """H v [D]: the Hessian of minus the ELBO (nats) by the locations, from few draws, times v = ``along`` [D]."""

    def derivative(loss: Tensor, at: Tensor, noise: StepNoise, count: int) -> Tensor:
        (grad,) = torch.autograd.grad(loss, at, create_graph=True)
        slope = grad[: len(along)] @ along.to(grad.dtype)
        return torch.autograd.grad(slope, at)[0][: len(along)].double()

    return _over_parts(inference, theta, rows, FEW, derivative, len(along))


def full_loss(inference: Inference, theta: Tensor, rows: Pass, draws: Draws) -> tuple[float, Tensor]:
    """Minus the ELBO (nats) and its gradient [P], float64, at ``theta`` over all rows."""

    def derivative(loss: Tensor, at: Tensor, noise: StepNoise, count: int) -> Tensor:
        return torch.cat([loss.detach()[None], torch.autograd.grad(loss, at)[0].double()])

    found = _over_parts(inference, theta, rows, draws, derivative, 1 + len(theta))
    return float(found[0]), found[1:]


def full_hessian(inference: Inference, theta: Tensor, size: int, rows: Pass) -> Tensor:
    """float64 [D, D]: the second derivative of minus the ELBO (nats) by the first D = ``size`` parameters."""

    def derivative(loss: Tensor, at: Tensor, noise: StepNoise, count: int) -> Tensor:
        (grad,) = torch.autograd.grad(loss, at, create_graph=True)
        return second_derivative(grad[:size], at)[:, :size].double().flatten()

    return _over_parts(inference, theta, rows, ONE, derivative, size * size).view(size, size)


def _over_parts(
    inference: Inference, theta: Tensor, rows: Pass, draws: Draws, derivative: Derivative, size: int
) -> Tensor:
    """The sum [size] of the derivatives of all parts."""
    of_block, total = math.ceil(draws.pairs / rows.num_blocks), theta.new_zeros(size, dtype=torch.float64)
    for block in rows.blocks:
        parts = min(of_block, max(1, len(block.row_id) // draws.part_rows))
        pairs = math.ceil(of_block / parts)
        many = replace(inference, objective=replace(inference.objective, pairs=pairs))
        for part in range(parts):
            share = 1.0 / (rows.num_blocks * parts)
            total += _of_part(many, theta, _part(block, part, parts), rows.seed, part * pairs, share, derivative)
    return rows.reduce(total)


def _part(block: Block, part: int, parts: int) -> Block:
    """Part ``part`` of ``parts`` of the rows."""
    rows = slice(part * len(block.row_id) // parts, (part + 1) * len(block.row_id) // parts)
    return Block(block.number, {name: column[rows] for name, column in block.columns.items()}, block.row_id[rows])


def _of_part(
    inference: Inference,
    theta: Tensor,
    block: Block,
    seed: int,
    first: int,
    share: float,
    derivative: Derivative,
) -> Tensor:
    device = theta.device
    numbers = range(first, first + inference.objective.pairs)
    when, draws = torch.tensor([block.number], device=device), torch.tensor([list(numbers)], device=device)
    elements, rows = chunk_noise(inference.guide.noise_size, seed, when, draws, block.row_id[None, None], theta.dtype)
    if len(numbers) > 1 and 0 < elements.shape[-1] <= SobolEngine.MAXDIM:
        elements[0, 0] = even_normals(elements.shape[-1], mixed_seed(seed, block.number, 0), first, len(numbers))
    noise = StepNoise(
        elements[0], None if rows is None else rows[0], (tuple(mixed_seed(seed, block.number, n) for n in numbers),)
    )
    columns = {name: column[None] for name, column in block.columns.items()}
    everything = torch.tensor(inference.num_obs, device=device)  # so that the data plate's scale is 1
    batch = StepBatch(columns, torch.tensor([len(block.row_id)], device=device), everything, block.row_id[None])
    at = theta.detach().requires_grad_()
    with torch.enable_grad(), pyro.validation_enabled(False):
        return derivative(-inference.terms(at, noise, batch, share).sum(), at, noise, len(block.row_id))


def even_normals(size: int, seed: int, first: int, count: int) -> Tensor:
    """float64 [count, size]: points ``first`` to ``first + count`` of the sequence that ``seed`` scrambles, each axis
    a standard normal."""
    points = SobolEngine(size, scramble=True, seed=seed).fast_forward(first).draw(count, dtype=torch.float64)
    return torch.special.ndtri(points + 2.0**-31)  # the middle of a point's cell, which is 2^-30 wide
