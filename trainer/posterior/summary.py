"""summary.csv: every scalar latent with its moments and quantiles, and the guide's own numbers.

Where a site's map from u to z works element by element, quantiles are the exact images of the guide's, and moments are
exact (identity, exp) or by Gauss-Hermite quadrature; other sites (simplexes, Cholesky factors, supports that depend on
another latent, guides other than the mean-field one) are summarised from draws.
"""

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.distributions import biject_to, transforms
from torch.special import ndtri

from trainer.data.store import atomic_write
from trainer.svi.guides import MeanField, Noise
from trainer.svi.latents import LatentSite, is_latent
from trainer.svi.noise import element_noise, mixed_seed, row_noise
from trainer.svi.plates import Batch, inside
from trainer.svi.step import Inference

_QUANTILES = (0.05, 0.5, 0.95)
_NODES = 64
_DRAWS = 4_000
_MOST_NUMBERS = 20_000_000  # draws x elements of a site that are held at once


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


def summarise(inference: Inference, theta: Tensor, batch: Batch, seed: int = 0) -> list[SiteSummary]:
    """A summary of every latent outside the data plate, in the order of the model; ``batch``: any rows of the data."""
    guide = inference.guide
    values = inference.parameters.unflatten(theta.detach())
    traces = [_latents(inference, theta, batch, seed, pair, sign) for pair in (0, 1) for sign in (1.0, -1.0)]
    names = list(traces[0])
    if not isinstance(guide, MeanField):
        return list(_from_draws(inference, theta, batch, seed, names))
    loc, scale = (values[name].double() for name in ("guide.loc", "guide.log_scale"))
    scale = scale.exp()
    summaries = {}
    for site in guide.sites:
        span = slice(site.start, site.start + site.size)
        q = loc[span].view(site.shape), scale[span].view(site.shape)
        transform = _elementwise(site, [trace[site.name][1] for trace in traces], q)
        if transform is not None:
            summaries[site.name] = _exact(site, transform, *q)
    drawn = _from_draws(inference, theta, batch, seed, [name for name in names if name not in summaries])
    summaries.update({summary.name: summary for summary in drawn})
    result = []
    for site in guide.sites:
        span = slice(site.start, site.start + site.size)
        summary = summaries[site.name]
        numbers = loc[span].view(site.shape).cpu().numpy(), scale[span].view(site.shape).cpu().numpy()
        if summary.loc is None:
            mean, sd, quantiles = _normal_columns(*numbers)
            name = f"{site.name}@unconstrained"
            result += [summary, SiteSummary(name, site.shape, mean, sd, quantiles, *numbers)]
        else:
            result.append(summary)
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


def _latents(
    inference: Inference, theta: Tensor, batch: Batch, seed: int, pair: int, sign: float
) -> dict[str, tuple[Tensor, transforms.Transform]]:
    """One draw of every latent outside the data plate, with the map to its support at that draw."""
    guide, device = inference.guide, theta.device
    elements, per_row = guide.noise_size
    when, draw = torch.tensor(0, device=device), torch.tensor([pair], device=device)
    own = mixed_seed(seed, 0x5077, 0)
    flat = sign * element_noise(own, when, draw, elements, theta.dtype)[0]
    rows = None
    if per_row:
        assert batch.row_id is not None
        rows = sign * row_noise(own, when, draw, batch.row_id[None], per_row, theta.dtype)[0]
    noise = Noise(flat, rows, mixed_seed(own, 0, 2 * pair + (sign < 0)))
    with torch.no_grad(), pyro.validation_enabled(False):
        drawn = inference.parameters.call(
            inference.parameters.unflatten(theta),
            lambda values: guide.draw(inference.model, values, noise, batch, "monte_carlo"),
        )
    return {
        name: (node["value"], biject_to(node["fn"].support))
        for name, node in drawn.trace.nodes.items()
        if is_latent(node) and not inside(node, inference.model.plate)
    }


def _elementwise(
    site: LatentSite, maps: list[transforms.Transform], q: tuple[Tensor, Tensor]
) -> transforms.Transform | None:
    """The map of a site if it works element by element and is the same at every draw, else None."""
    transform = maps[0]
    while isinstance(transform, transforms.IndependentTransform):
        transform = transform.base_transform
    if transform.domain.event_dim or transform.codomain.event_dim:
        return None
    images = [each(q[0].to(torch.get_default_dtype())) for each in maps]
    return transform if all(torch.equal(images[0], image) for image in images[1:]) else None


def _exact(site: LatentSite, transform: transforms.Transform, loc: Tensor, scale: Tensor) -> SiteSummary:
    """Of z = transform(u), u ~ Normal(loc, scale), element by element, in float64."""
    levels = ndtri(torch.tensor(_QUANTILES, dtype=torch.float64, device=loc.device)).view(-1, *(1,) * loc.dim())
    quantiles = transform(loc + scale * levels).sort(dim=0).values
    if isinstance(transform, transforms.ExpTransform):
        mean = (loc + scale**2 / 2).exp()
        sd = mean * torch.expm1(scale**2).sqrt()
    elif isinstance(transform, transforms.ComposeTransform) and not transform.parts:
        mean, sd = loc, scale
    else:
        nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
        shape = (-1, *(1,) * loc.dim())
        z = transform(loc + scale * torch.as_tensor(nodes, device=loc.device).view(shape))
        w = torch.as_tensor(weights / weights.sum(), device=loc.device).view(shape)
        mean = (w * z).sum(0)
        sd = (w * (z - mean) ** 2).sum(0).sqrt()
    m, s, q, at, by = (t.cpu().numpy() for t in (mean, sd, quantiles, loc, scale))
    return SiteSummary(site.name, site.shape, m, s, q, at, by)


def _from_draws(
    inference: Inference, theta: Tensor, batch: Batch, seed: int, names: list[str]
) -> Iterator[SiteSummary]:
    if not names:
        return
    first = _latents(inference, theta, batch, seed, 0, 1.0)
    largest = max(first[name][0].numel() for name in names)
    pairs = max(50, min(_DRAWS, _MOST_NUMBERS // largest) // 2)
    draws = [_latents(inference, theta, batch, seed, pair, sign) for pair in range(pairs) for sign in (1.0, -1.0)]
    levels = torch.tensor(_QUANTILES, dtype=torch.float64, device=theta.device)
    for name in names:
        z = torch.stack([draw[name][0] for draw in draws]).double()
        count, shape = z.shape[0], z.shape[1:]
        quantiles = torch.stack([z.kthvalue(max(1, round(float(level) * count)), dim=0).values for level in levels])
        mean, sd, q = (t.cpu().numpy() for t in (z.mean(0), z.std(0), quantiles))
        yield SiteSummary(name, tuple(shape), mean, sd, q, None, None)


def _normal_columns(loc: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, sd and quantiles of u itself."""
    levels = ndtri(torch.tensor(_QUANTILES, dtype=torch.float64)).numpy().reshape(-1, *(1,) * loc.ndim)
    return loc, scale, loc + scale * levels
