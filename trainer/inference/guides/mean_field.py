"""Guides: what q(z) is, how it is drawn from given noise, and what it adds to the ELBO.

`draw(model, params, noise, batch, kl) -> Draw` gives the model's trace at z ~ q, with the entropy terms of q by site;
`gaussian` is all that others know of a Gaussian guide. `MeanField` stands here, Pyro's autoguides and users' own in
`pyro_guides`, Laplace's approximation in `laplace`.

Mean-field Gaussian in unconstrained space: Kucukelbir, Tran, Ranganath, Gelman and Blei, "Automatic differentiation
variational inference", JMLR 18 (2017), eq. 6. Sticking the landing: Roeder, Wu and Duvenaud (NeurIPS 2017).

Shapes: D unconstrained global latents; B rows; noise.elements [E], noise.rows [B, n].
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import transforms

from trainer.errors import UserError
from trainer.inference.guides.gaussian import Diagonal, GaussianView
from trainer.inference.model.latents import AtZero, FromUnconstrained, LatentSite, Site, by_site, refuse_latent, total
from trainer.inference.model.noise_mode import NoiseMode, measure_noise
from trainer.inference.model.plates import Batch, PlatedModel

KL = Literal["analytic", "monte_carlo", "sticking_the_landing"]
LOG_2PI = math.log(2 * math.pi)
MEAN_FIELD = "mean-field"


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

    kind: str
    """Its name for reports, with what a reader has to know of the result."""

    still: bool
    """Whether nothing is drawn: its ELBO is a number, without noise."""
    curved: int
    """How many parameters, from the first, the result needs the curvature by: `ended` takes it; 0: none."""

    @property
    def states(self) -> tuple[Any, ...]:
        """Discrete latents outside the data plate (`trainer.inference.guides.discrete.StateSite`), of which every joint
        state is evaluated.
        """
        ...

    @property
    def log_q_of_a_draw(self) -> Callable[[Batch], Tensor] | None:
        """log q [] of a draw from torch's own generator, as a function of the parameters alone; None where draws are
        smooth functions of their noise, so that nobody needs it.
        """
        ...

    @property
    def callables(self) -> tuple[Any, ...]:
        """Callables of the user's, whose modules are trained."""
        ...

    def gaussian(self, places: Mapping[str, slice]) -> GaussianView | None:
        """The guide as a Gaussian whose parameters lie at ``places`` in theta; None: it is none, or not yet."""
        ...

    def setup(self, model: PlatedModel, batch: Batch) -> dict[str, Tensor]:
        """The guide's own parameters at their start, once it knows the model. Raises UserError if it cannot hold it."""
        ...

    def draw(self, model: PlatedModel, params: dict[str, Tensor], noise: Noise, batch: Batch, kl: KL) -> Draw: ...

    def ended(self, hessian: Tensor) -> dict[str, Tensor]:
        """The parameters of the result that training leaves open, by the ``hessian`` [curved, curved] of minus the ELBO
        over all rows.
        """
        ...


class Drawn(NamedTuple):
    """A draw by site, each in its unconstrained shape."""

    u: dict[str, Tensor]
    locs: dict[str, Tensor]
    log_scales: dict[str, Tensor]
    """Their sum is log |det| of the map from the normals to u."""
    squares: Callable[[], dict[str, Tensor]]
    """Their sum is the quadratic form of log q."""
    sds: Callable[[], dict[str, Tensor]]
    """The marginal ones."""


class MeanField:
    """u = loc + scale * eps, z = biject_to(support)(u), factorized over the D scalars; starts at u = 0.

    Supports may depend on other latents: the transform is taken from the site as the model reaches it.
    """

    kind: str = MEAN_FIELD
    callables, states, curved, still, log_q_of_a_draw = (), (), 0, False, None

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
        self.size = self.normals = sum(site.size for site in self.sites)
        """D, and how many normals they take."""
        at = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        with FromUnconstrained(self.by_site(at)):
            self.models = measure_noise(lambda rows: poutine.trace(model).get_trace(rows), batch)
        self.arrange(model, batch)
        self.noise_size = (self.normals + self.models.elements, self.models.per_row)

    def arrange(self, model: PlatedModel, batch: Batch) -> None:
        """What a family learns of the model besides its sites."""
        self.alone = frozenset(site.name for site in self.sites)
        """Sites independent of what their priors depend on: with that at a draw, E log p of a Normal prior is exact."""

    def setup(self, model: PlatedModel, batch: Batch) -> dict[str, Tensor]:
        return self.init()

    def ended(self, hessian: Tensor) -> dict[str, Tensor]:
        return {}

    def gaussian(self, places: Mapping[str, slice]) -> GaussianView | None:
        return GaussianView(self.sites, places["guide.loc"], Diagonal(places["guide.log_scale"]))

    def init(self) -> dict[str, Tensor]:
        """{"guide.loc": zeros [D], "guide.log_scale": log(init_scale) [D]}."""
        loc = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        return {"guide.loc": loc, "guide.log_scale": torch.full_like(loc, math.log(self.init_scale))}

    def draw(self, model: PlatedModel, params: dict[str, Tensor], noise: Noise, batch: Batch, kl: KL) -> Draw:
        u, locs, log_scales, squares_of, scales_of = self.drawn(params, noise.elements[: self.normals])
        # A mode is a detour for every operation, so only a model that draws gets one.
        own = NoiseMode(self.models, noise.elements[self.normals :], noise.rows, noise.seed)
        with FromUnconstrained(u) as latents, nullcontext() if self.models.empty else own:
            trace = poutine.trace(model).get_trace(batch)
        entropy, log_prior = {}, {}
        known = kl == "analytic"
        landing = kl == "sticking_the_landing"
        squares = {} if known else self.squares(params, u) if landing else squares_of()
        scales = scales_of() if known else {}
        for name in u:
            node = trace.nodes[name]
            if kl == "analytic":
                entropy_each = log_scales[name] + 0.5 * (1 + LOG_2PI)
            elif kl == "monte_carlo":
                entropy_each = 0.5 * squares[name] + log_scales[name] + 0.5 * LOG_2PI
            else:  # only the path through z carries a gradient
                entropy_each = 0.5 * squares[name] + log_scales[name].detach() + 0.5 * LOG_2PI
            entropy[name] = entropy_each.sum(dtype=torch.float64)
            by_itself = known and name in self.alone
            exact = expected_normal_log_prob(node, (locs[name], scales[name])) if by_itself else None
            log_prior[name] = total(node, exact) if exact is not None else latents.log_prior(node)
        return Draw(trace, entropy, log_prior, frozenset())

    def drawn(self, params: dict[str, Tensor], normals: Tensor) -> "Drawn":
        # Everything is split into sites once: the gradient of a slice is a vector of zeros around it, for each slice.
        locs, log_scales, eps = map(self.by_site, (params["guide.loc"], params["guide.log_scale"], normals))
        scales = {name: each.exp() for name, each in log_scales.items()}
        u = {name: locs[name] + scales[name] * eps[name] for name in locs}
        return Drawn(u, locs, log_scales, lambda: {name: each**2 for name, each in eps.items()}, lambda: scales)

    def squares(self, params: dict[str, Tensor], u: dict[str, Tensor]) -> dict[str, Tensor]:
        """The quadratic form of log q at ``u`` by site, with a gradient through ``u`` alone."""
        locs, log_scales = (self.by_site(params[name].detach()) for name in ("guide.loc", "guide.log_scale"))
        return {name: ((u[name] - locs[name]) * (-log_scales[name]).exp()) ** 2 for name in u}

    def by_site(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of a vector [D], each in its site's unconstrained shape."""
        return by_site(self.sites, flat)


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


def expected_normal_log_prob(site: Site, q: tuple[Tensor, Tensor]) -> Tensor | None:
    """E_q log p(u) [batch shape] where the prior of u is Normal too (LogNormal qualifies, in log space); else None."""
    fn, event_dims = normal_prior(site)
    if fn is None:
        return None
    loc, scale = q
    each = -0.5 * (((loc - fn.loc) ** 2 + scale**2) / fn.scale**2) - fn.scale.log() - 0.5 * LOG_2PI
    return each.sum(tuple(range(-event_dims, 0))) if event_dims else each
