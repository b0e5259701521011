"""A Gaussian of a diagonal and a few factors, in unconstrained space: Sigma = diag(s^2) + F F'.

Ong, Nott and Smith, "Gaussian variational approximation with a factor covariance structure", JCGS 27 (2018). The
nearest one to a precision H: for given s the factors are the eigenvectors of S H S of the smallest eigenvalues
lambda < 1, F = S V sqrt(1 / lambda - 1), as in the profile likelihood of factor analysis (Joreskog 1967), and what is
left to lower by log s has the gradient H_ii s_i^2 - 1 + sum over k of (1 - lambda_k) V_ik^2.

Shapes: D latents, R factors; P parameters; E = D + R normals.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.inference.guides.full_rank import FullRank
from trainer.inference.guides.gaussian import GaussianView
from trainer.inference.guides.mean_field import Drawn
from trainer.inference.model.noise import element_noise
from trainer.inference.model.plates import Batch, PlatedModel

_MOST = 256  # latents of which a curvature is taken
_PAIRS, _PAIR_ROWS = 64, 2**18  # of a mean curvature
_FIRST = 0.1  # of the factors beside the sds, which zeros would leave where they are
_ITERATIONS = 200
_RANK, _MOST_RANK = 5, 32


@dataclass(frozen=True)
class Factors:
    """The covariance of a diagonal and factors."""

    log_sd: slice
    """Where log s [D] lies in theta."""
    factors: slice
    """Where F [D, R] lies, right behind."""
    independent = False
    most = _MOST

    @property
    def latents(self) -> int:
        size: int = self.log_sd.stop - self.log_sd.start
        return size

    @property
    def parameters(self) -> int:
        size: int = self.factors.stop - self.log_sd.start
        return size

    @property
    def rank(self) -> int:
        """R."""
        return self.parameters // self.latents - 1

    @property
    def normals(self) -> int:
        return self.latents + self.rank

    def pairs(self, rows: int) -> int:
        return min(_PAIRS, _PAIR_ROWS // rows)

    def marginal_sd(self, theta: Tensor) -> Tensor:
        scale, factors = self._numbers(theta)
        return (scale**2 + factors.square().sum(1)).sqrt()

    def inverse_sd(self, theta: Tensor) -> Tensor:
        return 1.0 / self.marginal_sd(theta)

    def spread(self, theta: Tensor, normals: Tensor) -> Tensor:
        scale, factors = self._numbers(theta)
        return scale * normals[..., : self.latents] + normals[..., self.latents :] @ factors.mT

    def of_independent(self, log_sd: Tensor) -> Tensor:
        return torch.cat([log_sd, log_sd.new_zeros(self.latents * self.rank)])

    def best(self, precision: Tensor) -> Tensor | None:
        if torch.linalg.cholesky_ex(precision)[1]:
            return None
        log_scale, factors = nearest(precision.detach(), self.rank)
        return torch.cat([log_scale, factors.reshape(-1)])

    def step(self, theta: Tensor, gradient: Tensor, factor: Tensor) -> Tensor:
        """To the nearest for the curvature, the factors turned to be as near to those there are as they can be."""
        step = torch.zeros_like(theta, dtype=torch.float64)
        inverse = torch.linalg.inv(factor.double())
        found = self.best(inverse.mT @ inverse)
        if found is not None:
            log_scale, factors = found[: self.latents], found[self.latents :].view(-1, self.rank)
            left, _, right = torch.linalg.svd(factors.mT @ self._numbers(theta)[1].double())
            turned = factors @ left @ right
            step[self.log_sd.start : self.factors.stop] = torch.cat([log_scale, turned.reshape(-1)])
            step[self.log_sd.start : self.factors.stop] -= theta[self.log_sd.start : self.factors.stop]
        return step

    def change(self, theta: Tensor, step: Tensor) -> Tensor:
        return (self.marginal_sd(theta + step) / self.marginal_sd(theta)).log().abs()

    def distance(self, theta: Tensor, loc: Tensor) -> Tensor:
        return (loc / self.marginal_sd(theta)).abs()

    def control(self, curvature: Tensor, theta: Tensor) -> Tensor:
        return curvature

    def by_chance(self, control: Tensor, theta: Tensor, elements: Tensor, share: float) -> Tensor:
        """By z the gradient of z'Hz / 2 is H z: by log s and F times the normals, less the mean."""
        scale, factors = self._numbers(theta)
        eps = elements[..., : self.normals].flatten(0, -2)
        slope = self.spread(theta, eps) @ control
        by_log = scale * (slope * eps[:, : self.latents]).mean(0) - scale**2 * control.diagonal()
        by_factors = slope.mT @ eps[:, self.latents :] / len(eps) - control @ factors
        return share * len(elements) * torch.cat([by_log, by_factors.reshape(-1)])

    def chance(self, control: Tensor, theta: Tensor, elements: Tensor) -> Tensor:
        scale, factors = self._numbers(theta)
        z, slope = self.spread(theta, elements[..., : self.normals]), control.to(theta.dtype)
        mean = (scale**2 * slope.diagonal()).sum() + (slope @ factors * factors).sum()
        return 0.5 * ((z @ slope * z).sum(-1) - mean)

    def units(self, factor: Tensor, theta: Tensor) -> Tensor | None:
        """Those of F_ik: 1 / sqrt(R H_ii)."""
        each = (self.rank * torch.linalg.inv(factor).square().sum(0)).rsqrt()
        return torch.cat([torch.ones_like(each), each[:, None].expand(-1, self.rank).reshape(-1)])

    def _numbers(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """s [D] and F [D, R]."""
        return theta[self.log_sd].exp(), theta[self.factors].view(self.latents, -1)


def nearest(precision: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(log s [D], F [D, R]) nearest to a Gaussian of this positive definite ``precision`` [D, D], by L-BFGS."""
    diagonal = precision.diagonal()
    log_scale = (-0.5 * diagonal.log()).clone().requires_grad_()

    def factors_at(scale: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(scale[:, None] * precision * scale)
        return values[:rank].clamp(min=1e-300, max=1.0), vectors[:, :rank]

    optimizer = torch.optim.LBFGS(
        [log_scale], max_iter=_ITERATIONS, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=0.0
    )

    def closure() -> float:
        scale = log_scale.detach().exp()
        values, vectors = factors_at(scale)
        own = diagonal * scale**2
        log_scale.grad = own - 1.0 + ((1.0 - values) * vectors**2).sum(1)
        return float(0.5 * own.sum() - log_scale.detach().sum() + 0.5 * (1.0 - values + values.log()).sum())

    optimizer.step(closure)
    scale = log_scale.detach().exp()
    values, vectors = factors_at(scale)
    return log_scale.detach(), scale[:, None] * vectors * (1.0 / values - 1.0).sqrt()


class LowRank(FullRank):
    """u = loc + s * eps + F eps', of ``rank`` factors; None: of five, or of as many as there are latents."""

    kind = "low rank"

    def __init__(self, model: PlatedModel, batch: Batch, init_scale: float = 0.1, rank: int | None = None):
        self.asked = rank
        super().__init__(model, batch, init_scale)

    def arrange(self, model: PlatedModel, batch: Batch) -> None:
        self.rank = min(_RANK, self.size) if self.asked is None else self.asked
        most = min(_MOST_RANK, self.size)
        if not 1 <= self.rank <= most:
            raise UserError(
                f"guide.rank={self.rank} must lie between 1 and {most}, since the model has {self.size:,} latents "
                f"outside the data plate and a guide up to {_MOST_RANK} factors: give one in between."
            )
        self.alone, self.normals = self.with_own_prior(model, batch), self.size + self.rank
        self.kind = f"low rank ({self.rank} of {self.size})"

    def init(self) -> dict[str, Tensor]:
        """Independent latents at 0, of ``init_scale``, but for small factors, the same in every run."""
        zero = torch.zeros((), dtype=torch.int64, device=self.device)
        eps = element_noise(0, zero, torch.arange(self.rank, device=self.device), self.size, self.dtype).mT
        made = super(FullRank, self).init()
        return {**made, "guide.factors": _FIRST * self.init_scale / math.sqrt(self.rank) * eps.contiguous()}

    def gaussian(self, places: Mapping[str, slice]) -> GaussianView:
        covariance = Factors(places["guide.log_scale"], places["guide.factors"])
        return GaussianView(self.sites, places["guide.loc"], covariance)

    def drawn(self, params: dict[str, Tensor], normals: Tensor) -> Drawn:
        loc, log_scale, factors = (params[f"guide.{name}"] for name in ("loc", "log_scale", "factors"))
        scale = log_scale.exp()
        z = scale * normals[: self.size] + factors @ normals[self.size :]
        inside = _root(scale, factors).diagonal().log().sum()  # log det(1 + F' S^-2 F) / 2
        at, locs, logs = map(self.by_site, (loc + z, loc, log_scale + inside / self.size))
        sds, squares = lambda: (scale**2 + factors.square().sum(1)).sqrt(), lambda: _squares(scale, factors, z)
        return Drawn(at, locs, logs, lambda: self.by_site(squares()), lambda: self.by_site(sds()))

    def squares(self, params: dict[str, Tensor], u: dict[str, Tensor]) -> dict[str, Tensor]:
        loc, log_scale, factors = (params[f"guide.{name}"].detach() for name in ("loc", "log_scale", "factors"))
        flat = torch.cat([u[site.name].reshape(-1) for site in self.sites])
        return self.by_site(_squares(log_scale.exp(), factors, flat - loc))


def _root(scale: Tensor, factors: Tensor) -> Tensor:
    """The lower Cholesky factor [R, R] of 1 + F' S^-2 F, column by column: a compiled step has no operation for it."""
    inner = factors / scale[:, None]
    rest, columns = torch.eye(inner.shape[1], dtype=inner.dtype, device=inner.device) + inner.mT @ inner, []
    for k in range(len(rest)):
        column = rest[:, k] / rest[k, k].sqrt()
        columns.append(column)
        rest = rest - column[:, None] * column
    return torch.stack(columns, dim=1).tril()


def _solved(lower: Tensor, v: Tensor) -> Tensor:
    """x [R] with L L' x = ``v`` [R], by substitution."""
    found: list[Tensor] = []
    for k in range(len(lower)):
        found.append((v[k] - sum((lower[k, j] * found[j] for j in range(k)), v.new_zeros(()))) / lower[k, k])
    back: dict[int, Tensor] = {}
    for k in reversed(range(len(lower))):
        later = sum((lower[j, k] * back[j] for j in range(k + 1, len(lower))), v.new_zeros(()))
        back[k] = (found[k] - later) / lower[k, k]
    return torch.stack([back[k] for k in range(len(lower))])


def _squares(scale: Tensor, factors: Tensor, z: Tensor) -> Tensor:
    """[D], of the sum z' Sigma^-1 z (Woodbury 1950)."""
    inner, w = factors / scale[:, None], z / scale
    return w * (w - inner @ _solved(_root(scale, factors), inner.mT @ w))
