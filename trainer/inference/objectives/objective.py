"""What an objective is: how all draws of a step become named terms, whose sum is what training raises.

The terms are the ELBO's whatever is raised: another objective changes their gradient, not their value, so that what is
logged is the ELBO. Every term is in full-data nats; division by N happens once, in `trainer.inference.step`.

Shapes: B rows of a group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from trainer.inference.guides.mean_field import KL

Kind = Literal["likelihood", "kl_global", "kl_local"]
"""What is observed outside the data plate is a term of the prior, and so of "kl_global"."""


@dataclass(frozen=True)
class Term:
    """One site's share of log p(x, z) - log q(z) at a draw."""

    kind: Kind
    scaled: bool
    """True: it stands in the data plate and is an estimate from the batch's rows; False: it counts once."""
    value: Tensor
    """float64 [], nats."""
    rows: Callable[[], Tensor] | None = None
    """Each row's part of ``value``, float64 [B]; None where the term is none of the rows' or is known as a sum."""


Terms = dict[str, Term]
"""By site, at one draw of one lane group; the same names in the same order at every draw."""


class Objective(Protocol):
    """Estimates what training raises, from the draws of a step."""

    @property
    def kl(self) -> KL:
        """How the guide gives what it adds."""
        ...

    @property
    def pairs(self) -> int:
        """Draws of z per lane group."""
        ...

    @property
    def signs(self) -> tuple[float, ...]:
        """What each draw's noise is multiplied by, an evaluation each."""
        ...

    @property
    def is_elbo(self) -> bool:
        """Whether the ELBO is what training raises, a ``warmup`` aside; the terms are always the ELBO's."""
        ...

    @property
    def warmup(self) -> int:
        """The step from which on training raises the objective itself, not a weighted one; 0: from the first on."""
        ...

    def kl_weight_at(self, step: Tensor) -> Tensor:
        """What the gradient of all terms but the likelihood is multiplied by at ``step`` (int64 []), float64 []; asked
        for where there is a ``warmup``.
        """
        ...

    def combined(self, draws: Sequence[Sequence[Terms]], share: float) -> dict[str, Tensor]:
        """The named terms, float64 [] nats, of this rank's ``draws``: by lane group, each its pairs at every sign.

        ``share``: a group's part in what counts once, over all ranks.
        """
        ...


def log_weight_by_row(terms: Terms) -> Tensor:
    """log p(y, u | z) - log q(u) of each row at a draw, float64 [B], at the scale of the batch.

    Raises ValueError where a term of the rows is known as a sum alone.
    """
    rows = {name: term.rows for name, term in terms.items() if term.scaled}
    sums = [name for name, given in rows.items() if given is None]
    if sums or not rows:
        raise ValueError(f"no weights by row: {', '.join(sums) or 'every site'} is known as a sum alone")
    first, *others = [given() for given in rows.values() if given is not None]
    for each in others:
        first = first + each
    return first
