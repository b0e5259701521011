"""Optimizers as pure functions of flat vectors, their updates equal to `torch.optim`'s (the tests' oracle).

The gradient is that of loss / N, so `eps` (given for the full-data loss, as in the papers) is divided by N: with
Adam's usual 1e-8 against gradients of size 1/N, a latent known from its prior alone would hardly move.

Every optimizer has the same three sections: `init(theta) -> moments`, `rates(...) -> rates` (what depends on the step
alone, so that a chunk's are computed at once and no power is taken for each element) and `update(...) -> (theta,
moments)`. Shapes: theta, gradient and moments [P]; count is the number of this update, from 1 (int64 []); rates [m].
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Moments = dict[str, Tensor]
"""What an optimizer remembers, by name, each [P]."""


class Optimizer(Protocol):
    """What the step needs of an optimizer. ``lr`` is the scheduled rate, like ``rates`` a float64 tensor."""

    lr: float

    def init(self, theta: Tensor) -> Moments: ...

    def rates(self, lr: Tensor, count: Tensor, num_obs: float) -> Tensor: ...

    def update(self, grad: Tensor, moments: Moments, theta: Tensor, rates: Tensor) -> tuple[Tensor, Moments]: ...


@dataclass(frozen=True)
class Adam:
    """Kingma and Ba (2015), algorithm 1; ``weight_decay`` is added to the gradient of loss / N, as torch does."""

    lr: float = 0.02
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    """True: AdamW, the decay taken from theta itself (Loshchilov and Hutter 2019)."""

    def init(self, theta: Tensor) -> Moments:
        return {"mean": torch.zeros_like(theta), "square": torch.zeros_like(theta)}

    def rates(self, lr: Tensor, count: Tensor, num_obs: float) -> Tensor:
        """[4]: corrected step size, correction of the root of the second moment, eps, what a decay leaves."""
        count = count.double()
        root = (1 - self.beta2**count).sqrt()
        rates = [lr / (1 - self.beta1**count), 1 / root, self.effective_eps(root) / num_obs, 1 - lr * self.weight_decay]
        return torch.stack([torch.as_tensor(each, dtype=torch.float64, device=lr.device) for each in rates])

    def update(self, grad: Tensor, moments: Moments, theta: Tensor, rates: Tensor) -> tuple[Tensor, Moments]:
        size, correction, eps, left = rates.unbind()[:4]
        if self.weight_decay and self.decoupled:
            theta = theta * left
        elif self.weight_decay:
            grad = grad + self.weight_decay * theta
        mean = self.beta1 * moments["mean"] + (1 - self.beta1) * grad
        square = self.beta2 * moments["square"] + (1 - self.beta2) * grad * grad
        return theta - size * mean / (square.sqrt() * correction + eps), {"mean": mean, "square": square}

    def effective_eps(self, root: Tensor) -> Tensor | float:
        """eps beside the corrected root of the second moment."""
        return self.eps


@dataclass(frozen=True)
class ClippedAdam(Adam):
    """Adam on a gradient clipped element by element at ``clip`` (in full-data nats), as `pyro.optim.ClippedAdam`,
    which adds eps before the bias correction (the end of Kingma and Ba's section 2).
    """

    clip: float = 10.0

    def effective_eps(self, root: Tensor) -> Tensor | float:
        return self.eps / root

    def rates(self, lr: Tensor, count: Tensor, num_obs: float) -> Tensor:
        """Adam's, then the bound of an element of the gradient of loss / N."""
        bound = torch.as_tensor(self.clip / num_obs, dtype=torch.float64, device=lr.device)
        return torch.cat([super().rates(lr, count, num_obs), bound[None]])

    def update(self, grad: Tensor, moments: Moments, theta: Tensor, rates: Tensor) -> tuple[Tensor, Moments]:
        bound = rates[4].to(grad.dtype)
        return super().update(grad.clamp(-bound, bound), moments, theta, rates)


@dataclass(frozen=True)
class SGD:
    """Robbins and Monro (1951), with heavy-ball momentum as in torch.optim.SGD; the gradient is that of loss / N."""

    lr: float = 0.1
    momentum: float = 0.0

    def init(self, theta: Tensor) -> Moments:
        return {"velocity": torch.zeros_like(theta)}

    def rates(self, lr: Tensor, count: Tensor, num_obs: float) -> Tensor:
        """[1]: the step size."""
        return lr[None]

    def update(self, grad: Tensor, moments: Moments, theta: Tensor, rates: Tensor) -> tuple[Tensor, Moments]:
        velocity = self.momentum * moments["velocity"] + grad
        return theta - rates[0] * velocity, {"velocity": velocity}
