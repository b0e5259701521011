"""Latent sites: where they live in the flat unconstrained vector, and the log densities of a trace's sites.

z = biject_to(support)(u). Shapes: D unconstrained scalars in all.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to, constraints

from trainer.errors import UserError, first_line
from trainer.inference.model.plates import Batch, inside

Site = Any
"""A node of a Pyro trace, or a message on its way there."""


@dataclass(frozen=True)
class LatentSite:
    name: str
    shape: tuple[int, ...]
    """Unconstrained shape."""
    start: int
    """Where the site begins in the flat vector of D."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def latent_name(sites: Iterable[LatentSite], index: int) -> str:
    """Where scalar ``index`` of the flat vector stands, as `beta[3]`."""
    site = next(each for each in sites if each.start <= index < each.start + each.size)
    if not site.shape:
        return site.name
    place = torch.unravel_index(torch.tensor(index - site.start), site.shape)
    return f"{site.name}[{', '.join(str(int(i)) for i in place)}]"


def by_site(sites: Iterable[LatentSite], flat: Tensor) -> dict[str, Tensor]:
    """The parts of a vector [D], each in its site's unconstrained shape."""
    sites = tuple(sites)
    parts = flat.split([site.size for site in sites])
    return {site.name: part.view(site.shape) for site, part in zip(sites, parts, strict=True)}


class AtZero(Messenger):
    """Sets every latent to the image of u = 0, so that no prior is sampled (improper ones cannot be); lists them."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.sites: list[LatentSite] = []
        self.end = 0

    def _pyro_sample(self, msg: Message[..., Any]) -> None:
        fn: Any = msg["fn"]
        if not is_latent(msg) or msg["done"] or is_discrete(fn):
            return
        transform = biject_to(fn.support)
        site = LatentSite(str(msg["name"]), tuple(transform.inverse_shape(fn.shape())), self.end)
        self.sites.append(site)
        self.end += site.size
        msg["value"], msg["done"] = transform(self.place(msg, site.shape)), True

    def place(self, msg: Message[..., Any], shape: tuple[int, ...]) -> Tensor:
        """u of a site."""
        return torch.zeros(shape, **self.options)


def is_latent(site: Site) -> bool:
    """Whether a message or trace node is a latent sample site (a plate's index site is not)."""
    return site["type"] == "sample" and not site["is_observed"] and not isinstance(site["fn"], _Subsample)


def has_latents(model: Callable[[Batch], Any], batch: Batch) -> bool:
    """Whether a model has anything for a guide to hold."""
    with AtZero(batch.dtype, batch.valid.device):
        return any(is_latent(site) for site in poutine.trace(model).get_trace(batch).nodes.values())


def is_discrete(fn: Any) -> bool:
    """Whether a distribution has no continuous support."""
    return bool(getattr(fn, "has_enumerate_support", False) or getattr(fn.support, "is_discrete", False))


def is_deterministic(site: Site) -> bool:
    """Whether a trace node has no density: a `pyro.deterministic` statement, or what a reparameterization leaves."""
    if site["infer"].get("_deterministic"):
        return True
    fn = site["fn"]
    masked = isinstance(fn, dist.MaskedDistribution) and fn._mask is False
    return bool(site["is_observed"]) and masked and isinstance(fn.base_dist, dist.Delta)


def refuse_latent(site: Site, plate: str, can_be_local: bool) -> None:
    """Raises UserError for a latent that no guide, or not this one, can hold."""
    name = str(site["name"])
    if is_discrete(site["fn"]):
        raise UserError(
            f'latent site "{name}" is discrete, which a reparameterized gradient cannot pass: sum it out '
            "(dist.MixtureSameFamily, or torch.logsumexp of the branches in a pyro.factor)."
        )
    for frame in site["cond_indep_stack"]:
        if frame.name != plate and frame.full_size != frame.size:
            raise UserError(
                f'latent site "{name}" stands in plate "{frame.name}", which takes {frame.size} of its '
                f"{frame.full_size} members at random: drop subsample_size=, only the data plate is subsampled."
            )
    if not can_be_local and inside(site, plate):
        if name.endswith("_unobserved"):
            raise UserError(
                f'obs_mask= at site "{name.removesuffix("_unobserved")}" makes a latent of every missing row: '
                "use poutine.mask around the observed site instead."
            )
        raise UserError(
            f'latent site "{name}" stands inside plate "{plate}", one value per row, which this guide cannot hold: '
            "integrate it out, or give an amortized guide with guide._target_=module.guide."
        )


class FromUnconstrained(Messenger):
    """Gives every latent site its value from ``u`` by site, through its support's bijection at that moment."""

    def __init__(self, u: dict[str, Tensor]):
        super().__init__()
        self.u = u
        self.jacobian: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Message[..., Any]) -> None:
        name = str(msg["name"])
        if name not in self.u or msg["is_observed"]:
            return
        u, fn = self.u[name], cast(Any, msg["fn"])
        transform = biject_to(fn.support)
        value = transform(u)
        if not isinstance(fn.support, type(constraints.real)):
            jacobian = transform.log_abs_det_jacobian(u, value)
            self.jacobian[name] = jacobian.reshape(*fn.batch_shape, -1).sum(-1)
        msg["value"], msg["done"] = value, True

    def log_prior(self, site: Site) -> Tensor:
        """log p(z) + log |dz/du|, scaled and masked."""
        density = log_prob(site)
        return total(site, density + self.jacobian[site["name"]] if site["name"] in self.jacobian else density)


def log_prob(site: Site) -> Tensor:
    """log p of a site's value [batch shape], before scale and mask."""
    first, *other = _as_taken(site["fn"], site["value"])

    def density(value: Any) -> Tensor:
        found: Tensor = site["fn"].log_prob(value, *site["args"], **site["kwargs"])
        return found

    try:
        try:
            return density(first)
        except (RuntimeError, IndexError, TypeError):
            if not other:
                raise
        return density(other[0])
    except ValueError as error:  # a value outside the support, found by validation at the start
        raise UserError(f'site "{site["name"]}" has no density at its value: {first_line(error)}') from error


def _as_taken(fn: Any, value: Any) -> list[Any]:
    """``value`` as a distribution takes it: whole numbers and truth values as floats, unless it indexes with them.

    A class of the user's may do either, so it has a second choice.
    """
    if not isinstance(value, Tensor) or value.is_floating_point():
        return [value]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    floats = value.to(torch.get_default_dtype())
    if isinstance(fn, torch.distributions.Categorical):
        return [value]
    known = type(fn).__module__.startswith(("torch.distributions.", "pyro.distributions."))
    return [floats, value] if known else [value, floats]


def total(site: Site, values: Tensor) -> Tensor:
    """Sum of ``values`` [batch shape] under the site's scale and mask, float64 []."""
    values, scale = masked(values, site["mask"]), site["scale"]
    if isinstance(scale, Tensor) and scale.dim() > 0:
        return (values * scale).sum(dtype=torch.float64)
    summed: Tensor = values.sum(dtype=torch.float64) * scale
    return summed


def masked(values: Tensor, mask: Any) -> Tensor:
    """``values`` [batch shape], 0 where a site's ``mask`` is False."""
    if mask is None or mask is True:
        return values
    return torch.where(torch.as_tensor(mask, device=values.device), values, values.new_zeros(()))


def by_row(values: Tensor, site: Site, plate: str) -> Tensor:
    """``values`` [batch shape] of a site inside ``plate``, summed for each row: [B]."""
    (frame,) = [each for each in site["cond_indep_stack"] if each.name == plate]
    if values.dim() < -frame.dim or values.shape[frame.dim] != frame.size:  # the same for every row
        shape = [1] * (-frame.dim - values.dim()) + list(values.shape)
        shape[frame.dim] = frame.size
        values = values.expand(shape)
    others = [dim for dim in range(-values.dim(), 0) if dim != frame.dim]
    summed: Tensor = values.sum(others) if others else values
    return summed


def log_prob_by_row(site: Site, plate: str) -> Tensor:
    """Each row's scaled and masked log p of a site inside ``plate``, float64 [B], whose sum is `total_log_prob`."""
    return by_row(masked(log_prob(site).double(), site["mask"]) * site["scale"], site, plate)


def total_log_prob(site: Site) -> Tensor:
    """Scaled and masked log p of a site, float64 [] (summed in float64: float32 spacing at 1e9 nats is 64)."""
    return total(site, log_prob(site))
