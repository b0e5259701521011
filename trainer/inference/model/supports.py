"""Whether values lie in the support of a distribution, element by element; a point of it; and what it is in words."""

from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Independent, constraints

_MULTINOMIAL = type(constraints.multinomial(1))
_WORDS = {
    type(constraints.boolean): "0 or 1",
    type(constraints.real): "numbers",
    type(constraints.simplex): "shares whose sum is 1",
    type(constraints.one_hot): "a 1 among zeros",
}


def innermost(fn: Any) -> Any:
    """The distribution without what expands, masks or joins it."""
    while isinstance(fn, (dist.MaskedDistribution, Independent, dist.ExpandedDistribution)):
        fn = fn.base_dist
    return fn


def support_of(fn: Any) -> Any:
    """The support of the `innermost` distribution, None where it does not tell one."""
    try:
        return innermost(fn).support
    except (NotImplementedError, AttributeError):
        return None


def supported(fn: Any, value: Tensor) -> Tensor:
    """Whether each element of ``value`` lies in the support; where ``fn`` masks it, it does.

    Its shape is the batch shape of the `innermost` distribution, as far as ``value`` has it.
    """
    if isinstance(fn, dist.MaskedDistribution):
        mask = torch.as_tensor(fn._mask, device=value.device)
        inside = supported(fn.base_dist, value)
        return inside | ~mask.reshape(*mask.shape, *(1,) * (inside.dim() - len(fn.batch_shape)))
    if isinstance(fn, (Independent, dist.ExpandedDistribution)):
        return supported(fn.base_dist, value)
    try:
        return holds(fn.support, value)
    except (NotImplementedError, AttributeError):  # it has none, or none that can be checked
        return value.new_ones(value.shape[: value.dim() - len(fn.event_shape)], dtype=torch.bool)


def holds(constraint: Any, value: Tensor) -> Tensor:
    """Whether each element of ``value`` satisfies it."""
    if constraint is constraints.simplex:  # torch allows 1e-6, which shares in float32 need not keep
        return (value >= 0).all(-1) & ((value.sum(-1) - 1).abs() < 1e-4)
    inside: Tensor = constraint.check(value.long() if value.dtype == torch.bool else value)
    return inside & (value % 1 == 0).all(-1) if type(constraint) is _MULTINOMIAL else inside  # torch takes 2.5 for one


def harmless(fn: Any, value: Tensor, counts: Tensor) -> Tensor:
    """``value`` with a point of the support in place of what does not count ([batch shape]) and lies outside.

    A mask takes a density out of a sum, and its gradient is then 0 times what it is there, which need not be a number.
    """
    support = support_of(fn)
    point = None if support is None else _point(support, value)
    if point is None or value.dim() != len(fn.batch_shape) + len(fn.event_shape):
        return value
    right = holds(support, value)
    kept = right | counts.reshape(*counts.shape, *(1,) * (right.dim() - len(fn.batch_shape)))
    return torch.where(kept.reshape(*kept.shape, *(1,) * (value.dim() - right.dim())), value, point.to(value.dtype))


def _point(constraint: Any, like: Tensor) -> Tensor | None:
    """A point inside, as far as its bounds tell."""
    constraint = _base(constraint)
    low, high = (getattr(constraint, name, None) for name in ("lower_bound", "upper_bound"))
    if constraint is constraints.simplex:
        return torch.full_like(like[..., :1], 1 / like.shape[-1])
    if constraint is constraints.real or constraint is constraints.boolean:
        return like.new_zeros(())
    if getattr(constraint, "event_dim", 0) or (low is None and high is None):
        return None
    if low is None:
        return torch.as_tensor(high, device=like.device) - 1
    if high is None:
        return torch.as_tensor(low, device=like.device) + 1
    return torch.as_tensor(low if constraint.is_discrete else (low + high) / 2, device=like.device)


def _base(constraint: Any) -> Any:
    while isinstance(getattr(constraint, "base_constraint", None), constraints.Constraint):
        constraint = constraint.base_constraint
    return constraint


def tensors_of(constraint: Any) -> Iterator[Tensor]:
    """The tensors that a constraint is made of."""
    for part in vars(constraint).values() if hasattr(constraint, "__dict__") else ():
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, constraints.Constraint):
            yield from tensors_of(part)
        elif isinstance(part, list | tuple):
            for each in part:
                yield from [each] if isinstance(each, Tensor) else tensors_of(each)


def is_interval(constraint: Any) -> bool:
    """Whether scalars between two of its values have it too, if they are whole where the constraint is discrete."""
    known = type(constraint).__module__ == constraints.__name__ and not constraint.event_dim
    return known and not any(True for _ in tensors_of(constraint))


def in_words(constraint: Any) -> str:
    """What lies in it: "0 or 1", "whole numbers from 0"."""
    constraint = _base(constraint)
    low, high = (getattr(constraint, name, None) for name in ("lower_bound", "upper_bound"))
    whole = "whole numbers " if getattr(constraint, "is_discrete", False) else ""
    low, high = _number(low), _number(high)
    if type(constraint) in _WORDS:
        return _WORDS[type(constraint)]
    if type(constraint) is _MULTINOMIAL:
        return f"whole numbers whose sum is {high}"
    if low and high:
        return f"{whole}from {low} to {high}"
    if low:
        above = isinstance(constraint, type(constraints.positive))
        return f"{whole}{'above' if above else 'from'} {low}"
    if high:
        return f"{whole}up to {high}"
    return str(constraint).removesuffix("()")


def _number(bound: Any) -> str:
    if isinstance(bound, Tensor):
        return f"{bound.min().item():g}" if bound.numel() and bound.min() == bound.max() else "the row's own bound"
    return "" if bound is None else f"{bound:g}"
