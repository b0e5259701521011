"""A guide as a Gaussian over the unconstrained latents: its sites, and where its numbers lie in theta.

The start, the steps, the stop rule and the reports know this view, never a guide's class.

Shapes: P parameters, D latents, C numbers of the covariance, E >= D normals of a draw.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainer.inference.model.latents import LatentSite, by_site, latent_name

_PAIRS, _PAIR_ROWS = 8, 2**15  # of a mean curvature; none for many rows, whose posterior is narrow


class Covariance(Protocol):
    """How the latents vary under the guide, by numbers that lie side by side in theta."""

    @property
    def log_sd(self) -> slice:
        """Where D of the numbers lie, the first ones: the log of what scales each latent's own normal."""
        ...

    @property
    def parameters(self) -> int:
        """C."""
        ...

    @property
    def normals(self) -> int:
        """E: how many a draw takes."""
        ...

    @property
    def independent(self) -> bool:
        """Whether the latents are independent."""
        ...

    @property
    def most(self) -> int:
        """With how many latents the curvature is taken as a matrix at the most."""
        ...

    def pairs(self, rows: int) -> int:
        """How many antithetic pairs give a mean curvature over so many ``rows``."""
        ...

    def marginal_sd(self, theta: Tensor) -> Tensor:
        """[D] from theta [P]."""
        ...

    def inverse_sd(self, theta: Tensor) -> Tensor:
        """1 / `marginal_sd`."""
        ...

    def spread(self, theta: Tensor, normals: Tensor) -> Tensor:
        """u less its location [..., D], from normals [..., E]."""
        ...

    def of_independent(self, log_sd: Tensor) -> Tensor:
        """Its numbers [C] where the latents are independent, of these log sds [D]."""
        ...

    def best(self, precision: Tensor) -> Tensor | None:
        """Its numbers [C] nearest to a Gaussian of this ``precision`` [D, D]; None where that has no covariance."""
        ...

    def step(self, theta: Tensor, gradient: Tensor, factor: Tensor) -> Tensor:
        """The Newton step [P], float64, of its numbers, by the ``gradient`` [P] of minus the ELBO (nats) and a
        ``factor`` [D, D] of the inverse of the mean curvature.
        """
        ...

    def change(self, theta: Tensor, step: Tensor) -> Tensor:
        """By how much a ``step`` [P] changes the log sds [D], at least 0."""
        ...

    def distance(self, theta: Tensor, loc: Tensor) -> Tensor:
        """A step ``loc`` [D] of the locations in scales [D], at least 0."""
        ...

    def control(self, curvature: Tensor, theta: Tensor) -> Tensor:
        """What `by_chance` and `chance` take of the ``curvature`` H [D, D] of a loss z'Hz / 2: a matrix [D, D]."""
        ...

    def by_chance(self, control: Tensor, theta: Tensor, elements: Tensor, share: float) -> Tensor:
        """What the draws ``elements`` [A, R, E] add to the gradient [C] of a quadratic loss by its numbers by chance,
        in nats: of mean 0 for any ``control``. ``share``: of a lane group.

        Miller, Foti, D'Amour and Adams, "Reducing reparameterization gradient variance" (NeurIPS 2017), section 3.
        """
        ...

    def chance(self, control: Tensor, theta: Tensor, elements: Tensor) -> Tensor:
        """What draws [..., E] and their antitheses add to a quadratic loss by chance, in nats [...]."""
        ...

    def units(self, factor: Tensor, theta: Tensor) -> Tensor | None:
        """What a step of 1 is of each of the P - D parameters behind the locations, by a ``factor`` of the inverse
        curvature; None: 1.
        """
        ...


@dataclass(frozen=True)
class Diagonal:
    """The covariance of independent latents."""

    log_sd: slice
    """Where the log sds [D] lie in theta."""
    independent = True
    most = 256

    @property
    def parameters(self) -> int:
        size: int = self.log_sd.stop - self.log_sd.start
        return size

    @property
    def normals(self) -> int:
        return self.parameters

    def pairs(self, rows: int) -> int:
        return min(_PAIRS, _PAIR_ROWS // rows)

    def marginal_sd(self, theta: Tensor) -> Tensor:
        return theta[self.log_sd].exp()

    def inverse_sd(self, theta: Tensor) -> Tensor:
        return (-theta[self.log_sd]).exp()

    def spread(self, theta: Tensor, normals: Tensor) -> Tensor:
        return self.marginal_sd(theta) * normals

    def of_independent(self, log_sd: Tensor) -> Tensor:
        return log_sd

    def best(self, precision: Tensor) -> Tensor | None:
        return precision.diagonal().rsqrt().log()

    def step(self, theta: Tensor, gradient: Tensor, factor: Tensor) -> Tensor:
        """By log s the gradient is s^2 h - 1 with h the mean curvature under the guide, which s = 1 / sqrt(h) makes
        zero.
        """
        step = torch.zeros_like(theta, dtype=torch.float64)
        step[self.log_sd] = -0.5 * gradient[self.log_sd].double().clamp(min=-0.9).log1p()
        return step

    def change(self, theta: Tensor, step: Tensor) -> Tensor:
        return step[self.log_sd].abs()

    def distance(self, theta: Tensor, loc: Tensor) -> Tensor:
        return (loc / self.marginal_sd(theta)).abs()

    def control(self, curvature: Tensor, theta: Tensor) -> Tensor:
        return curvature

    def by_chance(self, control: Tensor, theta: Tensor, elements: Tensor, share: float) -> Tensor:
        """With f(z) = z'Hz / 2 the gradient by log s is s eps (H s eps), of mean s^2 diag H: the difference takes
        nearly all noise from the gradient of the log scales where f is nearly quadratic. (An antithetic pair has taken
        it from that of the locations.) A scale enters with at most 1 / sqrt(H_ii): far from where H was taken it does
        not add more noise than it would take there.
        """
        scale = _bounded(self.marginal_sd(theta), control)
        z = scale * elements[..., : len(scale)].flatten(0, -2)
        chance = (z * (z @ control)).mean(0) - scale**2 * control.diagonal()
        return share * len(elements) * chance

    def chance(self, control: Tensor, theta: Tensor, elements: Tensor) -> Tensor:
        """(z'Hz - its mean) / 2."""
        sd = self.marginal_sd(theta)
        scale = _bounded(sd, control)
        z, curvature = scale * elements[..., : len(scale)], control.to(sd.dtype)
        return 0.5 * ((z @ curvature * z).sum(-1) - (scale**2 * curvature.diagonal()).sum())

    def units(self, factor: Tensor, theta: Tensor) -> Tensor | None:
        return None


def _bounded(sd: Tensor, curvature: Tensor) -> Tensor:
    """``sd`` [D], none beyond what the curvature makes of it."""
    return torch.minimum(sd, curvature.diagonal().to(sd.dtype).clamp(min=1e-30).rsqrt())


@dataclass(frozen=True)
class GaussianView:
    """u ~ Normal(location, covariance), over D latents."""

    sites: tuple[LatentSite, ...]
    loc: slice
    """Where the locations [D] lie in theta."""
    covariance: Covariance

    @property
    def size(self) -> int:
        """D."""
        return sum(site.size for site in self.sites)

    @property
    def parameters(self) -> int:
        """How many of the P parameters are the Gaussian's."""
        return self.size + self.covariance.parameters

    def location(self, theta: Tensor) -> Tensor:
        """[D] from theta [P]."""
        return theta[self.loc]

    def sd(self, theta: Tensor) -> Tensor:
        """The marginal sds [D] from theta [P]."""
        return self.covariance.marginal_sd(theta)

    def root(self, theta: Tensor) -> Tensor:
        """[D, E]: what the normals are multiplied by; times its transpose, the covariance."""
        each = torch.eye(self.covariance.normals, dtype=theta.dtype, device=theta.device)
        return self.covariance.spread(theta, each).mT

    def by_covariance(self, values: Tensor, theta: Tensor) -> Tensor:
        """``values`` [C] where the covariance's numbers lie in theta, zeros elsewhere [P]."""
        start = self.covariance.log_sd.start
        behind = len(theta) - start - self.covariance.parameters
        return torch.cat([theta.new_zeros(start), values, theta.new_zeros(behind)])

    def theta(self, loc: Tensor, log_sd: Tensor) -> Tensor:
        """theta [P] where nothing else is learned, for independent latents, from both [D]."""
        return torch.cat([loc, self.covariance.of_independent(log_sd)])

    def nearest(self, loc: Tensor, precision: Tensor) -> Tensor:
        """theta [P] where nothing else is learned, nearest to a Gaussian at ``loc`` [D] of a ``precision`` [D, D]."""
        found = self.covariance.best(precision)
        return self.theta(loc, precision.diagonal().rsqrt().log()) if found is None else torch.cat([loc, found])

    def by_site(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of a vector [D], each in its site's unconstrained shape."""
        return by_site(self.sites, flat)

    @property
    def parts(self) -> Tensor:
        """bool [sites, D]: which latents are a site's."""
        return torch.stack([
            torch.zeros(self.size, dtype=torch.bool).index_fill(0, site.start + torch.arange(site.size), True)
            for site in self.sites
        ])  # fmt: skip

    def latent_name(self, index: int) -> str:
        """Where scalar ``index`` of D stands, as `beta[3]`."""
        return latent_name(self.sites, index)
