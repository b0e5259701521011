"""summary.csv: every scalar latent with its moments and quantiles, and the guide's own numbers.

Where a site's map from u to z works element by element, quantiles are the exact images of the guide's, and moments are
exact (identity, exp, and these shifted and scaled) or by the trapezoid rule, which converges exponentially on a
Gaussian weight and stays sharp where Gauss-Hermite nodes miss a steep sigmoid. Simplexes, ordered vectors and Cholesky
factors are summarized from draws of u where latents are independent under the guide; where not, and for supports that
depend on another latent and guides that are not Gaussian, from draws of the whole model.

Shapes: u and z of a site, or [draws, ...] of them.
"""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import biject_to, transforms
from torch.special import ndtri

from trainer.data.store import atomic_write
from trainer.inference.model.latents import LatentSite, Site
from trainer.inference.model.noise import element_noise, mixed_seed
from trainer.inference.model.plates import Batch
from trainer.inference.step import Inference
from trainer.posterior.draws import draw, latent_draws, latents_of

_QUANTILES = (0.05, 0.5, 0.95)
_NODES = torch.linspace(-9, 9, 181, dtype=torch.float64, device="cpu")  # whatever the default is at import
_STREAM = 0x5077  # this file's noise is nobody else's
_DRAWS = 4_000
_FEWEST_DRAWS = 200
_MOST_NUMBERS = 20_000_000  # draws x elements that are held at once


class SiteSummary(NamedTuple):
    """One site's columns; ``loc`` and ``scale``: the guide's, in the unconstrained space, None where there are none."""

    name: str
    shape: tuple[int, ...]
    mean: np.ndarray
    sd: np.ndarray
    quantiles: np.ndarray
    """[3, ...] at 5, 50 and 95 %."""
    loc: np.ndarray | None
    scale: np.ndarray | None


def summarize(inference: Inference, theta: Tensor, batch: Batch, seed: int = 0) -> list[SiteSummary]:
    """A summary of every latent outside the data plate, in the order of the model; ``batch``: any rows of the data.

    A site without ``loc`` is followed by ``SITE@unconstrained`` where the guide is Gaussian; ``scale`` is the marginal
    sd.
    """
    view = inference.gaussian
    if view is None:
        return _from_model(inference, theta, batch, seed, None)
    theta = theta.detach()
    loc, scale = view.by_site(view.location(theta.double())), view.by_site(view.sd(theta.double()))
    few = [_latents(inference, theta, batch, seed, pair, sign) for pair in (0, 1) for sign in (1.0, -1.0)]
    summaries: dict[str, SiteSummary] = {}
    moving = []
    for site in view.sites:
        q = loc[site.name], scale[site.name]
        maps = [biject_to(nodes[site.name]["fn"].support) for nodes in few]
        if any(not torch.equal(maps[0](q[0]), each(q[0])) for each in maps[1:]):
            moving.append(site.name)
        elif _base(maps[0]).domain.event_dim or _base(maps[0]).codomain.event_dim:
            if view.covariance.independent:
                summaries[site.name] = _from_u(site, maps[0], *q, seed)
            else:
                moving.append(site.name)
        else:
            summaries[site.name] = _exact(site, _base(maps[0]), *q)
    summaries.update({each.name: each for each in _from_model(inference, theta, batch, seed, moving)})
    result = []
    for site in view.sites:
        result.append(summaries[site.name])
        if summaries[site.name].loc is None:
            own = LatentSite(f"{site.name}@unconstrained", site.shape, site.start)
            result.append(_exact(own, transforms.identity_transform, loc[site.name], scale[site.name]))
    return result


def write_summary(path: Path, summaries: list[SiteSummary]) -> None:
    """summary.csv: site, index, mean, sd, q05, q50, q95, loc, scale; row-major, floats that read back exactly."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["site", "index", "mean", "sd", "q05", "q50", "q95", "loc", "scale"])
    for site in summaries:
        size = math.prod(site.shape)
        blank = [""] * size
        columns = [site.mean.ravel().tolist(), site.sd.ravel().tolist(), *site.quantiles.reshape(3, -1).tolist()]
        columns += [blank if c is None else c.ravel().tolist() for c in (site.loc, site.scale)]
        indices = (",".join(map(str, index)) for index in np.ndindex(*site.shape))
        writer.writerows(zip([site.name] * size, indices, *columns, strict=True))
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def _latents(inference: Inference, theta: Tensor, batch: Batch, seed: int, pair: int, sign: float) -> dict[str, Site]:
    """One draw of every latent outside the data plate, as nodes of the model's trace."""
    drawn = draw(inference, theta, batch, mixed_seed(seed, _STREAM, 0), pair, sign)
    return latents_of(drawn, inference.model.plate)


def _from_model(
    inference: Inference, theta: Tensor, batch: Batch, seed: int, names: list[str] | None
) -> list[SiteSummary]:
    """Sites (all of them for None) from antithetic draws of the whole model."""
    if names == []:
        return []
    first = {name: node["value"] for name, node in _latents(inference, theta, batch, seed, 0, 1.0).items()}
    names = list(first) if names is None else names
    if not names:
        return []
    held = sum(first[name].numel() for name in names)
    still = inference.guide.still and not inference.guide.curved
    # Noise is not held, but it takes its time.
    pairs = 1 if still else _pairs(max(held, inference.guide.noise_size[0] // 5))
    draws = latent_draws(inference, theta, batch, mixed_seed(seed, _STREAM, 0), range(pairs), (1.0, -1.0))
    return [_of_draws(name, draws.pop(name)) for name in names]


def _from_u(site: LatentSite, transform: transforms.Transform, loc: Tensor, scale: Tensor, seed: int) -> SiteSummary:
    """Of z = transform(u), u ~ Normal(loc, scale), from antithetic draws."""
    count = torch.arange(_pairs(site.size), device=loc.device)
    when = torch.tensor(1 + site.start, device=loc.device)
    eps = element_noise(mixed_seed(seed, _STREAM, 1), when, count, site.size, loc.dtype).view(-1, *site.shape)
    return _of_draws(site.name, transform(loc + scale * torch.cat([eps, -eps])))


def _pairs(numbers: int) -> int:
    """Antithetic pairs of a draw of so many ``numbers``: as many as memory and patience allow."""
    return max(_FEWEST_DRAWS, min(_DRAWS, _MOST_NUMBERS // max(numbers, 1))) // 2


def _of_draws(name: str, z: Tensor) -> SiteSummary:
    z = z.double()
    quantiles = torch.stack([z.kthvalue(max(1, round(level * len(z))), dim=0).values for level in _QUANTILES])
    mean, sd, q = (t.cpu().numpy() for t in (z.mean(0), z.std(0), quantiles))
    return SiteSummary(name, tuple(z.shape[1:]), mean, sd, q, None, None)


def _base(transform: transforms.Transform) -> Any:
    """A transform without the event dimensions that only group its elements."""
    while isinstance(transform, transforms.IndependentTransform):
        transform = transform.base_transform
    return transform


def _exact(site: LatentSite, transform: transforms.Transform, loc: Tensor, scale: Tensor) -> SiteSummary:
    """Of z = transform(u), u ~ Normal(loc, scale), element by element, in float64."""
    levels = ndtri(torch.tensor(_QUANTILES, dtype=torch.float64, device=loc.device)).view(-1, *(1,) * loc.dim())
    quantiles = transform(loc + scale * levels).sort(dim=0).values  # a falling map turns them round
    columns = (*_moments(transform, loc, scale), quantiles, loc, scale)
    return SiteSummary(site.name, site.shape, *(column.cpu().numpy() for column in columns))


def _moments(transform: transforms.Transform, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sd of transform(u)."""
    if isinstance(transform, transforms.ComposeTransform):
        if not transform.parts:
            return loc, scale
        *inner, last = map(_base, transform.parts)
        if isinstance(last, transforms.AffineTransform):
            mean, sd = _moments(transforms.ComposeTransform(inner), loc, scale)
            shift, factor = last.loc, last.scale  # type: Any, Any
            return shift + factor * mean, abs(factor) * sd
        if not inner:
            return _moments(last, loc, scale)
    if isinstance(transform, transforms.ExpTransform):
        mean = (loc + scale**2 / 2).exp()
        return mean, mean * torch.expm1(scale**2).sqrt()
    weights = torch.softmax(-0.5 * _NODES**2, 0).tolist()
    middle = transform(loc)
    first, second = torch.zeros_like(loc), torch.zeros_like(loc)
    for node, weight in zip(_NODES.tolist(), weights):  # one by one: a site may hold many elements
        off = transform(loc + scale * node) - middle
        first, second = first + weight * off, second + weight * off**2
    return middle + first, (second - first**2).clamp(min=0).sqrt()


def between_seeds(summaries: Sequence[list[SiteSummary]]) -> dict[str, np.ndarray]:
    """sqrt(1 + B / W) of every latent: B the variance of its mean between fits, W the mean of its variance within them.

    1 where all seeds found the same; Gelman and Rubin (1992) with the fits in place of chains.
    """
    found = {}
    for every in zip(*summaries):
        within = np.mean([site.sd**2 for site in every], axis=0)
        between = np.var([site.mean for site in every], axis=0, ddof=1)
        found[every[0].name] = np.sqrt(1 + between / np.maximum(within, np.finfo(float).tiny))
    return found
