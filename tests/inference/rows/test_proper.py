"""Which densities of rows can be integrated around their modes."""

import pytest
import torch

from trainer.inference.rows.integral import around_the_mode
from trainer.inference.rows.proper import improper, reached

F64 = torch.float64
AT = torch.tensor([-2.0, 0.0, 3.0], dtype=F64)


def of(density, size=1, dtype=F64):
    """By row: whether a number does not fall, and whether its curvature is not positive."""
    found = improper(density, torch.zeros(3, size, dtype=dtype))
    return found.level.any(1).tolist(), found.curved.any(1).tolist()


PROPER = {
    "normal": lambda u: -0.5 * (u[:, 0] - AT) ** 2,
    "wide": lambda u: -0.5 * (u[:, 0] / 1e4) ** 2,
    "narrow": lambda u: -0.5 * ((u[:, 0] - AT) / 1e-4) ** 2,
    "cauchy": lambda u: -torch.log1p((u[:, 0] - AT) ** 2),
    "log of a rate": lambda u: 2 * u[:, 0] - u[:, 0].exp(),
    "logit": lambda u: 0.5 * u[:, 0] - torch.nn.functional.softplus(u[:, 0]),
    "overflows": lambda u: -(u[:, 0] ** 2) + 0 * u[:, 0].exp(),
}
LEVEL = {
    "no density": lambda u: 0 * u[:, 0],
    "rises": lambda u: u[:, 0],
    "rises to a level": lambda u: torch.nn.functional.logsigmoid(u[:, 0]),
    "grows without bound": lambda u: u[:, 0] ** 2,
}


@pytest.mark.parametrize("name", PROPER)
def test_what_falls_to_both_sides_is_right(name):
    assert of(PROPER[name]) == ([False] * 3, [False] * 3)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("name", LEVEL)
def test_what_does_not_fall_is_found(name, dtype):
    assert of(LEVEL[name], dtype=dtype) == ([True] * 3, [False] * 3)


def test_a_minimum_between_two_values_is_found():
    assert of(lambda u: -((u[:, 0] ** 2 - 4) ** 2)) == ([False] * 3, [True] * 3)


def test_rows_are_told_apart():
    some = torch.tensor([True, False, False])
    assert of(lambda u: -0.5 * torch.where(some, 0.0, u[:, 0] ** 2))[0] == [True, False, False]


def test_numbers_are_told_apart_and_a_ridge_is_one():
    second = improper(lambda u: -0.5 * u[:, 0] ** 2, torch.zeros(3, 2, dtype=F64)).level
    assert second.tolist() == [[False, True]] * 3
    assert of(lambda u: -0.5 * u.sum(1) ** 2, 2)[0] == [True] * 3
    assert of(lambda u: -0.5 * (u.sum(1) ** 2 + 1e-4 * (u[:, 0] - u[:, 1]) ** 2), 2) == ([False] * 3, [False] * 3)


def test_what_is_not_known_is_not_judged():
    assert of(lambda u: u[:, 0] * torch.nan) == ([False] * 3, [False] * 3)


def test_a_mode_is_reached_to_a_thousandth_of_its_sd():
    scale = torch.tensor([0.1, 1.0, 10.0], dtype=F64)

    def density(u):
        return -torch.log1p(((u[:, 0] - AT) / scale) ** 2)

    normal = around_the_mode(density, AT[:, None], 4)
    assert reached(density, normal).all()
    moved = normal._replace(mode=normal.mode + 0.01 * scale[:, None])
    assert not reached(density, moved).any()
