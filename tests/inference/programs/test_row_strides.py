"""Columns and products stored by number for element-wise operations: the same values, and who is left alone."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from trainer.inference.programs.row_strides import stored_by_number

B = 12
X, Z, W = torch.randn(1, B, 5), torch.randn(1, B, 5, 2), torch.randn(2)
BY_NUMBER = (1, B)


def product(x, z, w):
    eta = z[0] @ w
    return (eta - x[0]).sigmoid().sum(1), eta.exp()


def backwards(x, z, w):
    w = w.detach().requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad((z[0] @ w * x[0]).tanh().sum(), w)
    return (grad,)


def flattened(x, z, w):
    return ((x[0] + 1).view(-1) * 2,)


@pytest.mark.parametrize("function", [product, backwards, flattened])
def test_the_values_stay(function):
    graph = make_fx(function)(X, Z, W)
    stored_by_number(graph, B)
    for got, want in zip(graph(X, Z, W), function(X, Z, W)):
        torch.testing.assert_close(got, want)


def test_element_wise_operations_take_columns_and_products_by_number():
    graph = make_fx(product)(X, Z, W)
    stored_by_number(graph, B)
    assert graph(X, Z, W)[1].stride() == BY_NUMBER
    assert sum("force_stride_order" in str(node.target) for node in graph.graph.nodes) == 2


@pytest.mark.parametrize(
    "function", [lambda x, z, w: x[0] @ x[0].T, lambda x, z, w: x[0, :, 0].exp(), lambda x, z, w: (z[0] + w) ** 2]
)
def test_what_is_no_table_of_rows_is_left_alone(function):
    graph = make_fx(function)(X, Z, W)
    stored_by_number(graph, B)
    assert "force_stride_order" not in graph.code
