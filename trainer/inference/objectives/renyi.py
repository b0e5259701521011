"""The Rényi bound, and with ``alpha`` 0 the importance-weighted one: K draws of z at once, of unequal weight.

    bound = log(mean over k of w_k^(1 - alpha)) / (1 - alpha),  w_k = p(y, z_k) / q(z_k)

Burda, Grosse and Salakhutdinov (2016); Li and Turner (NeurIPS 2016). Its gradient by reparameterization is that of
sum_k v_k log w_k with v_k = w_k^(1 - alpha) / sum_j w_j^(1 - alpha) held fixed. The doubly reparameterized one (Tucker,
Lawson, Gu and Maddison 2018) lets a gradient through z alone, at weights alpha v_k + (1 - alpha) v_k^2: its mean is
the same, and its noise vanishes where the guide is the posterior.

Shapes: K draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.inference.guides.mean_field import KL
from trainer.inference.objectives.objective import Terms


@dataclass(frozen=True)
class Renyi:
    """Takes the gradient of the bound of ``draws`` draws, and gives the terms of the ELBO, the mean over these draws.

    The weights are of all rows, so a step has to hold all of them in one lane group.
    """

    alpha: float = 0.0
    """From 0, the importance-weighted bound, to 1, the ELBO."""
    draws: int = 8
    doubly: bool = True
    """Whether the gradient is doubly reparameterized; only a guide's parameters have such a gradient."""
    is_elbo = False
    warmup = 0
    signs = (1.0,)

    @property
    def kl(self) -> KL:
        return "sticking_the_landing" if self.doubly else "monte_carlo"

    @property
    def pairs(self) -> int:
        return self.draws

    def kl_weight_at(self, step: Tensor) -> Tensor:
        return torch.ones((), dtype=torch.float64, device=step.device)

    def bound(self, log_weights: Tensor) -> Tensor:
        """The bound [] of ``log_weights`` [K]."""
        rest = 1 - self.alpha
        if rest == 0:
            return log_weights.mean()
        return ((rest * log_weights).logsumexp(0) - math.log(len(log_weights))) / rest

    def shares(self, log_weights: Tensor) -> Tensor:
        """How much each draw's gradient counts [K]."""
        shares = ((1 - self.alpha) * log_weights.detach()).softmax(0)
        return self.alpha * shares + (1 - self.alpha) * shares**2 if self.doubly else shares

    def combined(self, draws: Sequence[Sequence[Terms]], share: float) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for group in draws:
            shares = self.shares(torch.stack([torch.stack([t.value for t in each.values()]).sum() for each in group]))
            for name, term in group[0].items():
                values = torch.stack([each[name].value for each in group])
                raised = (shares * values).sum()
                value = (values.mean().detach() + raised - raised.detach()) * (1.0 if term.scaled else share)
                total[name] = total[name] + value if name in total else value
        return total
