"""The posterior in the formats of others: ArviZ's InferenceData, and a Gaussian guide as safetensors with JSON.

Shapes: R draws.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.shards.index import Index
from trainer.data.store import atomic_write
from trainer.errors import UserError
from trainer.posterior.posterior import Posterior


def to_inference_data(posterior: Posterior, num_draws: int = 1000, seed: int = 0) -> Any:
    """`arviz.InferenceData` (0.x) or `xarray.DataTree` (1.x): one chain of independent draws.

    A dimension as long as the vocabulary of one text column, or as one stacked column has parts, takes its names.
    Raises UserError where ArviZ is not installed.
    """
    try:
        import arviz
    except ModuleNotFoundError:
        raise UserError("ArviZ is not installed: pip install 'svi-trainer[export]'.") from None
    draws = posterior.sample(num_draws, seed)
    coords: dict[str, list[Any]] = {}
    dims = {name: _dims(name, values.shape[1:], posterior.index, coords) for name, values in draws.items()}
    chains = {name: values[None] for name, values in draws.items()}
    if int(arviz.__version__.partition(".")[0]) >= 1:
        return arviz.from_dict({"posterior": chains}, coords=coords, dims=dims)
    return arviz.from_dict(posterior=chains, coords=coords, dims=dims)


def _dims(name: str, shape: tuple[int, ...], index: Index, coords: dict[str, list[Any]]) -> list[str]:
    """The names of a site's dimensions; new ones are added to ``coords``."""
    named: dict[int, list[tuple[str, list[Any]]]] = {}
    for column in index.columns:
        parts = index.meta.get("columns", {}).get(column.name)
        if column.vocabulary:
            named.setdefault(len(column.vocabulary), []).append((column.name, column.vocabulary))
        elif isinstance(parts, list):
            named.setdefault(len(parts), []).append((f"{column.name}_part", parts))
    dims = []
    for axis, size in enumerate(shape):
        known = named.get(size, [])
        dim, labels = known[0] if len(known) == 1 else (f"{name}_dim_{axis}", list(range(size)))
        if dim in dims:  # a square matrix: each axis a name of its own
            dim = f"{dim}_{axis}"
        coords[dim] = list(labels)
        dims.append(dim)
    return dims


def save_guide(posterior: Posterior, path: Path) -> None:
    """``path`` (.safetensors): SITE.loc and SITE.scale (marginal sds) of a Gaussian guide, in unconstrained space,
    float32 or 64; where latents are not independent a root of their covariance too, in the order of the sites; beside
    it a .json with the sites' shapes, the parameters outside the guide, the columns and the metrics.

    Raises UserError for another guide, and where safetensors is not installed.
    """
    try:
        from safetensors.numpy import save
    except ModuleNotFoundError:
        raise UserError("safetensors is not installed: pip install 'svi-trainer[export]'.") from None
    inference, view = posterior.inference, posterior.inference.gaussian
    if view is None:
        raise UserError("only a Gaussian guide is exported as safetensors: use Posterior.save for others.")
    theta = posterior.theta.detach().cpu()
    tensors: dict[str, np.ndarray] = {}
    locations, sds = view.by_site(view.location(theta)), view.by_site(view.sd(theta))
    for site in view.sites:
        tensors[f"{site.name}.loc"] = locations[site.name].numpy()
        tensors[f"{site.name}.scale"] = sds[site.name].numpy()
    if not view.covariance.independent:
        tensors["root"] = view.root(theta).numpy()
    own = inference.parameters.constrain(inference.parameters.unflatten(theta))
    tensors |= {name: value.numpy() for name, value in own.items() if not name.startswith("guide.")}
    facts = {
        "family": "z = biject_to(support)(u), u ~ Normal(loc, "
        + ("scale), independent" if view.covariance.independent else "root root')"),
        "sites": {site.name: list(site.shape) for site in view.sites},
        "columns": {column.name: column.vocabulary for column in posterior.index.columns if column.vocabulary},
        "meta": posterior.index.meta,
        "metrics": posterior.metrics,
    }
    with atomic_write(path) as file:
        file.write(save({name: np.array(value, order="C") for name, value in tensors.items()}))
    with atomic_write(path.with_suffix(".json")) as file:
        file.write(json.dumps(facts, indent=1).encode())
