"""The reference problems: the optima that we compute are right, and a fit with the defaults finds one."""

import numpy as np
import pytest

from scripts.references import digits, fresh
from scripts.references.__main__ import compare


def test_the_optimum_of_a_gaussian_problem_is_exact():
    problem = fresh.eight_rows()
    precision = problem.x.T @ problem.x + np.diag(problem.prior_sd**-2)
    found = fresh.optimum(problem)
    np.testing.assert_allclose(found.loc, np.linalg.solve(precision, problem.x.T @ problem.y), rtol=1e-7)
    np.testing.assert_allclose(found.scale, np.diag(precision) ** -0.5, rtol=1e-7)
    covariance = problem.x @ np.diag(problem.prior_sd**2) @ problem.x.T + np.eye(8)
    evidence = -0.5 * (8 * np.log(2 * np.pi) + np.linalg.slogdet(covariance)[1])
    evidence -= 0.5 * problem.y @ np.linalg.solve(covariance, problem.y)
    gap = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])  # KL(q || posterior)
    assert found.elbo == pytest.approx(evidence - gap, abs=1e-8)


def test_the_optimum_without_a_closed_form_is_the_best_nearby():
    """By the ELBO itself: whatever loc or scale is moved, it falls."""
    problem = fresh.separable()
    found = fresh.optimum(problem)
    for number in range(3):
        for loc, factor in ((0.1, 1.0), (-0.1, 1.0), (0.0, 1.1), (0.0, 0.9)):
            mean, scale = found.loc.copy(), found.scale.copy()
            mean[number] += loc * scale[number]
            scale[number] *= factor
            assert fresh.elbo(problem, mean, scale) < found.elbo


@pytest.mark.slow
def test_eight_rows_are_enough(tmp_path):
    """Where the start is the optimum and the gradient there nothing but rounding (seed 0)."""
    case = next(case for case in fresh.CASES if case.name == "eight rows")
    for seed in (0, 1):
        assert compare(case, tmp_path, seed, {})["met"]


def test_the_encoder_is_as_good_as_the_tutorials_guide_at_equal_steps():
    """Images of 6 x 6 in which some rows are on, so that a code tells which."""
    lines = np.random.default_rng(0).random((512, 6, 1)) < 0.3
    x = np.repeat(lines, 6, axis=2).reshape(512, 36).astype(np.float32)
    setting = digits.Setting(width=16, codes=4, steps=150, batch_size=128, lr=0.01)
    stock = digits.by_pyro(x, setting, 0)
    own = digits.by_the_trainer(x, setting, 0, program="eager")
    assert own.elbo > stock.elbo
