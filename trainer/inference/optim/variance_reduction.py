"""What makes steps better than the plain stochastic gradient's: whitened coordinates, a control variate, an anchor.

Shapes: P parameters, of which the first D are the locations; A lane groups of this rank, R draws of a group, E >= D
normals of a draw.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Preconditioner(NamedTuple):
    """The curvature of the problem near its mode, from a sample of rows."""

    factor: Tensor
    """L [D, D], L L' = the inverse of the Hessian of the negative log joint (nats): locations step in v, loc = L v."""
    curvature: Tensor
    """H [D, D]: the Hessian of what the draws estimate (nats); a prior whose KL is exact has no part in it."""

    def of_gradient(self, grad: Tensor) -> Tensor:
        """The gradient [P] by (v, the other parameters)."""
        first, others = grad.split([len(self.factor), len(grad) - len(self.factor)])
        return torch.cat([self.factor.T @ first, others])

    def of_step(self, step: Tensor) -> Tensor:
        """A step [P] of (v, the other parameters) as one of theta."""
        first, others = step.split([len(self.factor), len(step) - len(self.factor)])
        return torch.cat([self.factor @ first, others])

    def control_variate(self, sd: Tensor, elements: Tensor, share: float) -> Tensor:
        """What the draws ``elements`` [A, R, E] of a mean-field guide with ``sd`` [D] add to the gradient [D] of a
        quadratic loss by the log sds by chance, in nats.

        With f(z) = z'Hz / 2 the gradient by log s is s eps (H s eps), of mean s^2 diag H: the difference has mean 0 for
        any H, and takes nearly all noise from the gradient of the log scales where f is nearly quadratic. (An
        antithetic pair has taken it from that of the locations.) Miller, Foti, D'Amour and Adams, "Reducing
        reparameterization gradient variance" (NeurIPS 2017), section 3. A scale enters with at most 1 / sqrt(H_ii): far
        from where H was taken it does not add more noise than it would take there. ``share``: of a lane group.
        """
        scale = self._bounded(sd)
        z = scale * elements[..., : len(scale)].flatten(0, -2)
        chance = (z * (z @ self.curvature)).mean(0) - scale**2 * self.curvature.diagonal()
        return share * len(elements) * chance

    def chance(self, sd: Tensor, elements: Tensor) -> Tensor:
        """What draws [..., E] and their antitheses add to a quadratic loss by chance, in nats: (z'Hz - its mean) / 2
        [...].
        """
        scale = self._bounded(sd)
        z, curvature = scale * elements[..., : len(scale)], self.curvature.to(sd.dtype)
        return 0.5 * ((z @ curvature * z).sum(-1) - (scale**2 * curvature.diagonal()).sum())

    def _bounded(self, sd: Tensor) -> Tensor:
        """``sd`` [D], none beyond what the curvature makes of it."""
        return torch.minimum(sd, self.curvature.diagonal().to(sd.dtype).clamp(min=1e-30).rsqrt())


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
