"""A covariance by its root: groups of latents that hang together among themselves, and a few with everything.

    u = loc + N (d * eps)        Sigma = N diag(d^2) N'        log det Sigma = 2 sum log d

N is unit upper triangular, d_j the sd of latent j given those behind it: the modified Cholesky factors of the precision
(Pourahmadi, Biometrika 86, 1999). With one group of all latents that is any covariance.

The best root for a Gaussian of precision H lowers tr(H U U') / 2 - sum log U_jj, U = N diag(d), a problem for each
column: U_j = H_j^-1 e_j / sqrt(e_j' H_j^-1 e_j), H_j the rows and columns of H where column j may be other than zero.
So the columns of a group are those of (chol H_group)^-T, and those of the few at the end the last ones of (chol H)^-T.

Shapes: D latents in their order: G groups of L each, for each block of groups, then T at the top; P parameters.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.inference.guides.pattern import Parts, Pattern

_PAIRS, _PAIR_ROWS = 64, 2**18  # of a mean curvature


def spread(pattern: Pattern, scale: Tensor, off: Tensor, normals: Tensor) -> Tensor:
    """U eps [..., D] for normals [..., D]; ``scale``: d [D]."""
    y, n = pattern.sorted(scale * normals), pattern.of_off(off)
    groups = [each + _times(part, each) for each, part in zip(y.groups, n.groups)]
    if not pattern.top:
        return pattern.joined(Parts(groups, [], y.top))
    groups = [each + _at_top(border, y.top) for each, border in zip(groups, n.borders)]
    return pattern.joined(Parts(groups, [], y.top + y.top @ n.top.mT))


def standardized(pattern: Pattern, scale: Tensor, off: Tensor, z: Tensor) -> Tensor:
    """eps [D] of z = U eps [D]."""
    v, n = pattern.sorted(z), pattern.of_off(off)
    top = _solved(n.top, v.top) if pattern.top else v.top
    groups = v.groups
    if pattern.top:
        groups = [each - _at_top(border, top) for each, border in zip(groups, n.borders)]
    groups = [_solved(part, each) for each, part in zip(groups, n.groups)]
    return pattern.joined(Parts(groups, [], top)) / scale


def marginal_sd(pattern: Pattern, scale: Tensor, off: Tensor) -> Tensor:
    """[D]: the root of the diagonal of Sigma."""
    w, n = pattern.sorted(scale**2), pattern.of_off(off)
    groups = [each + _times(part**2, each) for each, part in zip(w.groups, n.groups)]
    if pattern.top:
        groups = [each + _at_top(border**2, w.top) for each, border in zip(groups, n.borders)]
    return pattern.joined(Parts(groups, [], w.top + w.top @ (n.top**2).mT)).sqrt()


def root(pattern: Pattern, scale: Tensor, off: Tensor) -> Tensor:
    """U [D, D], rows and columns as the latents are."""
    return spread(pattern, scale, off, torch.eye(len(scale), dtype=scale.dtype, device=scale.device)).mT


def best(pattern: Pattern, precision: Tensor) -> tuple[Tensor, Tensor] | None:
    """(log d [D], the numbers of N) nearest to a Gaussian of this ``precision`` [D, D]; None: it is not positive
    definite.
    """
    ordered = pattern.matrix(precision)
    own = pattern.of_matrix(ordered)
    groups = [_inverse_root(each) for each in own.groups]
    whole = _inverse_root(ordered[None]) if pattern.top else ordered.new_zeros(1, *ordered.shape)
    if whole is None or any(each is None for each in groups):
        return None
    last = pattern.of_matrix(whole[0])
    found = [each for each in groups if each is not None]
    widths = Parts([each.diagonal(dim1=1, dim2=2) for each in found], [], last.top.diagonal())
    unit = Parts(
        [each / width[:, None, :] for each, width in zip(found, widths.groups)],
        [each / widths.top for each in last.borders],
        last.top / widths.top,
    )
    return pattern.joined(widths).log(), pattern.off(unit)


def _inverse_root(matrices: Tensor) -> Tensor | None:
    """Upper triangular U [G, L, L], U U' the inverse of each of ``matrices``; None: one is not positive definite."""
    scale = matrices.diagonal(dim1=-2, dim2=-1).rsqrt()
    lower, failed = torch.linalg.cholesky_ex(torch.nan_to_num(scale[..., :, None] * matrices * scale[..., None, :]))
    if failed.any() or not scale.isfinite().all():
        return None
    unit = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    made: Tensor = scale[..., :, None] * torch.linalg.solve_triangular(lower, unit, upper=False).mT
    return made


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """[..., G, L] from matrices [G, L, L] and vectors [..., G, L]."""
    made: Tensor = (matrices @ vectors[..., None])[..., 0]
    return made


def _at_top(border: Tensor, top: Tensor) -> Tensor:
    """[..., G, L] from a border [G, L, T] and the top's part [..., T]."""
    made = (border.flatten(0, 1) @ top[..., None])[..., 0]
    return made.view(*made.shape[:-1], *border.shape[:2])


def _solved(above: Tensor, v: Tensor) -> Tensor:
    """(1 + above)^-1 v, for what is above the diagonal of matrices [..., L, L], and vectors [..., L]."""
    return (_unit_inverse(above) @ v[..., None])[..., 0]


def _unit_inverse(above: Tensor) -> Tensor:
    """(1 + above)^-1 [..., L, L], by blocks of twice the size each time: a compiled step has no triangular solve.

    The inverse of [[A, B], [0, C]] is [[A^-1, -A^-1 B C^-1], [0, C^-1]].
    """
    size, length = 1, above.shape[-1]
    most = 2 ** math.ceil(math.log2(length)) if length > 1 else 1
    whole = torch.nn.functional.pad(above, (0, most - length, 0, most - length))
    inverse = above.new_ones(*above.shape[:-2], most, 1, 1)
    while size < most:
        first, last = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        tiles = whole.unflatten(-2, (-1, 2 * size)).unflatten(-1, (-1, 2 * size))
        pairs = tiles.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        corner = -first @ pairs[..., :size, size:] @ last
        upper, lower = torch.cat([first, corner], dim=-1), torch.cat([torch.zeros_like(corner), last], dim=-1)
        inverse, size = torch.cat([upper, lower], dim=-2), 2 * size
    return inverse[..., 0, :length, :length]


@dataclass(frozen=True, eq=False)
class Triangular:
    """The covariance of a root of a `Pattern`."""

    log_sd: slice
    """Where log d [D] lies in theta: sds of latents given those behind them."""
    off: slice
    """Where the numbers of N lie, right behind."""
    pattern: Pattern
    most: int
    independent = False

    @property
    def parameters(self) -> int:
        return self.pattern.latents + self.pattern.off_size

    @property
    def normals(self) -> int:
        return self.pattern.latents

    def pairs(self, rows: int) -> int:
        return min(_PAIRS, _PAIR_ROWS // rows)

    def marginal_sd(self, theta: Tensor) -> Tensor:
        return marginal_sd(self.pattern, *self._numbers(theta))

    def inverse_sd(self, theta: Tensor) -> Tensor:
        return 1.0 / self.marginal_sd(theta)

    def spread(self, theta: Tensor, normals: Tensor) -> Tensor:
        return spread(self.pattern, *self._numbers(theta), normals)

    def of_independent(self, log_sd: Tensor) -> Tensor:
        return torch.cat([log_sd, log_sd.new_zeros(self.pattern.off_size)])

    def best(self, precision: Tensor) -> Tensor | None:
        found = best(self.pattern, precision)
        return None if found is None else torch.cat(found)

    def step(self, theta: Tensor, gradient: Tensor, factor: Tensor) -> Tensor:
        """To the best root for the curvature."""
        step = torch.zeros_like(theta, dtype=torch.float64)
        inverse = torch.linalg.inv(factor.double())
        found, here = self.best(inverse.mT @ inverse), slice(self.log_sd.start, self.off.stop)
        if found is not None:
            step[here] = found - theta[here]
        return step

    def change(self, theta: Tensor, step: Tensor) -> Tensor:
        marginal = (self.marginal_sd(theta + step) / self.marginal_sd(theta)).log()
        return torch.maximum(marginal.abs(), step[self.log_sd].abs())

    def distance(self, theta: Tensor, loc: Tensor) -> Tensor:
        """By marginal sds, and by the sds of each direction of the noise."""
        within = standardized(self.pattern, *self._numbers(theta), loc)
        return torch.maximum(within.abs(), (loc / self.marginal_sd(theta)).abs())

    def control(self, curvature: Tensor, theta: Tensor) -> Tensor:
        """H U, rows and columns in the pattern's order."""
        return self.pattern.matrix(curvature @ root(self.pattern, *self._numbers(theta.to(curvature.dtype))))

    def by_chance(self, control: Tensor, theta: Tensor, elements: Tensor, share: float) -> Tensor:
        """By U the gradient of eps' U' H U eps / 2 is (H U eps) eps', of mean H U: the difference, for H U as it was
        when the curvature was taken.
        """
        pattern, (scale, off) = self.pattern, self._numbers(theta)
        eps = pattern.ordered(elements[..., : self.normals].flatten(0, -2))
        mean, n, d = pattern.of_matrix(control), pattern.of_off(off), pattern.sorted(scale)
        first, second = pattern.parts(eps @ control.mT), pattern.parts(eps)
        pairs = list(zip(first.groups, second.groups, mean.groups))
        groups = [torch.einsum("rgi,rgj->gij", a, b) / len(eps) - c for a, b, c in pairs]
        edges = [torch.einsum("rgi,rt->git", a, second.top) / len(eps) - c for a, c in zip(first.groups, mean.borders)]
        top = first.top.mT @ second.top / len(eps) - mean.top
        diagonals = Parts([each.diagonal(dim1=1, dim2=2) for each in groups], [], top.diagonal())
        by_width = [own + (a * b).sum(1) for own, a, b in zip(diagonals.groups, n.groups, groups)]
        of_top = diagonals.top + (n.top * top).sum(0) + sum((a * b).sum((0, 1)) for a, b in zip(n.borders, edges))
        by_log = scale * pattern.joined(Parts(by_width, [], of_top))
        by_groups = [each * width[:, None, :] for each, width in zip(groups, d.groups)]
        by_off = Parts(by_groups, [each * d.top for each in edges], top * d.top)
        return share * len(elements) * torch.cat([by_log, pattern.off(by_off)])

    def chance(self, control: Tensor, theta: Tensor, elements: Tensor) -> Tensor:
        """(eps' U' H U eps - its mean) / 2."""
        scale, off = self._numbers(theta)
        eps = self.pattern.ordered(elements[..., : self.normals])
        u, slope = self.pattern.matrix(root(self.pattern, scale, off)), control.to(scale.dtype)
        return 0.5 * (((eps @ u.mT) * (eps @ slope.mT)).sum(-1) - (u * slope).sum())

    def units(self, factor: Tensor, theta: Tensor) -> Tensor | None:
        """Those of N_ij: 1 / (sqrt(n H_ii) d_j), where minus the ELBO curves by 1 / n, for the n of a row: they move a
        latent together as far as its location does.
        """
        pattern, (scale, _) = self.pattern, self._numbers(theta.to(factor.dtype))
        count = pattern.top + max((length for _, length in pattern.blocks), default=0)
        rows = pattern.sorted((count * torch.linalg.inv(factor).square().sum(0)).rsqrt())
        columns = pattern.sorted(1.0 / scale)
        made = Parts(
            [a[..., :, None] * b[..., None, :] for a, b in zip(rows.groups, columns.groups)],
            [a[..., None] * columns.top for a in rows.groups],
            rows.top[:, None] * columns.top,
        )
        return torch.cat([torch.ones_like(scale), pattern.off(made)])

    def _numbers(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        return theta[self.log_sd].exp(), theta[self.off]
