"""A Gaussian for hierarchies, in unconstrained space: a few top-level latents vary with everything, those of a group
among themselves.

Given the top the groups of a hierarchy are independent, so that the precision of its posterior is an arrow, and so is a
root of its covariance. Tan and Nott, "Gaussian variational approximation with sparse precision matrices", Statistics
and Computing 28 (2018).

Shapes: D latents, T of them at the top; J groups of L numbers.
"""

import math
from collections.abc import Sequence

import torch

from trainer.errors import UserError, meant
from trainer.inference.guides.full_rank import FullRank
from trainer.inference.guides.pattern import Pattern
from trainer.inference.model.latents import LatentSite
from trainer.inference.model.plates import Batch, PlatedModel

_FEW = 32  # latents of a site that stands at the top unless it is said
_MOST_TOP = 256
_MOST_OF_GROUP = 64


class Arrow(FullRank):
    """``top``: the sites at the top; None: those of up to 32 latents. The others stand in groups by their longest
    dimension, those of as many groups in the same ones.
    """

    kind = "arrow"

    def __init__(self, model: PlatedModel, batch: Batch, init_scale: float = 0.1, top: Sequence[str] | None = None):
        self.given = None if top is None else tuple(top)
        super().__init__(model, batch, init_scale)

    def arrange(self, model: PlatedModel, batch: Batch) -> None:
        names = [site.name for site in self.sites]
        for name in self.given or ():
            if name not in names:
                told = meant(name, names, f"its latents are {', '.join(names)}")
                raise UserError(f'guide.top names "{name}", which is no latent of the model ({told}): leave it out.')
        top = [s for s in self.sites if (s.size <= _FEW if self.given is None else s.name in self.given)]
        size = sum(site.size for site in top)
        if size > _MOST_TOP:
            raise UserError(
                f"guide=arrow has {size:,} latents at the top and holds up to {_MOST_TOP} there: name fewer sites in "
                "guide.top."
            )
        groups: dict[int, list[torch.Tensor]] = {}
        for site in self.sites:
            if site not in top:
                members = _by_group(site)
                groups.setdefault(len(members), []).append(members)
        joined = [torch.cat(each, dim=1) for each in groups.values()]
        for members in joined:
            if members.shape[1] > _MOST_OF_GROUP:
                raise UserError(
                    f"guide=arrow has groups of {members.shape[1]} latents and holds up to {_MOST_OF_GROUP} in one: "
                    "take guide=mean_field."
                )
        head = [torch.arange(site.start, site.start + site.size) for site in top]
        order = torch.cat([*(members.reshape(-1) for members in joined), *head])
        self.pattern = Pattern(tuple((len(m), m.shape[1]) for m in joined), size, order.to(self.device))
        self.alone = self.with_own_prior(model, batch)
        groups_told = [f"{len(members):,} groups of {members.shape[1]}" for members in joined]
        self.kind = f"arrow ({', '.join([f'{size} with all', *groups_told])})"


def _by_group(site: LatentSite) -> torch.Tensor:
    """int64 [J, L]: the numbers of a site's latents by its longest dimension."""
    numbers = torch.arange(site.start, site.start + site.size).view(site.shape)
    if not site.shape:
        return numbers.view(1, 1)
    longest = max(range(len(site.shape)), key=lambda dim: site.shape[dim])
    return numbers.movedim(longest, 0).reshape(site.shape[longest], math.prod(site.shape) // site.shape[longest])
