"""Guides: what q(z) is, how it is drawn from given noise, and what it adds to the ELBO.

A guide has one method beyond its parameters, `draw(model, params, noise, batch, kl) -> Draw`: the model's trace at
z ~ q, with the entropy terms of q by site. `MeanField` is ours; `PyroGuide` carries Pyro's autoguides and users' own.

Mean-field Gaussian in unconstrained space: Kucukelbir, Tran, Ranganath, Gelman and Blei, "Automatic differentiation
variational inference", JMLR 18 (2017), eq. 6. Sticking the landing: Roeder, Wu and Duvenaud (NeurIPS 2017).

Shapes: D unconstrained global latents; B rows; noise.elements [E], noise.rows [B, n].
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.distributions import transforms

from trainer.errors import UserError
from trainer.svi.latents import (
    AtZero,
    FromUnconstrained,
    LatentSite,
    Site,
    is_latent,
    refuse_latent,
    total,
    total_log_prob,
)
from trainer.svi.noise_mode import NoiseLayout, NoiseMode, measure_noise
from trainer.svi.plates import Batch, PlatedModel, inside

KL = Literal["analytic", "monte_carlo", "sticking_the_landing"]
LOG_2PI = math.log(2 * math.pi)


class Noise(NamedTuple):
    """The noise of one evaluation."""

    elements: Tensor
    """[E] standard normals for what stands outside the data plate."""
    rows: Tensor | None
    """[B, n] standard normals for what stands inside it."""
    seed: int
    """For draws that are no transformation of a normal (Gamma, Dirichlet), in an eager program."""


@dataclass(frozen=True)
class Draw:
    """One z ~ q: the model's trace, and by site the entropy of q (or -log q(z)) and log p where it is known exactly."""

    trace: poutine.Trace
    entropy: dict[str, Tensor]
    log_prior: dict[str, Tensor]
    """float64 [] E_q log p(u) (or log p(u) at the draw) per latent site, in nats, scaled and masked."""
    local: frozenset[str]
    """Sites of q inside the data plate."""


class Guide(Protocol):
    noise_size: tuple[int, int]
    """(E, n): normals an evaluation takes, without an axis over the rows and per row; the model's own among them."""

    def draw(self, model: PlatedModel, params: dict[str, Tensor], noise: Noise, batch: Batch, kl: KL) -> Draw: ...


class MeanField:
    """u = loc + scale * eps, z = biject_to(support)(u), factorised over the D scalars; starts at u = 0.

    Supports may depend on other latents: the transform is taken from the site as the model reaches it.
    """

    def __init__(self, model: PlatedModel, batch: Batch, init_scale: float = 0.1):
        if not init_scale > 0:
            raise UserError(f"guide.init_scale={init_scale} must be positive.")
        self.dtype, self.device = batch.dtype, batch.valid.device
        zero = AtZero(self.dtype, self.device)
        with zero:
            self.trace = poutine.trace(model).get_trace(batch)
        self.sites: tuple[LatentSite, ...] = tuple(zero.sites)
        if not self.sites:
            raise UserError("the model has no latent site for the guide to hold: add a pyro.sample without obs=.")
        for site in self.sites:
            refuse_latent(self.trace.nodes[site.name], model.plate, can_be_local=False)
        self.init_scale = init_scale
        self.size = sum(site.size for site in self.sites)
        with FromUnconstrained(self.by_site(torch.zeros(self.size, dtype=self.dtype, device=self.device))):
            self.models = measure_noise(lambda rows: poutine.trace(model).get_trace(rows), batch)
        self.noise_size = (self.size + self.models.elements, self.models.per_row)

    def init(self) -> dict[str, Tensor]:
        """{"guide.loc": zeros [D], "guide.log_scale": log(init_scale) [D]}."""
        loc = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        return {"guide.loc": loc, "guide.log_scale": torch.full_like(loc, math.log(self.init_scale))}

    def draw(self, model: PlatedModel, params: dict[str, Tensor], noise: Noise, batch: Batch, kl: KL) -> Draw:
        loc, log_scale = params["guide.loc"], params["guide.log_scale"]
        # Everything is split into sites once: the gradient of a slice is a vector of zeros around it, for each slice.
        locs, log_scales, normals = map(self.by_site, (loc, log_scale, noise.elements[: self.size]))
        scales = {name: each.exp() for name, each in log_scales.items()}
        u = {name: locs[name] + scales[name] * normals[name] for name in locs}
        # A mode is a detour for every operation, so only a model that draws gets one.
        own = NoiseMode(self.models, noise.elements[self.size :], noise.rows, noise.seed)
        with FromUnconstrained(u) as latents, nullcontext() if self.models.empty else own:
            trace = poutine.trace(model).get_trace(batch)
        entropy, log_prior = {}, {}
        for name in u:
            node = trace.nodes[name]
            if kl == "analytic":
                entropy_each = log_scales[name] + 0.5 * (1 + LOG_2PI)
            elif kl == "monte_carlo":
                entropy_each = 0.5 * normals[name] ** 2 + log_scales[name] + 0.5 * LOG_2PI
            else:  # only the path through z carries a gradient
                loc_, log_scale_ = locs[name].detach(), log_scales[name].detach()
                entropy_each = 0.5 * ((u[name] - loc_) * (-log_scale_).exp()) ** 2 + log_scale_ + 0.5 * LOG_2PI
            entropy[name] = entropy_each.sum(dtype=torch.float64)
            exact = _expected_normal_log_prob(node, (locs[name], scales[name])) if kl == "analytic" else None
            log_prior[name] = total(node, exact) if exact is not None else latents.log_prior(node)
        return Draw(trace, entropy, log_prior, frozenset())

    def latent_name(self, index: int) -> str:
        """Where scalar ``index`` of D stands, as `beta[3]`."""
        for site in self.sites:
            if index < site.size:
                place = torch.unravel_index(torch.tensor(index), site.shape) if site.shape else ()
                return site.name + (f"[{', '.join(str(int(i)) for i in place)}]" if place else "")
            index -= site.size
        raise IndexError(index)

    def by_site(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of a vector [D], each in its site's unconstrained shape."""
        parts = flat.split([site.size for site in self.sites])
        return {site.name: part.view(site.shape) for site, part in zip(self.sites, parts)}


def normal_prior(site: Site) -> tuple[torch.distributions.Normal | None, int]:
    """The Normal that a site's unconstrained value has as its prior, None for another; and its event dimensions."""
    fn, event_dims = site["fn"], 0
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)):
        if isinstance(fn, dist.MaskedDistribution):
            return None, 0
        if isinstance(fn, torch.distributions.Independent):
            event_dims += fn.reinterpreted_batch_ndims
        fn = fn.base_dist
    if isinstance(fn, torch.distributions.LogNormal) and isinstance(fn.transforms[-1], transforms.ExpTransform):
        fn = fn.base_dist
        while isinstance(fn, torch.distributions.Independent):
            fn = fn.base_dist
    return (fn, event_dims) if isinstance(fn, torch.distributions.Normal) else (None, 0)


def _expected_normal_log_prob(site: Site, q: tuple[Tensor, Tensor]) -> Tensor | None:
    """E_q log p(u) [batch shape] where the prior of u is Normal too (LogNormal qualifies, in log space); else None."""
    fn, event_dims = normal_prior(site)
    if fn is None:
        return None
    loc, scale = q
    each = -0.5 * (((loc - fn.loc) ** 2 + scale**2) / fn.scale**2) - fn.scale.log() - 0.5 * LOG_2PI
    return each.sum(tuple(range(-event_dims, 0))) if event_dims else each


class PyroGuide:
    """An autoguide of Pyro's, or the user's own guide: any callable of a batch with reparameterised sample sites.

    Its random numbers are replaced by the given noise (:class:`NoiseMode`), so that antithetic pairs, ranks and resumed
    runs work as with the mean-field guide.
    """

    def __init__(self, guide: Any, plate: str = "data"):
        self.guide, self.plate = guide, plate
        self.layout = NoiseLayout((), 0, 0, False)
        self.noise_size = (0, 0)

    def measure(self, model: PlatedModel, batch: Batch) -> None:
        """Runs guide and model to learn how many normals they take. Raises UserError for sites it cannot hold."""
        if isinstance(self.guide, AutoGuide):
            self._make_autoguide(batch)
        for site in poutine.trace(self.guide).get_trace(batch).nodes.values():
            if is_latent(site):
                refuse_latent(site, self.plate, can_be_local=True)
                if not site["fn"].has_rsample:
                    raise UserError(
                        f'the guide\'s site "{site["name"]}" ({type(site["fn"]).__name__}) has no reparameterised '
                        "gradient: use a distribution with rsample."
                    )
        self.layout = measure_noise(lambda rows: self._traces(model, rows), batch)
        self.noise_size = (self.layout.elements, self.layout.per_row)

    def _traces(self, model: PlatedModel, batch: Batch) -> tuple[poutine.Trace, poutine.Trace]:
        """The guide's, and the model's at its draw."""
        q = poutine.trace(self.guide).get_trace(batch)
        return q, poutine.trace(poutine.replay(model, trace=q)).get_trace(batch)

    def _make_autoguide(self, batch: Batch) -> None:
        """An autoguide makes its parameters in its first call, from a run of the model that it hides from handlers."""
        with pyro.settings.context(validate_poutine=False):
            self.guide(batch)
        for site in self.guide.prototype_trace.nodes.values():
            if is_latent(site):
                refuse_latent(site, self.plate, can_be_local=False)
        for kept in self.guide._pyro_context.param_state.values():
            kept.clear()  # the model's own `pyro.param`s of that run: `Parameters` holds the true ones

    def draw(self, model: PlatedModel, params: dict[str, Tensor], noise: Noise, batch: Batch, kl: KL) -> Draw:
        if kl == "sticking_the_landing":
            raise UserError(
                "objective.kl=sticking_the_landing needs guide=mean_field: use kl=monte_carlo with this guide."
            )
        with NoiseMode(self.layout, noise.elements, noise.rows, noise.seed):
            q, trace = self._traces(model, batch)
        entropy, log_prior = {}, {}
        for name, site in q.nodes.items():
            if is_latent(site):
                entropy[name] = -total_log_prob(site)
        for name, site in trace.nodes.items():
            if is_latent(site):
                if name not in q.nodes:
                    raise UserError(
                        f'latent site "{name}" of the model is missing from the guide: sample it there too.'
                    )
                if inside(site, self.plate) != inside(q.nodes[name], self.plate):
                    raise UserError(
                        f'site "{name}" stands inside plate "{self.plate}" in only one of model and guide: '
                        "declare the plate in both."
                    )
                log_prior[name] = total_log_prob(site)
        local = frozenset(name for name in entropy if inside(q.nodes[name], self.plate))
        return Draw(trace, entropy, log_prior, local)
