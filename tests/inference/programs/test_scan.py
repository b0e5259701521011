"""A chunk as one function of tensors, from code: the slots against a loop by hand."""

import math

import pytest
import torch
from svi_problems import F64

from trainer.inference.programs.scan import NUMBERS, Recipe, Scan, called, shapes_of

STEP = """
def forward(self, at, theta, x, rate, num_obs, lr, start, horizon, first, shift):
    grad = theta - x + shift
    return at + 1, theta - rate * grad, grad * num_obs, grad.abs()
"""
RATES = """
def forward(self, at, num_obs, lr, start, horizon, first, decay):
    return lr * decay ** (at - start)
"""
FIXED = tuple(torch.tensor(each, dtype=F64) for each in (10.0, 0.5, 2.0, 9.0, 8.0, 0.9, 0.25))
"""N, lr, start, horizon and first averaged step; the decay of the rates; the shift of the step."""


def recipe():
    return Recipe(STEP, RATES, 1, (("int64", ()), ("float64", ())), (("float64", ()),), (), "float64")


def test_the_slots_are_those_of_a_loop():
    scan, data = recipe().scan(), (torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=F64),)
    carry = [torch.tensor(4), torch.tensor(0.0, dtype=F64)]
    before = scan.before(carry, data, FIXED)
    assert [tuple(each.shape) for each in before] == [(4,), (4,)]
    torch.testing.assert_close(before[1], 0.5 * 0.9 ** torch.arange(2.0, 6.0, dtype=F64))
    theta = 0.0
    for k, x in enumerate(data[0].tolist()):
        *carry, terms, norm = scan.step(carry, [each[k] for each in before], FIXED)
        grad = theta - x + 0.25
        theta -= 0.5 * 0.9 ** (2 + k) * grad
        assert (int(carry[0]), float(carry[1])) == (5 + k, pytest.approx(theta))
        assert (float(terms), float(norm)) == (pytest.approx(10 * grad), pytest.approx(abs(grad)))


def test_what_all_steps_share_are_the_numbers_and_the_steps_constants():
    shared = recipe().scan().shared(FIXED)
    assert [float(each) for each in shared] == [10.0, 0.5, 2.0, 9.0, 8.0, 0.25]
    assert len(shared) == NUMBERS + 1


def test_rates_of_several_numbers_are_one_row_a_step():
    scan = Scan(called(STEP), lambda at, *given: torch.stack([at * 1.0, given[1]]), 0)
    (_, rates) = scan.before([torch.tensor(7)], (torch.zeros(3),), FIXED[:5])
    assert rates.tolist() == [[7.0, 0.5], [8.0, 0.5], [9.0, 0.5]]


def test_code_has_torch_and_what_graphs_write_for_numbers():
    code = "def forward(self, x):\n    return torch.where(x > 0, inf, x * nan).to(device('cpu'))"
    made = called(code)(torch.tensor([1.0, -1.0]))
    assert made[0] == math.inf
    assert made[1].isnan()


def test_functions_of_two_codes_do_not_share_names():
    one, two = (called(f"a = {number}\ndef forward(self, x):\n    return x + a") for number in (1, 2))
    assert (one(0), two(0), one(0)) == (1, 2, 1)


def test_shapes_are_types_and_sizes():
    tensors = [torch.zeros(2, 3), torch.tensor(1), torch.zeros(0, dtype=F64), torch.zeros(1, dtype=torch.bool)]
    assert shapes_of(tensors) == (("float32", (2, 3)), ("int64", ()), ("float64", (0,)), ("bool", (1,)))
    assert shapes_of([]) == ()


def test_recipes_of_the_same_are_the_same():
    assert recipe() == recipe()
    assert hash(recipe()) == hash(recipe())
