"""Columns of whole numbers and truth values where torch computes with floats alone: products, means, differences.

`x @ w` with an integer matrix, or `1 - treated`, are what they are in NumPy and pandas. Lookups keep their integers.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

_MEANS = frozenset({"mean", "std", "var", "softmax", "log_softmax", "softplus", "norm", "linalg_norm"})
_DIFFERENCES = frozenset({"sub", "subtract", "rsub", "__sub__", "__rsub__", "neg", "__neg__"})
_PRODUCTS = frozenset(
    {
        *("matmul", "__matmul__", "__rmatmul__", "mm", "mv", "bmm", "dot", "vdot", "inner", "tensordot", "einsum"),
        *("addmm", "addmv", "addbmm", "baddbmm", "linear", "bilinear", "linalg_multi_dot", "linalg_vecdot", "cdist"),
        *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "lerp"),
    }
)


class Promoting(TorchFunctionMode):
    """Hands these functions their whole numbers as floats, and truth values to a difference as whole numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in _PRODUCTS or name in _MEANS:
            floats = [each.dtype for each in tree_leaves((args, kwargs)) if _is(each) and each.is_floating_point()]
            if floats or name in _MEANS:
                dtype = floats[0] if floats else torch.get_default_dtype()
                args, kwargs = tree_map(lambda each: each.to(dtype) if _is_whole(each) else each, (args, kwargs))
        elif name in _DIFFERENCES:
            args = tree_map(lambda each: each.long() if _is(each) and each.dtype == torch.bool else each, args)
        return func(*args, **kwargs)


def _is(each: Any) -> bool:
    return isinstance(each, Tensor)


def _is_whole(each: Any) -> bool:
    return _is(each) and not (each.is_floating_point() or each.is_complex())
