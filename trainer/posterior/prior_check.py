"""Whether the posterior lies where the priors allow it: a prior on the wrong scale is seen in its own units."""

import pyro
import torch
from pyro import poutine

from trainer.inference.guides.mean_field import Noise, normal_prior
from trainer.inference.model.latents import is_latent
from trainer.inference.model.plates import Batch
from trainer.inference.step import Inference

_FAR = 5.0  # prior sds


def far_from_prior(inference: Inference, theta: torch.Tensor, rows: Batch) -> list[str]:
    """A sentence for each site whose posterior mean lies more than 5 sds of its Normal prior from that prior's mean.

    Among many groups the furthest of n is expected at about sqrt(2 log n), which is below 5 for n < 250,000.
    """
    guide, view = inference.guide, inference.gaussian
    if view is None:
        return []
    elements, per_row = guide.noise_size
    noise = Noise(theta.new_zeros(elements), theta.new_zeros(int(rows.valid), per_row) if per_row else None, 0)
    values = inference.parameters.unflatten(theta)
    found = []
    with torch.no_grad(), pyro.validation_enabled(False):

        def nodes(params: dict[str, torch.Tensor]) -> poutine.Trace:
            return guide.draw(inference.model, params, noise, rows, "analytic").trace

        trace = inference.parameters.call(values, nodes)
        locations = view.by_site(view.location(theta))
        for name, site in trace.nodes.items():
            prior, _ = normal_prior(site) if is_latent(site) and name in locations else (None, 0)
            if prior is None:
                continue
            far = ((locations[name] - prior.loc) / prior.scale).abs().max()
            if far > _FAR:
                found.append(
                    f'"{name}" lies {float(far):,.0f} prior sds from the mean of its prior: that prior is on another '
                    "scale than the data; widen it, or rescale the columns."
                )
    return found
