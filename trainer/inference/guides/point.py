"""A point for every latent outside the data plate: the maximum of the log joint in the latents' own space (MAP).

What `pyro.infer.autoguide.AutoDelta` is for, from u = 0, so that improper priors work. Shapes: D unconstrained scalars.
"""

from collections.abc import Mapping

import torch
from pyro import poutine
from torch import Tensor

from trainer.inference.guides.mean_field import KL, Draw, MeanField, Noise
from trainer.inference.model.latents import FromUnconstrained, total_log_prob
from trainer.inference.model.noise_mode import NoiseMode
from trainer.inference.model.plates import Batch, PlatedModel


class Point(MeanField):
    """z = biject_to(support)(loc), without spread; its entropy counts as 0."""

    kind = "point (points, no spread)"

    def __init__(self, model: PlatedModel, batch: Batch):
        super().__init__(model, batch)

    def arrange(self, model: PlatedModel, batch: Batch) -> None:
        self.normals, self.still = 0, self.models.empty

    def gaussian(self, places: Mapping[str, slice]) -> None:
        """It has no spread."""

    def init(self) -> dict[str, Tensor]:
        return {"guide.loc": super().init()["guide.loc"]}

    def draw(self, model: PlatedModel, params: dict[str, Tensor], noise: Noise, batch: Batch, kl: KL) -> Draw:
        own = NoiseMode(self.models, noise.elements, noise.rows, noise.seed)
        with FromUnconstrained(self.by_site(params["guide.loc"])), own:
            trace = poutine.trace(model).get_trace(batch)
        entropy = {site.name: params["guide.loc"].new_zeros((), dtype=torch.float64) for site in self.sites}
        return Draw(trace, entropy, {name: total_log_prob(trace.nodes[name]) for name in entropy}, frozenset())
