"""A chunk as one function of tensors: the rates of all its steps, then the traced step over the slots.

It is made of text and numbers alone, so that another process compiles it without the user's model (`Recipe`).

Shapes: as in `trainer.inference.programs.program`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Function = Callable[..., Any]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""The type of each tensor, as "float32", and its shape."""
NUMBERS = 5
"""N, lr, and the round's start, horizon and first averaged step."""


@dataclass(frozen=True)
class Recipe:
    """All that a compiled chunk depends on besides the machine and the libraries."""

    step: str
    """The traced step's code."""
    rates: str
    """The code of the optimizer's rates."""
    rate_constants: int
    """How many constants the rates have; the step has the others."""
    carry: Shapes
    data: Shapes
    """Without the axis of the slots."""
    fixed: Shapes
    dtype: str
    """torch's default type: that of numbers that the code makes from none."""

    def scan(self) -> "Scan":
        return Scan(called(self.step), called(self.rates), self.rate_constants)


def shapes_of(tensors: Sequence[Tensor]) -> Shapes:
    return tuple((str(each.dtype).removeprefix("torch."), tuple(each.shape)) for each in tensors)


def called(code: str) -> Function:
    """The function that a graph's ``code`` defines."""
    names: dict[str, Any] = {"torch": torch, "device": torch.device, "inf": math.inf, "nan": math.nan}
    exec(code, names)  # noqa: S102  of a graph that was traced here
    return lambda *tensors: names["forward"](None, *tensors)


class Scan(nn.Module):
    """``step(*carry, *slot, *numbers, *constants)`` gives (*carry, terms, norm); ``rates(step, *numbers, *constants)``
    the optimizer's rates at a step. What is fixed are the numbers, the constants of the rates and those of the step.
    """

    def __init__(self, step: Function, rates: Function, rate_constants: int):
        super().__init__()
        self._step, self._rates, self._rate_constants = step, rates, rate_constants

    def before(self, carry: Sequence[Tensor], data: Sequence[Tensor], fixed: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the steps take besides carry and ``fixed``, each [K, ...]: the data and the rates."""
        steps = carry[0] + torch.arange(data[0].shape[0], device=carry[0].device)
        given = fixed[: NUMBERS + self._rate_constants]
        return *data, torch.vmap(lambda at: self._rates(at, *given))(steps)

    def shared(self, fixed: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What is the same for all steps: the numbers, and the step's constants."""
        return *fixed[:NUMBERS], *fixed[NUMBERS + self._rate_constants :]

    def step(self, carry: Sequence[Tensor], here: Sequence[Tensor], fixed: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The traced step: carry, terms, norm."""
        return self.call(*carry, *here, *self.shared(fixed))

    def call(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """`step` of its tensors in a row."""
        return tuple(self._step(*tensors))
