"""The evidence: segment means from running averages, errors by hand, the Newton step of a Gaussian problem."""

import math
from dataclasses import replace

import pytest
import torch
from svi_problems import F64, build, one_group, regression, regression_data, regression_posterior

from trainer.inference.estimates.full_elbo import full_elbo
from trainer.inference.estimates.full_gradient import MANY, even_normals, full_gradient, full_product
from trainer.inference.estimates.many_draws import terms_together
from trainer.inference.estimates.passes import Block, Pass
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.optim.optimizers import SGD
from trainer.inference.optim.rounds import Round
from trainer.inference.optim.schedules import Constant
from trainer.inference.recipe.convergence import (
    Evidence,
    Rule,
    axis_step,
    judged,
    newton_step,
    of_average,
    scale_error_of_small,
    segment_ends,
    segment_means,
    step_to_go,
)
from trainer.inference.recipe.laplace import laplace_start

DATA = regression_data(orthogonal=False)


@pytest.fixture(scope="module")
def problem():
    inference, theta = build(regression, **DATA)
    inference = replace(inference, objective=ELBO())
    start = laplace_start(inference, theta, one_group(**DATA))
    assert start is not None
    return inference, *start


def the_blocks(size=5):
    """The rows in blocks of ``size``, the last one short."""
    count = len(DATA["y"])
    for number, first in enumerate(range(0, count, size)):
        rows = slice(first, min(first + size, count))
        yield Block(number, {name: each[rows] for name, each in DATA.items()}, torch.arange(count)[rows])


def test_segments_are_whole_epochs_where_there_are_eight():
    window = lambda length, epoch, unit=1: segment_ends(  # noqa: E731
        Round(SGD(), Constant(), 1000, 1000 - length), epoch, unit
    )
    assert window(160, 10) == (860, 880, 900, 920, 940, 960, 980, 1000)
    assert window(200, 10) == (820, 850, 880, 900, 920, 950, 980, 1000)  # 2.5 epochs each: 2 or 3
    assert window(100, 50) == (912, 925, 938, 950, 962, 975, 988, 1000)  # of two epochs: equal steps
    assert window(15, 1) == ()
    assert window(512, 1000, 16) == (544, 608, 672, 736, 800, 864, 928, 1000)
    assert window(100, 50, 16) == ()


def test_segment_means_come_out_of_running_averages():
    generator = torch.Generator().manual_seed(0)
    iterates = torch.randn(24, 5, dtype=F64, generator=generator)
    marks = [(n, iterates[:n].mean(0)) for n in (3, 10, 24)]
    want = torch.stack([iterates[:3].mean(0), iterates[3:10].mean(0), iterates[10:].mean(0)])
    torch.testing.assert_close(segment_means(marks), want, rtol=1e-12, atol=1e-12)


def test_the_evidence_of_an_average_by_hand(problem):
    """Three locations and three log scales: one location wanders, one drifts, one log scale drifts."""
    inference, *_ = problem
    theta = torch.zeros(6, dtype=F64)
    theta[3:] = math.log(2.0)
    means = torch.zeros(8, 6, dtype=F64)
    means[:, 0] = torch.tensor([1.0, -1.0] * 4)
    means[4:, 1] = 0.5
    means[4:, 4] = 0.06
    found = of_average(inference.gaussian, means, theta)
    wander = (8 / 7) ** 0.5 / 8**0.5 / 2.0
    assert found.mc_error == pytest.approx(wander, rel=1e-12)
    assert found.rhat == pytest.approx((1 + 0.25**2 / 2) ** 0.5, rel=1e-12)
    assert found.scale_error == pytest.approx(0.03, rel=1e-12)
    assert Rule(mc_error=0.3).short_of(found) == ["scale_error", "rhat", "gradient"]
    assert Rule().short_of(Evidence(0.1, 0.02, 1.01, 0.1)) == []


def test_the_error_of_small_sites_scales(problem):
    """Standard error by hand, or half the difference of the halves; nothing to say without segments."""
    inference, optimum, _ = problem
    steady = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0], dtype=F64)
    drifting = torch.tensor([0.0] * 4 + [1.0] * 4, dtype=F64)
    means = optimum.expand(8, -1).clone()
    means[:, 3] += 0.01 * steady
    assert scale_error_of_small(inference.gaussian, means) == pytest.approx(0.01 * (8 / 7) ** 0.5 / 8**0.5)
    means[:, 4] += 0.01 * drifting
    assert scale_error_of_small(inference.gaussian, means) == pytest.approx(0.005)
    assert math.isnan(scale_error_of_small(inference.gaussian, None))


def test_small_sites_count_whole_and_others_to_their_99_per_cent():
    values = torch.cat([torch.tensor([0.5]), torch.arange(1000.0) / 1000])
    top = torch.zeros(1001, dtype=torch.bool)
    top[0] = True
    assert judged(values, top) == pytest.approx(0.99)
    assert judged(values / 2 + torch.eye(1001)[0], top) == pytest.approx(1.25)
    assert judged(values[:1], top[:1]) == 0.5


@pytest.mark.parametrize("size", [1, 5, 12])
def test_the_full_gradient_and_the_step_to_go_of_a_gaussian_problem(problem, size):
    """Exactly, in blocks of any size and with fewer rows than draws: by loc L (loc - mean), by log s  s^2 L_ii - 1."""
    inference, optimum, preconditioner = problem
    mean, covariance, _ = regression_posterior(**DATA)
    precision = torch.linalg.inv(covariance)
    away = optimum.clone()
    scale = optimum[3:].exp()
    away[:3] += torch.tensor([0.3, -0.1, 0.2], dtype=F64) * scale
    away[4] += 0.05
    blocks = list(the_blocks(size))
    rows = Pass(blocks, len(blocks), 3, lambda each: each)
    found = full_gradient(terms_together(inference), away, rows, preconditioner, MANY)
    want = torch.cat([precision @ (away[:3] - mean), away[3:].exp() ** 2 * precision.diagonal() - 1])
    torch.testing.assert_close(found[:3], want[:3], rtol=1e-8, atol=1e-8)
    if size == 12:  # the control variate takes all rows as alike, so blocks of a few leave some noise
        torch.testing.assert_close(found[3:], want[3:], rtol=0, atol=0.3)
    along = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    product = full_product(terms_together(inference), away, along, rows)
    torch.testing.assert_close(product, precision @ along, rtol=1e-8, atol=1e-8)
    left = step_to_go(inference.gaussian, away, newton_step(inference.gaussian, away, want, preconditioner))
    assert left == pytest.approx(0.3, rel=1e-5)
    plain = step_to_go(inference.gaussian, away, axis_step(inference.gaussian, away, want))
    assert plain == pytest.approx(float((away[3:].exp() * want[:3]).abs().max()), rel=1e-12)


def test_several_draws_fill_each_axis_evenly():
    """Of 64 draws one lies in each 64th of each axis' probability; parts of them are the same draws."""
    draws = even_normals(90, 5, 0, 64)
    cells = (torch.special.ndtr(draws) * 64).floor().sort(dim=0).values
    assert torch.equal(cells, torch.arange(64.0, dtype=F64)[:, None].expand(64, 90))
    assert torch.equal(even_normals(90, 5, 16, 48), draws[16:])
    assert not torch.equal(even_normals(90, 6, 0, 64), draws)


def test_blocks_of_unequal_length_leave_no_noise_where_rows_are_alike():
    """Twelve times the same row in blocks of 5, 5 and 2: the control variate counts a block by its rows."""
    same = {name: each[:1].expand(12, *each.shape[1:]).clone() for name, each in DATA.items()}
    inference, theta = build(regression, **same)
    inference = replace(inference, objective=ELBO())
    start = laplace_start(inference, theta, one_group(**same))
    assert start is not None
    _, covariance, _ = regression_posterior(**same)
    precision = torch.linalg.inv(covariance)
    blocks = [Block(i, {n: c[:r] for n, c in same.items()}, torch.arange(r)) for i, r in enumerate((5, 5, 2))]
    found = full_gradient(terms_together(inference), start[0], Pass(blocks, 3, 3, lambda each: each), start[1], MANY)
    want = start[0][3:].exp() ** 2 * precision.diagonal() - 1
    torch.testing.assert_close(found[3:], want, rtol=0, atol=1e-7)


def test_the_elbo_of_a_gaussian_problem_has_no_error_left(problem):
    """With the curvature as control variate two pairs give the exact ELBO; without, 500 leave an error."""
    inference, optimum, preconditioner = problem
    _, covariance, log_evidence = regression_posterior(**DATA)
    precision = torch.linalg.inv(covariance)
    kl = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    whole = Pass(list(the_blocks(12)), 1, 0, lambda each: each)
    found = full_elbo(inference, optimum, whole, preconditioner)
    assert found.elbo == pytest.approx(float(log_evidence - kl), abs=1e-6)
    assert found.elbo_se < 1e-6
    assert full_elbo(inference, optimum, whole).elbo_se > 1e-3
