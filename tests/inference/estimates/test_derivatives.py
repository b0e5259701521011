"""Dense second derivatives against torch.autograd.functional and by hand."""

import pytest
import torch
from svi_problems import F64

from trainer.inference.estimates.derivatives import hessian, second_derivative


def entangled(u):
    return (u.sin().cumsum(0) * u.flip(0).exp()).sum() + (u[:1] * u[-1:] ** 3).sum()


@pytest.mark.parametrize("size", [1, 2, 16, 17, 40])
def test_the_hessian_is_that_of_torch(size):
    """Of more rows than are taken at once, too."""
    at = torch.linspace(-1, 1, size, dtype=F64)
    want = torch.autograd.functional.hessian(entangled, at)
    torch.testing.assert_close(hessian(entangled, at), want, rtol=1e-12, atol=1e-12)
    assert not at.requires_grad


def test_of_what_the_loss_does_not_depend_on_it_is_zero():
    at = torch.tensor([0.5, 1.5, 2.5], dtype=F64)
    assert hessian(lambda u: u[1] ** 3, at).tolist() == [[0, 0, 0], [0, 9.0, 0], [0, 0, 0]]
    assert hessian(lambda u: (u * 2).sum(), at).tolist() == [[0.0] * 3] * 3
    assert hessian(lambda u: u.abs().sum(), at).tolist() == [[0.0] * 3] * 3


def test_a_linear_loss_whose_weights_are_trained_has_none():
    """Its gradient has a gradient of its own, though not by what is asked for."""
    weight = torch.ones(3, dtype=F64, requires_grad=True)
    assert hessian(lambda u: (weight * u).sum(), torch.zeros(3, dtype=F64)).tolist() == [[0.0] * 3] * 3


def test_the_derivative_of_some_results_by_other_arguments():
    at = torch.tensor([1.0, 2.0, 3.0], dtype=F64, requires_grad=True)
    found = second_derivative(torch.stack([at[0] * at[2], at[1] ** 2]), at)
    assert found.tolist() == [[3.0, 0.0, 1.0], [0.0, 4.0, 0.0]]
    constant = second_derivative(torch.ones(2, dtype=F64), at)
    assert (constant.shape, constant.count_nonzero()) == ((2, 3), 0)


class Cube(torch.autograd.Function):
    """An operation without a rule for batches."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return u**3

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        return Square.apply(u) * grad * 3


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return u**2

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        return torch.from_numpy(2 * u.detach().numpy() * grad.detach().numpy())


def test_an_operation_that_cannot_be_batched_is_taken_row_by_row():
    at = torch.linspace(-1, 1, 20, dtype=F64)
    torch.testing.assert_close(hessian(lambda u: Cube.apply(u).sum(), at), torch.diag(6 * at), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_type_stays(dtype):
    assert hessian(entangled, torch.ones(3, dtype=dtype)).dtype == dtype
