"""Laplace's approximation: the mode first, then a full normal by the curvature there, in unconstrained space.

What `pyro.infer.autoguide.AutoLaplaceApproximation` is for, here in one run: training sees a point, and its answer has
the inverse Hessian of minus the log joint over all rows as its covariance (Kass and Raftery 1995, section 4.1).

Shapes: D unconstrained scalars.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from trainer.errors import UserError
from trainer.inference.guides.mean_field import KL, LOG_2PI, Draw, Noise
from trainer.inference.guides.pyro_guides import only_models_that_it_holds
from trainer.inference.model.latents import AtZero, FromUnconstrained, by_site, latent_name, refuse_latent
from trainer.inference.model.noise_mode import NoiseMode, measure_noise
from trainer.inference.model.plates import Batch, PlatedModel

_FLAT = (
    1e-10,
    -1e-6,
)  # curvatures beside those along the latents: what is below the first is flat, below the second up
_PART = 0.3  # of the strongest latent's part in a direction, from which another is named
_MOST_NAMED = 3


class Laplace:
    """u = loc + L eps; a row of zeros in L is a point, whose entropy counts as 0. ``auto``: Pyro's guide, which starts
    it; None: at u = 0.
    """

    kind = "AutoLaplaceApproximation (normal by the curvature at the mode)"
    callables, states, log_q_of_a_draw = (), (), None

    def __init__(self, auto: Any = None):
        self.auto, self.curved, self.still = auto, 0, False

    def setup(self, model: PlatedModel, batch: Batch) -> dict[str, Tensor]:
        """{"guide.loc": where its init function says [D], "guide.factor": zeros [D, D]}."""
        zero = AtZero(batch.dtype, batch.valid.device)
        with zero:
            trace = poutine.trace(model).get_trace(batch)
        self.sites, self.size = tuple(zero.sites), zero.end
        self.curved = self.size
        for site in self.sites:
            refuse_latent(trace.nodes[site.name], model.plate, can_be_local=False)
        loc = self._begun(model, batch)
        with FromUnconstrained(self._by_site(loc)):
            self.models = measure_noise(lambda rows: poutine.trace(model).get_trace(rows), batch)
        self.still = self.models.empty  # while it trains
        self.noise_size = (self.size + self.models.elements, self.models.per_row)
        return {"guide.loc": loc.clone(), "guide.factor": loc.new_zeros(self.size, self.size)}

    def _begun(self, model: PlatedModel, batch: Batch) -> Tensor:
        """Where it starts [D]."""
        if self.auto is None:
            return torch.zeros(self.size, dtype=batch.dtype, device=batch.valid.device)
        with only_models_that_it_holds():
            self.auto._setup_prototype(**{name: batch.columns[name] for name in model.own})
        loc: Tensor = self.auto.loc.detach().to(batch.dtype)
        return loc

    def draw(self, model: PlatedModel, params: dict[str, Tensor], noise: Noise, batch: Batch, kl: KL) -> Draw:
        loc, factor, normals = params["guide.loc"], params["guide.factor"].detach(), noise.elements[: self.size]
        own = NoiseMode(self.models, noise.elements[self.size :], noise.rows, noise.seed)
        with FromUnconstrained(self._by_site(loc + factor @ normals)) as latents, own:
            trace = poutine.trace(model).get_trace(batch)
        width = factor.diagonal()
        point = width == 0
        each = torch.where(point, 1.0, width).log() + torch.where(point, 0.0, 0.5 * (normals**2 + LOG_2PI))
        entropy = {name: part.sum(dtype=torch.float64) for name, part in self._by_site(each).items()}
        log_prior = {name: latents.log_prior(trace.nodes[name]) for name in entropy}
        return Draw(trace, entropy, log_prior, frozenset())

    def gaussian(self, places: Mapping[str, slice]) -> None:
        """A point while it trains."""

    def ended(self, hessian: Tensor) -> dict[str, Tensor]:
        """The parameters that the ``hessian`` [D, D] of minus the log joint changes. Raises UserError where it has no
        inverse that is a covariance.
        """
        curvature = hessian.diagonal()
        scale = torch.where(curvature > 0, curvature, 1.0).rsqrt()
        scaled = scale[:, None] * hessian * scale
        if not torch.isfinite(scaled).all():
            raise UserError(
                "the curvature of the log joint is not finite at the end of training, so that Laplace's approximation "
                "has no covariance there: train longer (max_steps=), or take guide=mean_field."
            )
        values, vectors = torch.linalg.eigh(scaled)
        if values[0] < _FLAT[0]:
            raise UserError(self._without_covariance(float(values[0]), vectors[:, 0].abs()))
        covariance = scale[:, None] * torch.cholesky_inverse(torch.linalg.cholesky(scaled)) * scale
        return {"guide.factor": torch.linalg.cholesky(covariance)}

    def _without_covariance(self, value: float, along: Tensor) -> str:
        """The sentence for a direction of curvature ``value``, in which each latent has its part ``along`` [D]."""
        strong = [int(i) for i in along.argsort(descending=True) if along[i] > _PART * along.max()]
        named = " and ".join(f'"{latent_name(self.sites, i)}"' for i in strong[:_MOST_NAMED])
        more = f" (and {len(strong) - _MOST_NAMED} others)" if len(strong) > _MOST_NAMED else ""
        if value < _FLAT[1]:
            does, remedy = "curves up", "train longer (max_steps=), for this is no mode,"
        elif len(strong) > 1:
            does, remedy = "is flat", "give one of them a proper prior or a narrower one, leave one out,"
        else:
            does, remedy = "is flat", "give it a proper prior, leave it out,"
        return (
            f"the log joint {does} along {named}{more} at the end of training, so that Laplace's approximation has no "
            f"covariance there: {remedy} or take guide=mean_field."
        )

    def _by_site(self, flat: Tensor) -> dict[str, Tensor]:
        return by_site(self.sites, flat)


class LaplaceOfGlobals(Laplace):
    """The same as a family, from u = 0."""

    kind = "laplace (normal by the curvature at the mode)"

    def __init__(self, model: PlatedModel, batch: Batch):
        super().__init__()
