"""Roots of covariances: what a pattern holds, the nearest one to a precision, and what draws add by chance."""

import pytest
import torch
from svi_problems import F64

from trainer.inference.guides.pattern import Pattern
from trainer.inference.guides.triangular import Triangular, _solved, root, spread, standardized

D = 7
PATTERNS = {
    "full": Pattern(((1, D),)),
    "blocks": Pattern(((1, 3), (1, 4))),
    "arrow": Pattern(((2, 2), (1, 1)), 2, torch.tensor([6, 0, 1, 4, 2, 3, 5])),
    "arrow without groups": Pattern((), D),
    "diagonal": Pattern(((D, 1),)),
}


@pytest.fixture(params=PATTERNS)
def covariance(request):
    pattern = PATTERNS[request.param]
    return Triangular(slice(D, 2 * D), slice(2 * D, 2 * D + pattern.off_size), pattern, 1000)


def numbers(covariance, seed=0):
    """theta [P] whose numbers are all other than zero."""
    generator = torch.Generator().manual_seed(seed)
    return 0.5 * torch.randn(D + covariance.parameters, dtype=F64, generator=generator)


def matrix(covariance, theta):
    return root(covariance.pattern, theta[covariance.log_sd].exp(), theta[covariance.off])


def precision(seed=0):
    generator = torch.Generator().manual_seed(seed)
    each = torch.randn(D, D, dtype=F64, generator=generator)
    return each @ each.T + torch.eye(D, dtype=F64)


def may_differ(pattern):
    """bool [D, D], in the order of the latents: where the root may be other than zero, written down by hand."""
    order = torch.arange(D) if pattern.order is None else pattern.order
    place = {int(latent): number for number, latent in enumerate(order)}
    group = [
        (block, g)
        for block, (groups, length) in enumerate(pattern.blocks)
        for g in range(groups)
        for _ in range(length)
    ]
    group += [None] * pattern.top
    inside = torch.zeros(D, D, dtype=torch.bool)
    for i in range(D):
        for j in range(D):
            a, b = place[i], place[j]
            inside[i, j] = a == b or (a < b and (group[b] is None or group[a] == group[b]))
    return inside


def test_the_root_is_zero_outside_its_pattern_alone(covariance):
    made = matrix(covariance, numbers(covariance))
    assert torch.equal(made != 0, may_differ(covariance.pattern))


def test_draws_and_sds_are_those_of_the_root(covariance):
    theta = numbers(covariance)
    made, scale, off = matrix(covariance, theta), theta[covariance.log_sd].exp(), theta[covariance.off]
    eps = torch.randn(5, D, dtype=F64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(spread(covariance.pattern, scale, off, eps), eps @ made.T)
    torch.testing.assert_close(standardized(covariance.pattern, scale, off, made @ eps[0]), eps[0])
    torch.testing.assert_close(covariance.marginal_sd(theta), (made @ made.T).diagonal().sqrt())
    assert float(theta[covariance.log_sd].sum()) == pytest.approx(float(torch.linalg.slogdet(made)[1]))


def test_independent_latents_have_a_diagonal_root(covariance):
    log_sd = torch.linspace(-1, 1, D, dtype=F64)
    theta = torch.cat([torch.zeros(D, dtype=F64), covariance.of_independent(log_sd)])
    assert torch.equal(matrix(covariance, theta), log_sd.exp().diag())


def test_nothing_is_nearer_to_a_precision_than_the_best(covariance):
    """The gradient of tr(H Sigma) / 2 - log |det U| by every number is zero."""
    wanted = precision()
    found = covariance.best(wanted).requires_grad_()
    theta = torch.cat([torch.zeros(D, dtype=F64), found])
    made = matrix(covariance, theta)
    loss = 0.5 * (wanted @ made @ made.T).trace() - theta[covariance.log_sd].sum()
    (slope,) = torch.autograd.grad(loss, found)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12)


def test_a_precision_of_the_pattern_is_met_exactly(covariance):
    made = matrix(covariance, numbers(covariance))
    inverse = torch.linalg.inv(made)
    theta = torch.cat([torch.zeros(D, dtype=F64), covariance.best(inverse.T @ inverse)])
    found = matrix(covariance, theta)
    torch.testing.assert_close(found @ found.T, made @ made.T)


def test_a_matrix_that_is_not_positive_definite_has_no_nearest(covariance):
    assert covariance.best(-precision()) is None


def test_chance_is_what_the_draws_gradient_has_beside_its_mean(covariance):
    """On a quadratic loss, at the curvature's own place; by autograd."""
    curvature, theta = precision(1), numbers(covariance)
    eps = torch.randn(1, 3, D, dtype=F64, generator=torch.Generator().manual_seed(2))

    def losses(theta):
        z = covariance.spread(theta, eps[0])
        made = matrix(covariance, theta)
        return 0.5 * ((z @ curvature) * z).sum(-1), 0.5 * (curvature @ made @ made.T).trace()

    at = theta.clone().requires_grad_()
    each, mean = losses(at)
    (want,) = torch.autograd.grad(each.mean() - mean, at)
    control = covariance.control(curvature, theta)
    torch.testing.assert_close(covariance.by_chance(control, theta, eps, 1.0), want[D:])
    torch.testing.assert_close(covariance.chance(control, theta, eps[0]), (each - mean).detach())


def test_chance_has_mean_zero_for_any_control(covariance):
    """Over the normals' second moments exactly, by 2 D sigma points."""
    control = torch.randn(D, D, dtype=F64, generator=torch.Generator().manual_seed(3))
    points = torch.cat([torch.eye(D, dtype=F64), -torch.eye(D, dtype=F64)]) * D**0.5
    found = covariance.by_chance(control, numbers(covariance), points[None], 1.0)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)
    assert abs(float(covariance.chance(control, numbers(covariance), points).sum())) < 1e-10


def test_a_unit_step_of_the_n_of_a_row_is_where_the_loss_curves_by_one(covariance):
    """Minus the ELBO of a quadratic by the numbers of N, beside the diagonal of its second derivative."""
    count = covariance.pattern.top + max((length for _, length in covariance.pattern.blocks), default=0)
    curvature, theta = precision(4), numbers(covariance)
    factor = torch.linalg.inv(torch.linalg.cholesky(curvature)).T
    units = covariance.units(factor, theta)

    def loss(off):
        made = root(covariance.pattern, theta[covariance.log_sd].exp(), off)
        return 0.5 * (curvature @ made @ made.T).trace()

    second = torch.autograd.functional.hessian(loss, theta[covariance.off]).diagonal()
    used = second != 0
    assert torch.equal(units[:D], torch.ones(D, dtype=F64))
    torch.testing.assert_close((units[D:] ** 2 * second)[used], torch.full_like(second, 1 / count)[used])


def test_steps_are_judged_along_every_direction(covariance):
    """A step of the locations by the marginal sds and by the root; one of the covariance by both kinds of sd."""
    theta = numbers(covariance)
    made, loc = matrix(covariance, theta), torch.linspace(-1, 1, D, dtype=F64)
    sd = (made @ made.T).diagonal().sqrt()
    want = torch.maximum((loc / sd).abs(), torch.linalg.solve(made, loc).abs())
    torch.testing.assert_close(covariance.distance(theta, loc), want)
    step = torch.zeros_like(theta)
    step[covariance.log_sd] = 0.25  # of all alike
    torch.testing.assert_close(covariance.change(theta, step), torch.full((D,), 0.25, dtype=F64))


@pytest.mark.parametrize("length", [1, 2, 5, 8, 33])
def test_a_triangular_inverse_is_the_solve(length):
    generator = torch.Generator().manual_seed(length)
    above = torch.randn(3, length, length, dtype=F64, generator=generator).triu(1)
    v = torch.randn(3, length, dtype=F64, generator=generator)
    want = torch.linalg.solve_triangular(above, v[..., None], upper=True, unitriangular=True)[..., 0]
    torch.testing.assert_close(_solved(above, v), want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))
