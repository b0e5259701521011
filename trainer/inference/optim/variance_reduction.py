"""What makes steps better than the plain stochastic gradient's: whitened coordinates and an anchor; the curvature that
a control variate of the draws is made of.

Shapes: P parameters, of which the first D are the locations; A lane groups of this rank, R draws of a group.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Preconditioner(NamedTuple):
    """The curvature of the problem near its mode, from a sample of rows."""

    factor: Tensor
    """L [D, D], L L' = the inverse of the Hessian of the negative log joint (nats): locations step in v, loc = L v."""
    curvature: Tensor
    """[D, D]: what the guide's covariance makes of the Hessian of what the draws estimate (nats), as
    `Covariance.control`; a prior whose KL is exact has no part in it.
    """
    units: Tensor | None = None
    """[P - D]: what a step of 1 is of each of the parameters behind the locations; None: 1."""

    def of_gradient(self, grad: Tensor) -> Tensor:
        """The gradient [P] by (v, the other parameters in their units)."""
        first, others = grad.split([len(self.factor), len(grad) - len(self.factor)])
        return torch.cat([self.factor.T @ first, others if self.units is None else self.units * others])

    def of_step(self, step: Tensor) -> Tensor:
        """A step [P] of (v, the other parameters in their units) as one of theta."""
        first, others = step.split([len(self.factor), len(step) - len(self.factor)])
        return torch.cat([self.factor @ first, others if self.units is None else self.units * others])

    def each(self, change: Callable[[Tensor], Tensor]) -> "Preconditioner":
        """With ``change`` made to every tensor."""
        return Preconditioner(*(None if part is None else change(part) for part in self))  # type: ignore[arg-type]


class Snapshot(NamedTuple):
    """A point whose gradient over all rows is known: the step's gradient is corrected by what the batch says of it.

    Johnson and Zhang, "Accelerating stochastic gradient descent using predictive variance reduction" (NeurIPS 2013):
    g = g_batch(theta) - g_batch(anchor) + g_all(anchor), on the same rows and draws. For the locations alone: from the
    gradient of the log scales an antithetic pair takes the rows' noise already, and that of the draws, which would
    be the same for as long as the anchor stays, is averaged over the steps.
    """

    theta: Tensor
    """[P]."""
    gradient: Tensor
    """[D] by the locations, of loss / N, over all rows and ranks."""

    @classmethod
    def at(cls, theta: Tensor, locations: int) -> "Snapshot":
        """Where no gradient is known yet."""
        return cls(theta.clone(), theta.new_zeros(locations))

    def minus(self, grad: Tensor, here: Tensor) -> Tensor:
        """``grad`` [P] less ``here`` [P], the same batch's gradient at the anchor."""
        return torch.cat([(grad - here)[: len(self.gradient)], grad[len(self.gradient) :]])

    def plus(self, grad: Tensor) -> Tensor:
        """The summed ``grad`` [P] with the anchor's own."""
        return torch.cat([grad[: len(self.gradient)] + self.gradient, grad[len(self.gradient) :]])
