"""Where the root of a covariance may be other than zero: groups of latents, and a few that vary with everything.

Shapes: D latents in their order: G groups of L each, for each block of groups, then T at the top.
"""

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Parts(NamedTuple):
    """What belongs to groups and to the top, of a matrix [D, D] or a vector [..., D]."""

    groups: list[Tensor]
    """[G, L, L], or [..., G, L] of a vector."""
    borders: list[Tensor]
    """[G, L, T]: the top's columns at the groups' rows; none of a vector."""
    top: Tensor
    """[T, T], or [..., T] of a vector."""


@dataclass(frozen=True, eq=False)
class Pattern:
    """Where the root may be other than zero."""

    blocks: tuple[tuple[int, int], ...]
    """(G, L) of each block, in their order."""
    top: int = 0
    """T."""
    order: Tensor | None = None
    """int64 [D]: which latent stands at each place; None: as they are."""

    @property
    def latents(self) -> int:
        return sum(groups * length for groups, length in self.blocks) + self.top

    @property
    def off_size(self) -> int:
        """How many numbers hold N: whole matrices, of which what is not above the diagonal counts for nothing."""
        return sum(groups * length * (length + self.top) for groups, length in self.blocks) + self.top**2

    def of_off(self, off: Tensor) -> Parts:
        """N less the identity, from its numbers [off_size]."""
        sizes = [(g, length, length) for g, length in self.blocks]
        sizes += [(g, length, self.top) for g, length in self.blocks]
        pieces = off.split([*(math.prod(size) for size in sizes), self.top**2])
        made = [piece.view(size) for piece, size in zip(pieces, sizes)]
        count = len(self.blocks)
        return Parts([each.triu(1) for each in made[:count]], made[count:], pieces[-1].view(self.top, self.top).triu(1))

    def off(self, parts: Parts) -> Tensor:
        """[off_size]: what of a matrix's parts is above the diagonal."""
        groups = [each.triu(1).reshape(-1) for each in parts.groups]
        return torch.cat([*groups, *(each.reshape(-1) for each in parts.borders), parts.top.triu(1).reshape(-1)])

    def sorted(self, v: Tensor) -> Parts:
        """A vector [..., D] of the latents, by its parts."""
        return self.parts(self.ordered(v))

    def ordered(self, v: Tensor) -> Tensor:
        """A vector [..., D] of the latents, in the pattern's order."""
        return v if self.order is None else v[..., self.order.to(v.device)]

    def parts(self, ordered: Tensor) -> Parts:
        """The parts of a vector [..., D] in the pattern's order."""
        *groups, top = ordered.split([*(g * length for g, length in self.blocks), self.top], dim=-1)
        pairs = zip(groups, self.blocks)
        return Parts([each.reshape(*each.shape[:-1], *block) for each, block in pairs], [], top)

    def joined(self, parts: Parts) -> Tensor:
        """[..., D] of a vector's parts."""
        flat = torch.cat([*(each.flatten(-2) for each in parts.groups), parts.top], dim=-1)
        return flat if self.order is None else flat[..., self.order.argsort().to(flat.device)]

    def matrix(self, full: Tensor) -> Tensor:
        """A matrix [D, D] of the latents, its rows and columns in the pattern's order."""
        return self.ordered(self.ordered(full).mT).mT

    def of_matrix(self, ordered: Tensor) -> Parts:
        """The parts of a matrix [D, D] in the pattern's order."""
        groups, borders, inside = [], [], self.latents - self.top
        ends = itertools.accumulate((g * length for g, length in self.blocks), initial=0)
        for (count, length), (start, stop) in zip(self.blocks, itertools.pairwise(ends)):
            own = ordered[start:stop, start:stop].view(count, length, count, length)
            groups.append(own.diagonal(dim1=0, dim2=2).permute(2, 0, 1))
            borders.append(ordered[start:stop, inside:].reshape(count, length, self.top))
        return Parts(groups, borders, ordered[inside:, inside:])
