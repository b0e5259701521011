"""What a model does with a column: calculate with its values, or look something up by them."""

from typing import Any

import torch
from pyro import poutine

from trainer.inference.checks.observed import column_of
from trainer.inference.model.latents import AtZero
from trainer.inference.model.plates import Batch
from trainer.inference.step import Inference


def calculates_with(inference: Inference, theta: torch.Tensor, batch: Batch, name: str) -> bool:
    """Whether the model takes the integer column ``name`` as floats too: what only looks up by it refuses them."""
    floats = batch._replace(columns={**batch.columns, name: batch.columns[name].to(batch.dtype)})
    found: list[poutine.Trace] = []

    def run(_values: dict[str, torch.Tensor]) -> None:
        with AtZero(batch.dtype, batch.valid.device):
            found.append(poutine.trace(inference.model).get_trace(floats))

    parameters = inference.parameters
    try:
        with torch.no_grad():
            parameters.call(parameters.unflatten(theta), run)
    except Exception:  # whatever the user's model raises
        return False
    observed: list[Any] = [site for site in found[0].nodes.values() if site["type"] == "sample" and site["is_observed"]]
    column = {name: floats.columns[name]}
    labels = [site["fn"] for site in observed if column_of(site["value"], column)]
    return not any(isinstance(_base(fn), torch.distributions.Categorical) for fn in labels)


def _base(fn: Any) -> Any:
    """The distribution below masks, scales and independent dimensions."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn
