"""The gradient of the loss over all rows, and the Hessian times a vector, from one streamed pass: what an anchor needs,
and what says how far it is to the optimum.

Where a block has several draws they are points of a scrambled Sobol sequence, which fill each axis evenly (Buchholz,
Wenzel and Mandt, "Quasi-Monte Carlo variational inference", ICML 2018): for the errors of 64 of them it took 700 that
were independent. Noise is a function of the block, so the figure does not depend on the number of ranks, but for
rounding.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from trainer.inference.estimates.derivatives import second_derivative
from trainer.inference.estimates.many_draws import Normals, Together, normals_of, part_of
from trainer.inference.estimates.passes import Block, Pass
from trainer.inference.model.noise import mixed_seed
from trainer.inference.optim.variance_reduction import Preconditioner
from trainer.inference.programs.sweep import Sweep


class Draws(NamedTuple):
    """How many antithetic pairs there are at least, over all rows, and on how many rows each, as far as there are."""

    pairs: int
    part_rows: int


_ROWS = 2**20  # and their copies, whose derivative is taken at once
ONE = Draws(1, 1)
FEW = Draws(16, 1)
MANY = Draws(64, 16_384)  # in smaller parts rows are not alike, as a control variate takes them to be


class _Derivative(NamedTuple):
    """What is summed over the parts of the rows."""

    of: Callable[[Tensor, Tensor], Tensor]
    """float64 [size]: of a loss [] (nats) by theta [P], which it was made from; linear in the loss."""
    size: int
    by_chance: Callable[[Tensor, int], Tensor] | None = None
    """float64 [size]: what a part's draws [pairs, E] add on so many rows, which has mean 0."""
    swept: Callable[[Block, Tensor], Tensor] | None = None
    """float64 [size]: the same of a part at its draws [pairs, E], less what these add, where that is compiled."""


def full_gradient(
    together: Together,
    theta: Tensor,
    rows: Pass,
    preconditioner: Preconditioner | None = None,
    draws: Draws = FEW,
    sweep: Sweep | None = None,
) -> Tensor:
    """The gradient [P] of minus the ELBO in nats at ``theta`` over all rows.

    Each part of a block has its own antithetic pairs: S draws, each on 1/S of the rows, say as much as S draws on all
    of them; where there are fewer rows than ``draws`` asks for, they are gone through once for each draw.
    ``preconditioner`` gives a control variate, without which the log scales' part is too noisy to judge them by.
    ``sweep``: evaluates the rows, where there is one.
    """

    def by_chance(elements: Tensor, count: int) -> Tensor:
        view, share = together.inference.gaussian, count / together.inference.num_obs
        assert preconditioner is not None
        assert view is not None
        chance = view.covariance.by_chance(preconditioner.curvature, theta, elements[None], share)
        return view.by_covariance(chance, theta).double()

    def derivative(loss: Tensor, at: Tensor) -> Tensor:
        return torch.autograd.grad(loss, at)[0].double()

    def swept(part: Block, elements: Tensor) -> Tensor:
        assert sweep is not None
        return sweep(theta, part.columns, part.row_id, elements, preconditioner).gradient

    made = _Derivative(derivative, len(theta), preconditioner and by_chance, None if sweep is None else swept)
    return _over_parts(together, theta, rows, draws, made)


def full_product(together: Together, theta: Tensor, along: Tensor, rows: Pass) -> Tensor:
    """H v [D]: the Hessian of minus the ELBO (nats) by the locations, from few draws, times v = ``along`` [D]."""

    def derivative(loss: Tensor, at: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(loss, at, create_graph=True)
        slope = grad[: len(along)] @ along.to(grad.dtype)
        return torch.autograd.grad(slope, at)[0][: len(along)].double()

    return _over_parts(together, theta, rows, FEW, _Derivative(derivative, len(along)))


def full_loss(together: Together, theta: Tensor, rows: Pass, draws: Draws) -> tuple[float, Tensor]:
    """Minus the ELBO (nats) and its gradient [P], float64, at ``theta`` over all rows."""

    def derivative(loss: Tensor, at: Tensor) -> Tensor:
        return torch.cat([loss.detach()[None], torch.autograd.grad(loss, at)[0].double()])

    found = _over_parts(together, theta, rows, draws, _Derivative(derivative, 1 + len(theta)))
    return float(found[0]), found[1:]


def full_hessian(together: Together, theta: Tensor, size: int, rows: Pass) -> Tensor:
    """float64 [D, D]: the second derivative of minus the ELBO (nats) by the first D = ``size`` parameters."""

    def derivative(loss: Tensor, at: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(loss, at, create_graph=True)
        return second_derivative(grad[:size], at)[:, :size].double().flatten()

    return _over_parts(together, theta, rows, ONE, _Derivative(derivative, size * size)).view(size, size)


def _over_parts(together: Together, theta: Tensor, rows: Pass, draws: Draws, derivative: _Derivative) -> Tensor:
    """The sum [size] of the derivatives of all parts, less what their draws add by chance."""
    of_block, total = math.ceil(draws.pairs / rows.num_blocks), theta.new_zeros(derivative.size, dtype=torch.float64)
    for block in rows.blocks:
        parts = min(of_block, max(1, len(block.row_id) // draws.part_rows))
        pairs = math.ceil(of_block / parts)
        for number in range(parts):
            part = _part(block, number, parts)
            elements, of_rows, seeds = _noise(together, theta, part, rows.seed, number * pairs, pairs)
            if derivative.swept is not None:
                total += derivative.swept(part, elements)
                continue
            signs = together.inference.objective.signs
            normals = Normals.of(elements, of_rows, [seed for seed in seeds for _ in signs], signs)
            total += _of_part(together, theta, part, normals, 1.0 / (rows.num_blocks * parts), derivative)
            if derivative.by_chance is not None:
                total -= derivative.by_chance(elements, len(part.row_id))
    return rows.reduce(total)


def _part(block: Block, part: int, parts: int) -> Block:
    """Part ``part`` of ``parts`` of the rows."""
    rows = part_of(len(block.row_id), part, parts)
    return Block(block.number, {name: column[rows] for name, column in block.columns.items()}, block.row_id[rows])


def _noise(
    together: Together, theta: Tensor, block: Block, seed: int, first: int, count: int
) -> tuple[Tensor, Tensor | None, list[int]]:
    """Of ``count`` draws from the ``first``: elements [count, E], rows [count, B, n], seeds."""
    numbers = range(first, first + count)
    elements, rows = normals_of(together.inference, theta, block.row_id, seed, block.number, numbers)
    if count > 1 and 0 < elements.shape[-1] <= SobolEngine.MAXDIM:
        elements[:] = even_normals(elements.shape[-1], mixed_seed(seed, block.number, 0), first, count)
    return elements, rows, [mixed_seed(seed, block.number, n) for n in numbers]


def _of_part(
    together: Together, theta: Tensor, block: Block, normals: Normals, share: float, derivative: _Derivative
) -> Tensor:
    """Of the mean loss over the draws, in slices of rows and of draws that fit memory."""
    count, found = len(normals.seeds), []
    slices = math.ceil(len(block.row_id) * together.inference.model.copies / _ROWS)
    for number in range(slices):
        batch, own = _part(block, number, slices).batch, normals.of_rows(number, slices)
        size = together.fitting(theta.detach(), batch, own)
        for first in range(0, count, size):
            at = theta.detach().requires_grad_()

            def of(terms: Tensor, at: Tensor = at) -> Tensor:
                return derivative.of(-(terms[:, 0].sum() + share / slices * terms[:, 1].sum()) / count, at)

            with torch.enable_grad():
                found.append(together(at, batch, own.part(first, first + size), of))
    return torch.stack(found).sum(0)


def even_normals(size: int, seed: int, first: int, count: int) -> Tensor:
    """float64 [count, size]: points ``first`` to ``first + count`` of the sequence that ``seed`` scrambles, each axis
    a standard normal.
    """
    points = SobolEngine(size, scramble=True, seed=seed).fast_forward(first).draw(count, dtype=torch.float64)
    normals: Tensor = torch.special.ndtri(points + 2.0**-31)  # the middle of a point's cell, which is 2^-30 wide
    return normals
