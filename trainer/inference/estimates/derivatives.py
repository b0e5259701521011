"""Dense derivatives of functions of theta, for at most a few hundred latents.

Shapes: K results, D arguments.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_ROWS_AT_ONCE = 16


def hessian(loss: Callable[[Tensor], Tensor], where: Tensor) -> Tensor:
    """The Hessian [D, D] of ``loss``, 0 for what it does not depend on."""
    at = where.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(at), at, create_graph=True)
    return second_derivative(grad, at)


def second_derivative(grad: Tensor, at: Tensor) -> Tensor:
    """The derivative [K, D] of ``grad`` [K] by ``at`` [D], 0 where it does not depend on it."""
    unit = torch.eye(len(grad), dtype=grad.dtype, device=at.device)
    if not grad.requires_grad:
        return at.new_zeros(len(grad), len(at))

    def rows(directions: Tensor) -> Tensor:
        return torch.autograd.grad(grad, at, directions, retain_graph=True, is_grads_batched=True)[0]

    try:
        return torch.cat([rows(some) for some in unit.split(_ROWS_AT_ONCE)])
    except RuntimeError:  # an operation that cannot be batched
        return torch.stack([torch.autograd.grad(grad, at, each, retain_graph=True)[0] for each in unit])
