"""The arrow in the Hessian of a hierarchy: a few top-level latents hang together with all, a group's with each other.

Known from a few products with vectors, it gives the diagonal, and solved by blocks it leaves conjugate gradients little
to do. Shapes: D latents, T of them in small sites; G groups of L neighbors.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.inference.guides.gaussian import GaussianView
from trainer.inference.model.latents import LatentSite
from trainer.inference.recipe.convergence import small_sites

_TOP = 32  # products for single latents
_LONGEST = 8  # last dimension of a site of many values up to which its latents are taken as one group


class Groups(NamedTuple):
    """A large site's part of the diagonal, where groups do not hang together."""

    start: int
    factors: Tensor
    """[G, L, L] lower Cholesky factors."""


class Arrow(NamedTuple):
    """[D, D], symmetric and positive definite; the identity for small sites of which nothing is known."""

    diagonal: Tensor
    """[D]: the Hessian's own."""
    top: Tensor
    """[T]: numbers of the latents whose rows are known."""
    border: Tensor
    """[T, D]: these rows at the large sites, zeros elsewhere."""
    schur: Tensor
    """[T, T]: lower Cholesky factor of what the groups leave of the top's block."""
    groups: tuple[Groups, ...]

    def solve(self, v: Tensor) -> Tensor:
        """[D] from [D]."""
        below = _below(self.groups, v)
        if not len(self.top):
            return below
        head = torch.cholesky_solve((v[self.top] - self.border @ below)[:, None], self.schur)[:, 0]
        return (below - _below(self.groups, head @ self.border)).index_copy(0, self.top, head)


def knows_small_sites(view: GaussianView) -> bool:
    """Whether their latents are few enough for a product each."""
    return int(small_sites(view).sum()) <= _TOP


def arrow(view: GaussianView, product: Callable[[Tensor], Tensor], device: torch.device) -> Arrow | None:
    """By ``product``, v -> H v [D], of T + L vectors where large sites have L neighbors; None: H has a diagonal <= 0.

    Of large sites, random signs z give the diagonal, z * (H z) (Bekas, Kokiopoulou and Saad 2007). What hangs together
    most stands beside each other, as the coefficients of a group or the times of a walk do: so neighbors are never in
    one probe (Tang and Saad 2012, "A probing method for computing the diagonal of a matrix inverse"), and each shows
    how it hangs together with the others of its group.
    """
    small = small_sites(view).to(device)
    top = small.nonzero()[:, 0] if knows_small_sites(view) else small.nonzero()[:0, 0]
    rows = [product(torch.zeros_like(small, dtype=torch.float64).index_fill(0, number, 1.0)) for number in top]
    border = torch.stack(rows) if rows else torch.zeros(0, len(small), dtype=torch.float64, device=device)
    head = border[:, top]
    border, diagonal = border.masked_fill(small, 0.0), small.double().index_copy(0, top, head.diagonal())
    signs, groups = 2.0 * torch.randint(0, 2, small.shape, generator=torch.Generator().manual_seed(0)) - 1.0, []
    for site in view.sites:
        if not small[site.start]:
            matrices = _of_groups(site, signs.double().to(device), product)
            diagonal[site.start : site.start + site.size] = matrices.diagonal(dim1=1, dim2=2).reshape(-1)
            groups.append(Groups(site.start, _factors(matrices)))
    if not (diagonal > 0).all():
        return None
    taken = torch.stack([border @ _below(groups, row) for row in border]) if rows else head
    schur, fails = torch.linalg.cholesky_ex((head + head.T - taken - taken.T) / 2)
    if fails:  # a part of the arrow that is not seen holds it together
        border, schur = torch.zeros_like(border), head.diagonal().sqrt().diag()
    return Arrow(diagonal, top, border, schur, tuple(groups))


def _of_groups(site: LatentSite, signs: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """The site's part of H as matrices [G, L, L], symmetric; L is 1 where neighbors are too many."""
    last = site.shape[-1] if len(site.shape) > 1 else 2
    colors = max(2, min(last, _LONGEST))
    length = last if len(site.shape) > 1 and last == colors else 1
    here = slice(site.start, site.start + site.size)
    own = signs[here]
    matrices = torch.zeros(site.size // length, length, length, dtype=signs.dtype, device=signs.device)
    for color in range(colors):
        probe = torch.zeros_like(signs)
        probe[here][color::colors] = own[color::colors]
        image = product(probe)[here]
        if length == 1:
            matrices[color::colors, 0, 0] = (own * image)[color::colors]
        else:
            matrices[:, :, color] = image.reshape(-1, length) * own[color::colors, None]
    return (matrices + matrices.mT) / 2


def _factors(matrices: Tensor) -> Tensor:
    """Cholesky factors [G, L, L], of the diagonal alone where a matrix is not positive definite."""
    factors, fails = torch.linalg.cholesky_ex(matrices)
    diagonal = matrices.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().diag_embed()
    return torch.where((fails > 0)[:, None, None], diagonal, factors)


def _below(groups: Sequence[Groups], v: Tensor) -> Tensor:
    """v [D] with each large site's part solved by its groups."""
    found = v.clone()
    for each in groups:
        here = slice(each.start, each.start + each.factors.shape[0] * each.factors.shape[1])
        found[here] = torch.cholesky_solve(v[here].reshape(*each.factors.shape[:2], 1), each.factors).reshape(-1)
    return found
