"""A Gaussian of any covariance over all latents outside the data plate, in unconstrained space.

Kucukelbir, Tran, Ranganath, Gelman and Blei, "Automatic differentiation variational inference", JMLR 18 (2017),
section 2.4.

Shapes: D latents.
"""

from collections.abc import Mapping

import torch
from pyro import poutine
from torch import Tensor

from trainer.errors import UserError
from trainer.inference.guides.gaussian import GaussianView
from trainer.inference.guides.mean_field import Drawn, MeanField, normal_prior
from trainer.inference.guides.pattern import Pattern
from trainer.inference.guides.triangular import Triangular, marginal_sd, spread, standardized
from trainer.inference.model.latents import FromUnconstrained
from trainer.inference.model.plates import Batch, PlatedModel

MOST_LATENTS = 1000


class FullRank(MeanField):
    """u = loc + N (d * eps): the root of a covariance that a `Pattern` describes, here of one group of all."""

    kind = "full rank"

    def arrange(self, model: PlatedModel, batch: Batch) -> None:
        self.pattern = Pattern(((1, self.size),))
        self.alone = self.with_own_prior(model, batch)
        self.refuse_many("full_rank")

    def refuse_many(self, name: str) -> None:
        """Raises UserError for more latents than there can be a matrix of."""
        if self.size > MOST_LATENTS:
            raise UserError(
                f"guide={name} holds up to {MOST_LATENTS:,} latents outside the data plate and the model has "
                f"{self.size:,}: take guide=mean_field."
            )

    def with_own_prior(self, model: PlatedModel, batch: Batch) -> frozenset[str]:
        """Sites whose Normal prior depends on no other, so that their E log p takes the marginal sds alone."""
        with torch.enable_grad():
            at = torch.zeros(self.size, dtype=self.dtype, device=self.device, requires_grad=True)
            with FromUnconstrained(self.by_site(at)):
                nodes = poutine.trace(model).get_trace(batch).nodes
        priors = {site.name: normal_prior(nodes[site.name])[0] for site in self.sites}
        return frozenset(n for n, p in priors.items() if p and not (p.loc.requires_grad or p.scale.requires_grad))

    def init(self) -> dict[str, Tensor]:
        """Independent latents at 0, of ``init_scale``: {..., "guide.off": what N has above its diagonal}."""
        made = super().init()
        return {**made, "guide.off": made["guide.loc"].new_zeros(self.pattern.off_size)}

    def gaussian(self, places: Mapping[str, slice]) -> GaussianView:
        covariance = Triangular(places["guide.log_scale"], places["guide.off"], self.pattern, MOST_LATENTS)
        return GaussianView(self.sites, places["guide.loc"], covariance)

    def drawn(self, params: dict[str, Tensor], normals: Tensor) -> Drawn:
        loc, log_scale, off = (params[f"guide.{name}"] for name in ("loc", "log_scale", "off"))
        scale = log_scale.exp()
        u = loc + spread(self.pattern, scale, off, normals)
        at, locs, log_scales = map(self.by_site, (u, loc, log_scale))
        sds, squares = lambda: marginal_sd(self.pattern, scale, off), lambda: normals**2
        return Drawn(at, locs, log_scales, lambda: self.by_site(squares()), lambda: self.by_site(sds()))

    def squares(self, params: dict[str, Tensor], u: dict[str, Tensor]) -> dict[str, Tensor]:
        loc, log_scale, off = (params[f"guide.{name}"].detach() for name in ("loc", "log_scale", "off"))
        flat = torch.cat([u[site.name].reshape(-1) for site in self.sites])
        return self.by_site(standardized(self.pattern, log_scale.exp(), off, flat - loc) ** 2)
