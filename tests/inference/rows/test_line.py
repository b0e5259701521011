"""The posterior of one number on its grid, against a fine grid, and exactly where it is normal."""

import math

import pytest
import torch
from svi_problems import F64

from trainer.inference.rows.line import Line, line_nodes

LEVELS = (0.01, 0.05, 0.5, 0.95, 0.99)
NORMAL = torch.distributions.Normal


def found(log_density, mode, scale, count=41):
    """Mean, sd and quantiles."""
    nodes = line_nodes(count, torch.zeros((), dtype=F64))
    u = mode + scale * nodes.at
    weights = torch.softmax(log_density(u) + nodes.log_weights, 0)
    line = Line.of(torch.tensor([[mode]], dtype=F64), torch.tensor([[scale]], dtype=F64), weights[:, None, None])
    mean = weights @ u
    return mean, (weights @ (u - mean) ** 2).sqrt(), torch.cat([line.quantiles(level) for level in LEVELS])


def by_hand(log_density):
    """The same by 2 million steps; quantiles lie on the line between the two nearest."""
    u = torch.linspace(-40, 40, 2_000_001, dtype=F64)
    shares = torch.softmax(log_density(u), 0)
    below = shares.cumsum(0) - shares / 2
    after = torch.searchsorted(below, torch.tensor(LEVELS, dtype=F64))
    part = (torch.tensor(LEVELS, dtype=F64) - below[after - 1]) / (below[after] - below[after - 1])
    mean = shares @ u
    return mean, (shares @ (u - mean) ** 2).sqrt(), u[after - 1] + part * (u[after] - u[after - 1])


CASES = [
    (lambda u: NORMAL(1.3, 0.7).log_prob(u), 1.3, 0.7, 1e-6),
    (lambda u: NORMAL(0.0, 0.7).log_prob(u) + 5 * u - u.exp(), 0.6, 0.4, 2e-5),  # a count of 5
    (lambda u: NORMAL(0.0, 2.0).log_prob(u) - u.exp(), -1.3, 1.2, 5e-5),  # a count of 0
    (lambda u: NORMAL(0.0, 2.0).log_prob(u) + torch.nn.functional.logsigmoid(u), 1.0, 1.7, 1e-5),
    (lambda u: 0.7 * u - 1.2 * torch.nn.functional.softplus(u), 0.3, 1.8, 1e-4),  # the logit of a Beta(0.7, 0.5)
]


@pytest.mark.parametrize(("log_density", "mode", "scale", "tolerance"), CASES)
def test_one_number_is_known_on_a_few_nodes(log_density, mode, scale, tolerance):
    ours, want = found(log_density, mode, scale), by_hand(log_density)
    torch.testing.assert_close(ours[0], want[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(ours[1], want[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(ours[2], want[2], rtol=0, atol=tolerance)


def test_a_normal_is_exact_to_rounding():
    mean, sd, _ = found(lambda u: -0.5 * ((u - 1.3) / 0.7) ** 2, 1.3, 0.7)
    assert float(mean) == pytest.approx(1.3, abs=1e-12)
    assert float(sd) == pytest.approx(0.7, abs=1e-11)


def two(modes, scales):
    """A Line of normals [R, B]."""
    nodes = line_nodes(41, torch.zeros((), dtype=F64))
    weights = torch.softmax(-0.5 * nodes.at**2 + nodes.log_weights, 0)
    return Line.of(modes, scales, weights[:, None, None].expand(-1, *modes.shape))


def test_quantiles_are_those_of_the_mixture_over_the_draws():
    modes = torch.tensor([[0.0, 5.0], [1.0, -5.0]], dtype=F64)
    scales = torch.tensor([[1.0, 0.1], [0.3, 2.0]], dtype=F64)
    for level in LEVELS:
        u = two(modes, scales).quantiles(level)
        below = NORMAL(modes, scales).cdf(u).mean(0)
        torch.testing.assert_close(below, torch.full_like(below, level), rtol=0, atol=1e-7)


def test_draws_have_the_distribution_of_their_draw_of_the_globals():
    modes, scales = torch.tensor([[0.0], [1.0]], dtype=F64), torch.tensor([[1.0], [0.3]], dtype=F64)
    level = torch.tensor([[0.2], [0.7]], dtype=F64)
    u = two(modes, scales).drawn(level)
    torch.testing.assert_close(NORMAL(modes, scales).cdf(u), level, rtol=0, atol=1e-7)


def test_the_distribution_function_rises_from_0_to_1():
    line = two(torch.zeros(1, 1, dtype=F64), torch.ones(1, 1, dtype=F64))
    u = torch.linspace(-30, 30, 400, dtype=F64)
    values = torch.stack([line.below(each[None])[0].squeeze() for each in u])
    slopes = torch.stack([line.below(each[None])[1].squeeze() for each in u])
    assert float(values[0]) == pytest.approx(0, abs=1e-8)
    assert float(values[-1]) == pytest.approx(1, abs=1e-8)
    torch.testing.assert_close(slopes, (-0.5 * u**2).exp() / math.sqrt(2 * math.pi), rtol=0, atol=1e-6)
