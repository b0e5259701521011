"""The ELBO as named terms in full-data nats: one number per site, whose sum is the ELBO.

    ELBO = sum over observed sites  E_q log p(y | z)  +  sum over latent sites  (E_q log p(z) + entropy of q(z))

Hoffman et al. (2013), eq. 31 for the minibatch estimate; antithetic pairs evaluate each draw at eps and -eps
(Hammersley and Morton 1956), which removes the odd part of the noise from every gradient. A weight of the KL terms that
rises to 1 lets the likelihood lead at first (Bowman et al. 2016; Sønderby et al. 2016).

Shapes: B rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from trainer.inference.guides.discrete import AtState, joint_states
from trainer.inference.guides.mean_field import KL, Draw, Guide, Noise
from trainer.inference.model.latents import is_deterministic, log_prob_by_row, total_log_prob
from trainer.inference.model.plates import Batch, PlatedModel, inside
from trainer.inference.objectives.objective import Term, Terms


@dataclass(frozen=True)
class ELBO:
    """The mean over ``pairs`` draws of z per lane group, each at eps and -eps if ``antithetic``."""

    kl: KL = "analytic"
    antithetic: bool = True
    pairs: int = 1
    kl_weight: float = 1.0
    """The weight of the KL terms at step 0, in training alone; from there it rises in a line to 1."""
    kl_warmup: int = 1000
    """Steps until it is 1."""
    is_elbo = True

    @property
    def warmup(self) -> int:
        return self.kl_warmup if self.kl_weight < 1 else 0

    def kl_weight_at(self, step: Tensor) -> Tensor:
        # A vector is an input of a compiled step, where two numbers would be written into its code.
        start, steps = torch.tensor([self.kl_weight, self.kl_warmup], dtype=torch.float64, device=step.device).unbind()
        return start + (1 - start) * (step / steps).clamp(max=1)

    @property
    def signs(self) -> tuple[float, ...]:
        return (1.0, -1.0) if self.antithetic else (1.0,)

    def combined(self, draws: Sequence[Sequence[Terms]], share: float) -> dict[str, Tensor]:
        weight = 1.0 / (self.pairs * len(self.signs))
        total: dict[str, Tensor] = {}
        for terms in (terms for group in draws for terms in group):
            for name, term in terms.items():
                value = term.value * (weight if term.scaled else weight * share)
                total[name] = total[name] + value if name in total else value
        return total


def elbo_terms(
    model: PlatedModel, guide: Guide, params: dict[str, Tensor], noise: Noise, batch: Batch, kl: KL
) -> Terms:
    """Every site's term at one draw of z, in the order of the model's trace; guide-only sites (auxiliary) follow.

    Of discrete latents outside the data plate it is the expectation over their joint states.
    """
    if not guide.states:
        return _terms(model, guide.draw(model, params, noise, batch, kl))
    total: Terms = {}
    for values in joint_states(guide.states):
        with AtState(values):
            draw = guide.draw(model, params, noise, batch, kl)
        share = torch.stack([-draw.entropy[site.name] for site in guide.states]).sum().exp()
        for name, term in _terms(model, draw).items():
            value = share * term.value
            before = total[name].value if name in total else 0.0
            total[name] = Term(term.kind, term.scaled, before + value)
    return total


def _terms(model: PlatedModel, draw: Draw) -> Terms:
    terms: Terms = {}
    for name, site in draw.trace.nodes.items():
        if site["type"] != "sample" or isinstance(site["fn"], _Subsample) or is_deterministic(site):
            continue
        in_plate = inside(site, model.plate)
        if site["is_observed"]:
            rows = partial(log_prob_by_row, site, model.plate) if in_plate else None
            terms[name] = Term("likelihood" if in_plate else "kl_global", in_plate, total_log_prob(site), rows)
        elif name in draw.entropy:
            value = draw.log_prior[name] + draw.entropy[name]
            terms[name] = Term("kl_local" if in_plate else "kl_global", in_plate, value)
    for name in [name for name in draw.entropy if name not in terms]:  # in order: every rank lists them alike
        local = name in draw.local
        terms[name] = Term("kl_local" if local else "kl_global", local, torch.as_tensor(draw.entropy[name]).double())
    return terms
