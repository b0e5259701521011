"""The ELBO of the final parameters over all rows, with its standard error.

The KL of what stands outside the data plate is exact where it does not depend on the draw, else averaged over draws
without data. The rest comes from one streamed pass with fresh antithetic pairs per block; noise is a function of the
block, so the figure does not depend on the number of ranks. Sums are float64.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from trainer.svi.guides import Noise
from trainer.svi.noise import element_noise, mixed_seed, row_noise
from trainer.svi.objective import Term, elbo_terms
from trainer.svi.plates import WEIGHT, Batch
from trainer.svi.rows import Column
from trainer.svi.step import Inference
from trainer.svi.variance import Whitening

_FEWEST_PAIRS = 2  # per block: their difference gives the standard error
_PAIRS = 500  # over all blocks, where these are few
_KL_DRAWS = 10_000
_KL_SE = 0.005  # nats; a tenth of the likelihood's error is enough too


@dataclass(frozen=True)
class ElboEstimate:
    """Nats over all rows; ``elbo_se`` is the Monte Carlo standard error of ``elbo``."""

    elbo: float
    elbo_se: float
    expected_log_likelihood: float
    """Of the rows, the KL of their own latents taken off."""
    kl: float
    """Of the global latents, less the log likelihood of what is observed outside the data plate."""
    rows: float
    """How many, or the sum of their weights."""

    @property
    def elbo_per_row(self) -> float:
        return self.elbo / self.rows


class Block(NamedTuple):
    """One block of rows: its ``number`` names its noise."""

    number: int
    columns: dict[str, Column]
    """Each [B, ...]."""
    row_id: Tensor
    """int64 [B]."""


Reduce = Callable[[Tensor], Tensor]


def full_elbo(
    inference: Inference,
    theta: Tensor,
    blocks: Iterable[Block],
    num_blocks: int,
    seed: int,
    reduce: Reduce,
    whitening: Whitening | None = None,
) -> ElboEstimate:
    """The ELBO over the ``num_blocks`` blocks of all ranks, of which ``blocks`` are this rank's.

    ``reduce`` sums a tensor over the ranks; ``whitening`` gives a control variate for the draws.
    """
    likelihood, variance, rows, first = _likelihood(inference, theta, blocks, num_blocks, seed, reduce, whitening)
    # A rank without a block takes the KL of those that have one; these agree.
    here = (0.0, 0.0) if first is None else _global_kl(inference, theta, first, seed, math.sqrt(variance))
    kl, kl_se, ranks = _sum([*here, float(first is not None)], theta, reduce)
    kl, kl_se = kl / ranks, kl_se / ranks
    return ElboEstimate(likelihood - kl, math.sqrt(variance + kl_se**2), likelihood, kl, rows)


def held_out_elbo_per_row(
    inference: Inference,
    theta: Tensor,
    blocks: Iterable[Block],
    num_blocks: int,
    seed: int,
    reduce: Reduce,
    fitted: ElboEstimate,
) -> float:
    """Nats per held-out row, each with its share of the KL that the training rows (``fitted``) paid.

    ``blocks``, ``num_blocks`` and ``reduce`` as in :func:`full_elbo`, of the held-out rows.
    """
    likelihood, _, rows, _ = _likelihood(inference, theta, blocks, num_blocks, seed, reduce)
    return likelihood / rows - fitted.kl / fitted.rows


def rough_elbo_per_row(
    inference: Inference, theta: Tensor, blocks: Iterable[Block], seed: int, reduce: Reduce
) -> float:
    """Nats per row of the ``blocks`` of all ranks, from the fewest draws, the same ones at every step and in every run.

    To compare runs by while they go on: a hundredth of what the closing figures take.
    """
    likelihood, kl, rows, count = 0.0, 0.0, 0.0, 0
    for block in blocks:
        terms = [
            term
            for pair in range(_FEWEST_PAIRS)
            for each in _pair(inference, theta, block, seed, block.number, pair)
            for term in each.values()
        ]
        likelihood += sum(float(term.value) for term in terms if term.scaled) / (2 * _FEWEST_PAIRS)
        kl -= sum(float(term.value) for term in terms if not term.scaled) / (2 * _FEWEST_PAIRS)
        rows += float(block.columns[WEIGHT].sum()) if inference.model.weighted else len(block.row_id)
        count += 1
    likelihood, kl, rows, total = _sum([likelihood, kl, rows, count], theta, reduce)
    return likelihood / rows - kl / total / inference.num_obs


def _likelihood(
    inference: Inference,
    theta: Tensor,
    blocks: Iterable[Block],
    num_blocks: int,
    seed: int,
    reduce: Reduce,
    whitening: Whitening | None = None,
) -> tuple[float, float, float, Block | None]:
    """What stands inside the data plate, over all ranks: mean, its variance, rows; and this rank's first block."""
    pairs = max(_FEWEST_PAIRS, _PAIRS // num_blocks)
    first, likelihood, variance, rows = None, 0.0, 0.0, 0.0
    for block in blocks:
        if first is None:
            first = block
        mean, se = _block_likelihood(inference, theta, block, seed, pairs, whitening)
        likelihood, variance = likelihood + mean, variance + se**2
        rows += float(block.columns[WEIGHT].sum()) if inference.model.weighted else len(block.row_id)
    likelihood, variance, total = _sum([likelihood, variance, rows], theta, reduce)
    return likelihood, variance, total, first


def _sum(numbers: list[float], theta: Tensor, reduce: Reduce) -> list[float]:
    return reduce(torch.tensor(numbers, dtype=torch.float64, device=theta.device)).tolist()


def _block_likelihood(
    inference: Inference, theta: Tensor, block: Block, seed: int, pairs: int, whitening: Whitening | None
) -> tuple[float, float]:
    """The terms inside the data plate, summed over a block's rows: mean and standard error over pairs."""
    values = []
    share = len(block.row_id) / inference.num_obs
    for pair in range(pairs):
        both = [
            sum(float(term.value) for term in terms.values() if term.scaled)
            for terms in _pair(inference, theta, block, seed, block.number, pair)
        ]
        chance = 0.0
        if whitening is not None:
            elements, _ = _noise(inference, theta, block, seed, block.number, pair)
            chance = share * float(whitening.chance(theta.double(), elements.double()))
        values.append(sum(both) / 2 + chance)
    estimate = torch.tensor(values, dtype=torch.float64)
    return float(estimate.mean()), float(estimate.std() / math.sqrt(len(values)))


def _global_kl(
    inference: Inference, theta: Tensor, block: Block, seed: int, likelihood_se: float
) -> tuple[float, float]:
    """Minus the terms outside the data plate in nats, with its standard error (0 where no draw matters)."""
    one = Block(-1, {name: column[:1] for name, column in block.columns.items()}, block.row_id[:1])
    values: list[float] = []
    while len(values) < _KL_DRAWS // 2:
        both = [
            -sum(float(term.value) for term in terms.values() if not term.scaled)
            for terms in _pair(inference, theta, one, seed, 2**40, len(values))
        ]
        values.append(sum(both) / 2)
        if len(values) in (4, 64) or len(values) % 500 == 0:
            spread = float(torch.tensor(values, dtype=torch.float64).std())
            exact = spread <= 1e-9 * (1 + abs(values[0]))
            close = len(values) > 4 and spread / len(values) ** 0.5 <= max(_KL_SE, likelihood_se / 10)
            if exact or close or not math.isfinite(spread):
                break
    draws = torch.tensor(values, dtype=torch.float64)
    se = float(draws.std() / math.sqrt(len(values)))
    return float(draws.mean()), se if se > 1e-9 * (1 + abs(values[0])) else 0.0


def _pair(
    inference: Inference, theta: Tensor, block: Block, seed: int, number: int, pair: int
) -> list[dict[str, Term]]:
    """The terms at eps and -eps, the scale of the data plate 1."""
    device = theta.device
    flat, rows = _noise(inference, theta, block, seed, number, pair)
    batch = Batch(
        block.columns,
        torch.tensor(len(block.row_id), device=device),
        torch.ones((), dtype=torch.float64, device=device),
        block.row_id,
    )
    terms = []
    with torch.no_grad(), pyro.validation_enabled(False):
        for sign in (1.0, -1.0):
            noise = Noise(sign * flat, None if rows is None else sign * rows, mixed_seed(_own(seed), number, pair))

            def evaluate(values: dict[str, Tensor], noise: Noise = noise) -> dict[str, Term]:
                # Whatever KL was trained with: exact where that is known, from the draw where it is not.
                return elbo_terms(inference.model, inference.guide, values, noise, batch, "analytic")

            terms.append(inference.parameters.call(inference.parameters.unflatten(theta), evaluate))
    return terms


def _noise(
    inference: Inference, theta: Tensor, block: Block, seed: int, number: int, pair: int
) -> tuple[Tensor, Tensor | None]:
    """The normals [E] and [B, n] of a pair."""
    when, draw = torch.tensor(number, device=theta.device), torch.tensor([pair], device=theta.device)
    elements, per_row = inference.guide.noise_size
    flat = element_noise(_own(seed), when, draw, elements, theta.dtype)[0]
    return flat, row_noise(_own(seed), when, draw, block.row_id[None], per_row, theta.dtype)[0] if per_row else None


def _own(seed: int) -> int:
    """Not the noise that the parameters were trained with."""
    return mixed_seed(seed, 0x5EED, 0)
