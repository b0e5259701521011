"""A guide as a Gaussian over the unconstrained latents: its sites, and where its numbers lie in theta.

The start, the steps, the stop rule and the reports know this view, never a guide's class.

Shapes: P parameters, D latents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.inference.model.latents import LatentSite, by_site, latent_name


@dataclass(frozen=True)
class Diagonal:
    """The covariance of independent latents."""

    log_sd: slice
    """Where the log sds [D] lie in theta."""

    def marginal_sd(self, theta: Tensor) -> Tensor:
        """[D] from theta [P]."""
        return theta[self.log_sd].exp()


@dataclass(frozen=True)
class GaussianView:
    """u ~ Normal(location, covariance), over D latents."""

    sites: tuple[LatentSite, ...]
    loc: slice
    """Where the locations [D] lie in theta."""
    covariance: Diagonal

    @property
    def size(self) -> int:
        """D."""
        return sum(site.size for site in self.sites)

    @property
    def parameters(self) -> int:
        """How many of the P parameters are the Gaussian's."""
        return 2 * self.size

    def location(self, theta: Tensor) -> Tensor:
        """[D] from theta [P]."""
        return theta[self.loc]

    def sd(self, theta: Tensor) -> Tensor:
        """The marginal sds [D] from theta [P]."""
        return self.covariance.marginal_sd(theta)

    def by_log_sd(self, values: Tensor, theta: Tensor) -> Tensor:
        """``values`` [D] where the log sds lie in theta, zeros elsewhere [P]."""
        place = self.covariance.log_sd
        return torch.cat([theta.new_zeros(place.start), values, theta.new_zeros(len(theta) - place.stop)])

    def theta(self, loc: Tensor, log_sd: Tensor) -> Tensor:
        """theta [P] where nothing else is learned, from both [D]."""
        return torch.cat([loc, log_sd])

    def by_site(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of a vector [D], each in its site's unconstrained shape."""
        return by_site(self.sites, flat)

    def latent_name(self, index: int) -> str:
        """Where scalar ``index`` of D stands, as `beta[3]`."""
        return latent_name(self.sites, index)
