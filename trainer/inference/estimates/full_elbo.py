"""The ELBO of the final parameters over all rows, with its standard error.

The KL of what stands outside the data plate is exact where it does not depend on the draw, else averaged over draws
without data. The rest comes from one streamed pass with fresh antithetic pairs per block, as many as its share of the
error asks for. Noise and the number of pairs are functions of the block, so the figure does not depend on the number of
ranks. Sums are float64.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.inference.estimates.many_draws import Antithetic, terms_together
from trainer.inference.estimates.passes import Block, Pass, Reduce
from trainer.inference.model.noise import mixed_seed
from trainer.inference.model.plates import WEIGHT
from trainer.inference.optim.variance_reduction import Preconditioner
from trainer.inference.programs.sweep import Sweep
from trainer.inference.step import Inference

_FEWEST_PAIRS = 2  # per block: their difference gives the standard error
_PAIRS = 500  # over all blocks at the most, where these are few
_FIRST_PAIRS = 32  # of a block, before its error is looked at
_SE = 0.01  # nats, of all rows' likelihood
_KL_DRAWS = 10_000
_KL_SE = 0.005  # nats; a third of the likelihood's error is enough too
_KL_BLOCK = 2**40  # names the noise of the draws without data


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


def full_elbo(
    inference: Inference,
    theta: Tensor,
    rows: Pass,
    preconditioner: Preconditioner | None = None,
    sweep: Sweep | None = None,
) -> ElboEstimate:
    """The ELBO over all ``rows``; ``preconditioner`` gives a control variate for the draws.

    ``sweep``: evaluates the rows, where there is one.
    """
    at = _draws(inference, theta, rows.seed, sweep)
    likelihood, variance, count, first = _likelihood(at, rows, preconditioner)
    # A rank without a block takes the KL of those that have one; these agree.
    here = (0.0, 0.0) if first is None else _global_kl(at, first, math.sqrt(variance))
    kl, kl_se, ranks = _sum([*here, float(first is not None)], theta, rows.reduce)
    kl, kl_se = kl / ranks, kl_se / ranks
    return ElboEstimate(likelihood - kl, math.sqrt(variance + kl_se**2), likelihood, kl, count)


def held_out_elbo_per_row(
    inference: Inference, theta: Tensor, rows: Pass, fitted: ElboEstimate, sweep: Sweep | None = None
) -> float:
    """Nats per held-out row, each with its share of the KL that the training rows (``fitted``) paid."""
    likelihood, _, count, _ = _likelihood(_draws(inference, theta, rows.seed, sweep), rows)
    return likelihood / count - fitted.kl / fitted.rows if count else math.nan


def rough_elbo_per_row(inference: Inference, theta: Tensor, rows: Pass) -> float:
    """Nats per row of ``rows``, all or some, from the fewest draws, the same ones at every step and in every run.

    To compare runs by while they go on: a hundredth of what the closing figures take.
    """
    likelihood, kl, count, blocks = 0.0, 0.0, 0.0, 0
    at = _draws(inference, theta, rows.seed)
    for block in rows.blocks:
        for pairs in at.pairs(block.batch, block.number, 0, _FEWEST_PAIRS):
            likelihood += float(pairs.inside.sum()) / _FEWEST_PAIRS
            kl -= float(pairs.outside.sum()) / _FEWEST_PAIRS
        count += float(block.columns[WEIGHT].sum()) if inference.model.weighted else len(block.row_id)
        blocks += 1
    likelihood, kl, count, total = _sum([likelihood, kl, count, blocks], theta, rows.reduce)
    return likelihood / count - kl / total / inference.num_obs


def _likelihood(
    at: Antithetic, rows: Pass, preconditioner: Preconditioner | None = None
) -> tuple[float, float, float, Block | None]:
    """What stands inside the data plate, over all ranks: mean, its variance, rows; and this rank's first block."""
    most, enough = max(_FEWEST_PAIRS, _PAIRS // rows.num_blocks), _SE / math.sqrt(rows.num_blocks)
    first, likelihood, variance, count, inference = None, 0.0, 0.0, 0.0, at.together.inference
    for block in rows.blocks:
        if first is None:
            first = block
        mean, se = _block_likelihood(at, block, most, enough, preconditioner)
        likelihood, variance = likelihood + mean, variance + se**2
        count += float(block.columns[WEIGHT].sum()) if inference.model.weighted else len(block.row_id)
    likelihood, variance, total = _sum([likelihood, variance, count], at.theta, rows.reduce)
    return likelihood, variance, total, first


def _sum(numbers: list[float], theta: Tensor, reduce: Reduce) -> list[float]:
    return reduce(torch.tensor(numbers, dtype=torch.float64, device=theta.device)).tolist()


def _block_likelihood(
    at: Antithetic, block: Block, most: int, enough: float, preconditioner: Preconditioner | None = None
) -> tuple[float, float]:
    """The terms inside the data plate, summed over a block's rows: mean and standard error over pairs.

    Of ``most`` pairs, or of fewer once the standard error is ``enough``.
    """
    batch, share = block.batch, len(block.row_id) / at.together.inference.num_obs
    view = at.together.inference.gaussian
    values = torch.zeros(0, dtype=torch.float64, device=at.theta.device)
    for stop in _stages(_FIRST_PAIRS, most):
        for pairs in at.pairs(batch, block.number, len(values), stop):
            found = pairs.inside
            if preconditioner is not None and view is not None:
                at_theta, elements = at.theta.double(), pairs.elements.double()
                found = found + share * view.covariance.chance(preconditioner.curvature, at_theta, elements)
            values = torch.cat([values, found])
        se = float(values.std() / math.sqrt(len(values)))
        if se <= enough or not math.isfinite(se):
            break
    return float(values.mean()), se


def _stages(first: int, most: int) -> list[int]:
    """``first``, twice that, and so on to ``most``."""
    doubled = [first * 2**n for n in range(max(0, math.ceil(math.log2(most / first))))]
    return [*doubled, most]


def _global_kl(at: Antithetic, block: Block, likelihood_se: float) -> tuple[float, float]:
    """Minus the terms outside the data plate in nats, with its standard error (0 where no draw matters)."""
    one = Block(-1, {name: column[:1] for name, column in block.columns.items()}, block.row_id[:1])
    of_globals = replace(at.together.inference, model=at.together.inference.model.of_globals)
    at, batch = at._replace(together=terms_together(of_globals, "analytic"), sweep=None), one.batch
    most = _KL_DRAWS // 2
    values = torch.zeros(0, dtype=torch.float64, device=at.theta.device)
    for stop in [*(n for n in (4, 64) if n < most), *range(500, most, 500), most]:
        found = [-pairs.outside for pairs in at.pairs(batch, _KL_BLOCK, len(values), stop)]
        values = torch.cat([values, *found])
        spread, first = float(values.std()), float(values[0])
        exact = spread <= 1e-9 * (1 + abs(first))
        close = stop > 4 and spread / math.sqrt(stop) <= max(_KL_SE, likelihood_se / 3)
        if exact or close or not math.isfinite(spread):
            break
    return float(values.mean()), 0.0 if exact else spread / math.sqrt(len(values))


def _draws(inference: Inference, theta: Tensor, seed: int, sweep: Sweep | None = None) -> Antithetic:
    """With the exact KL where it is known, by other noise than the parameters were trained with."""
    return Antithetic(terms_together(inference, "analytic"), theta, mixed_seed(seed, 0x5EED, 0), sweep)
