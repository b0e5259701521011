"""A Gaussian whose sites are held in ways of their own, in unconstrained space.

Shapes: D latents.
"""

from collections.abc import Mapping

import torch

from trainer.errors import UserError, meant
from trainer.inference.guides.full_rank import FullRank
from trainer.inference.guides.mean_field import MeanField
from trainer.inference.guides.pattern import Pattern
from trainer.inference.model.latents import LatentSite
from trainer.inference.model.plates import Batch, PlatedModel

WAYS = ("mean_field", "block", "full_rank")
"""Independent latents; any covariance within the site; any covariance among all sites that have this way."""


class BySite(FullRank):
    """``sites``: the way of a site by its name; ``others``: that of those without one."""

    kind = "by site"

    def __init__(
        self,
        model: PlatedModel,
        batch: Batch,
        init_scale: float = 0.1,
        sites: Mapping[str, str] | None = None,
        others: str = "mean_field",
    ):
        self.ways, self.others = dict(sites or {}), others
        super().__init__(model, batch, init_scale)

    def arrange(self, model: PlatedModel, batch: Batch) -> None:
        names = [site.name for site in self.sites]
        for name in self.ways:
            if name not in names:
                told = meant(name, names, f"its latents are {', '.join(names)}")
                raise UserError(f'guide.sites names "{name}", which is no latent of the model ({told}): leave it out.')
        by_way: dict[str, list[LatentSite]] = {way: [] for way in WAYS}
        for site in self.sites:
            way = self.ways.get(site.name, self.others)
            if way not in by_way:
                raise UserError(
                    f'guide.sites has {way} for "{site.name}", which cannot be mixed: give {", ".join(WAYS[:-1])} or '
                    f"{WAYS[-1]}."
                )
            by_way[way].append(site)
        single, within, joint = by_way.values()
        order = torch.cat([torch.arange(s.start, s.start + s.size) for s in (*single, *within, *joint)])
        blocks = [(sum(s.size for s in single), 1), *((1, s.size) for s in within), (1, sum(s.size for s in joint))]
        used = tuple(block for block in blocks if block[0] * block[1])
        self.pattern = Pattern(used, order=order.to(self.device))
        MeanField.arrange(self, model, batch)
        together = {site.name for site in joint} - self.with_own_prior(model, batch)
        self.alone = self.alone - together if len(joint) > 1 else self.alone
        self.kind = "by site: " + ", ".join(f"{s.name} {way}" for way, held in by_way.items() for s in held)
        self.refuse_many("by_site")
