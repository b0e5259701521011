"""Optimisers as pure functions of flat vectors, their updates equal to `torch.optim`'s (the tests' oracle).

The gradient is that of loss / N, so `eps` (given for the full-data loss, as in the papers) is divided by N: with
Adam's usual 1e-8 against gradients of size 1/N, a latent known from its prior alone would hardly move.

Every optimiser has the same two sections: `init(theta) -> slots` and `update(...) -> (theta, slots)`.
Shapes: theta, gradient and slots [P]; count is the number of this update, from 1 (int64 []).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Slots = tuple[Tensor, ...]


class Optimizer(Protocol):
    """What the step needs of an optimiser. ``lr`` is a float64 scalar tensor."""

    lr: float

    def init(self, theta: Tensor) -> Slots: ...

    def update(
        self, grad: Tensor, slots: Slots, theta: Tensor, lr: Tensor, count: Tensor, num_obs: float
    ) -> tuple[Tensor, Slots]: ...


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

    def init(self, theta: Tensor) -> Slots:
        return torch.zeros_like(theta), torch.zeros_like(theta)

    def update(
        self, grad: Tensor, slots: Slots, theta: Tensor, lr: Tensor, count: Tensor, num_obs: float
    ) -> tuple[Tensor, Slots]:
        if self.weight_decay and self.decoupled:
            theta = theta * (1 - lr * self.weight_decay)
        elif self.weight_decay:
            grad = grad + self.weight_decay * theta
        mean = self.beta1 * slots[0] + (1 - self.beta1) * grad
        square = self.beta2 * slots[1] + (1 - self.beta2) * grad * grad
        count = count.double()
        correction1, correction2 = 1 - self.beta1**count, 1 - self.beta2**count
        denominator = square.sqrt() / correction2.sqrt() + self.effective_eps(correction2) / num_obs
        return theta - (lr / correction1) * mean / denominator, (mean, square)

    def effective_eps(self, correction2: Tensor) -> Tensor | float:
        """eps beside the bias-corrected root of the second moment."""
        return self.eps


@dataclass(frozen=True)
class ClippedAdam(Adam):
    """Adam on a gradient clipped element by element at ``clip`` (in full-data nats), as `pyro.optim.ClippedAdam`,
    which adds eps before the bias correction (the end of Kingma and Ba's section 2)."""

    clip: float = 10.0

    def effective_eps(self, correction2: Tensor) -> Tensor | float:
        return self.eps / correction2.sqrt()

    def update(
        self, grad: Tensor, slots: Slots, theta: Tensor, lr: Tensor, count: Tensor, num_obs: float
    ) -> tuple[Tensor, Slots]:
        bound = self.clip / num_obs
        return super().update(grad.clamp(-bound, bound), slots, theta, lr, count, num_obs)


@dataclass(frozen=True)
class SGD:
    """Robbins and Monro (1951), with heavy-ball momentum as in torch.optim.SGD; the gradient is that of loss / N."""

    lr: float = 0.1
    momentum: float = 0.0

    def init(self, theta: Tensor) -> Slots:
        return (torch.zeros_like(theta),)

    def update(
        self, grad: Tensor, slots: Slots, theta: Tensor, lr: Tensor, count: Tensor, num_obs: float
    ) -> tuple[Tensor, Slots]:
        velocity = self.momentum * slots[0] + grad
        return theta - lr * velocity, (velocity,)
