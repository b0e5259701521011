"""Sums of products of numbers that are given by their logarithms: what opt_einsum asks of a backend.

As `pyro.ops.einsum.torch_log`, in operations alone that `torch.vmap` takes.
"""

import math

import torch
from pyro.ops.einsum.util import Tensordot
from torch import Tensor


def transpose(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    return tensor.permute(axes)


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """log of the sums that ``equation`` says, of the exponentials of the ``operands``."""
    symbols = sorted(set(equation) - set(",->"))
    equation = "".join(dict(zip(symbols, map(chr, range(97, 123)))).get(each, each) for each in equation)
    inputs, output = equation.split("->")
    if inputs == output:
        return operands[0].clone()
    shifts, scaled = [], []
    for dims, operand in zip(inputs.split(","), operands):
        summed = [place for place, dim in enumerate(dims) if dim not in output]
        largest = operand.detach().amax(summed, keepdim=True) if summed else operand.detach()
        largest = largest.clamp(min=torch.finfo(largest.dtype).min)  # no difference of infinities
        scaled.append((operand - largest).exp())
        kept = [dim for dim in dims if dim in output]
        sizes = dict(zip(dims, largest.shape))
        largest = largest.reshape([sizes[dim] for dim in kept])
        largest = largest.permute([kept.index(dim) for dim in output if dim in kept])
        shifts.append(largest.reshape([sizes[dim] if dim in kept else 1 for dim in output]))
    return sum(shifts, _log(torch.einsum(equation, *scaled)))


def _log(sums: Tensor) -> Tensor:
    """-inf at 0, with no derivative there."""
    return torch.where(sums > 0, sums.clamp(min=torch.finfo(sums.dtype).tiny).log(), -math.inf)


tensordot = Tensordot(einsum)
