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

    def rows(directions: Tensor, batched: bool) -> Tensor:
        options: dict[str, bool] = {"retain_graph": True, "is_grads_batched": batched, "allow_unused": True}
        (found,) = torch.autograd.grad(grad, at, directions, **options)
        return at.new_zeros(*directions.shape[:-1], len(at)) if found is None else found

    try:
        return torch.cat([rows(some, True) for some in unit.split(_ROWS_AT_ONCE)])
    except RuntimeError:  # an operation that cannot be batched
        return torch.stack([rows(each, False) for each in unit])
