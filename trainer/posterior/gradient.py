"""The gradient of the loss over all rows, from one streamed pass: what an anchor needs, and what says how far it is to
the optimum.

Noise is a function of the block, so the figure does not depend on the number of ranks, but for rounding.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import pyro
import torch
from torch import Tensor

from trainer.posterior.elbo import Block
from trainer.svi.noise import chunk_noise, mixed_seed
from trainer.svi.plates import WEIGHT
from trainer.svi.step import Inference, StepBatch, StepNoise
from trainer.svi.variance import Whitening

_DRAWS, _DRAWS_JUDGED = 16, 64  # at least, over all rows
_PART_ROWS = 16_384  # of a judged draw, as far as there are so many: in fewer, rows are not alike


def full_gradient(
    inference: Inference,
    theta: Tensor,
    blocks: Iterable[Block],
    num_blocks: int,
    seed: int,
    reduce: Callable[[Tensor], Tensor],
    whitening: Whitening | None = None,
) -> Tensor:
    """The gradient [P] of minus the ELBO in nats at ``theta`` over the ``num_blocks`` blocks of all ranks.

    ``blocks`` are this rank's; ``reduce`` sums over the ranks; ``seed`` names the draws. Each part of a block has its
    own antithetic pairs: S draws, each on 1/S of the rows, say as much as S draws on all of them. ``whitening`` gives a
    control variate, without which the log scales' part is too noisy to judge them by; since that takes all rows as
    alike, parts are large then, and few rows are gone through once for each draw.
    """
    draws = math.ceil((_DRAWS if whitening is None else _DRAWS_JUDGED) / num_blocks)
    fewest = 1 if whitening is None else _PART_ROWS
    total = torch.zeros_like(theta, dtype=torch.float64)
    for block in blocks:
        parts = min(draws, max(1, len(block.row_id) // fewest))
        pairs = math.ceil(draws / parts)
        many = replace(inference, objective=replace(inference.objective, pairs=pairs))
        for part in range(parts):
            share = 1.0 / (num_blocks * parts)
            total += _of_part(many, theta, _part(block, part, parts), seed, part * pairs, share, whitening)
    return reduce(total)


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
    whitening: Whitening | None,
) -> Tensor:
    device = theta.device
    numbers = range(first, first + inference.objective.pairs)
    when, draws = torch.tensor([block.number], device=device), torch.tensor([list(numbers)], device=device)
    elements, rows = chunk_noise(inference.guide.noise_size, seed, when, draws, block.row_id[None, None], theta.dtype)
    noise = StepNoise(
        elements[0], None if rows is None else rows[0], (tuple(mixed_seed(seed, block.number, n) for n in numbers),)
    )
    columns = {name: column[None] for name, column in block.columns.items()}
    everything = torch.tensor(inference.num_obs, device=device)  # so that the data plate's scale is 1
    batch = StepBatch(columns, torch.tensor([len(block.row_id)], device=device), everything, block.row_id[None])
    at = theta.detach().requires_grad_()
    with torch.enable_grad(), pyro.validation_enabled(False):
        loss = -inference.terms(at, noise, batch, share).sum()
        grad = torch.autograd.grad(loss, at)[0].double()
    if whitening is None:
        return grad
    observed = float(block.columns[WEIGHT].sum()) if inference.model.weighted else len(block.row_id)
    return grad - whitening.control_variate(theta, noise.elements, observed / inference.num_obs).double()
