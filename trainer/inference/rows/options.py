"""How the continuous latents of rows are held, as options say it."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal

from trainer.errors import UserError

Method = Literal["auto", "integrate"]
NODES, DRAWS = 9, 8
_GRID = 2  # numbers of a row, up to which there are nodes


@dataclass(frozen=True)
class RowOptions:
    """Those of `guide.`, beside a guide's own; None: the default."""

    rows: Method = "auto"
    nodes: int | None = None
    """Along each number of a row that has one or two."""
    row_draws: int | None = None
    """Of a row that has more, each with its mirror image."""

    def given(self) -> tuple[str, ...]:
        """The names of those that are not at their default."""
        return tuple(each.name for each in fields(self) if getattr(self, each.name) != each.default)

    def refuse_unused(self, held: Iterable[str], numbers: int) -> None:
        """Raises UserError where an option says nothing of a model whose rows have so many ``numbers`` to integrate,
        and whose guide holds the latents ``held`` of rows.
        """
        if not self.given():
            return
        first, names = f"guide.{self.given()[0]}", ", ".join(f'"{name}"' for name in held)
        if names:
            raise UserError(f"{first} is for latents of rows that the guide leaves, and yours holds {names}: drop it.")
        if not numbers:
            raise UserError(f"{first} is for continuous latents of rows, and the model has none: drop it.")
        if self.nodes is not None and numbers > _GRID:
            raise UserError(
                f"guide.nodes is for rows of one or two numbers, and these have {numbers}: give guide.row_draws."
            )
        if self.row_draws is not None and numbers <= _GRID:
            raise UserError(
                f"guide.row_draws is for rows of more than two numbers, and these have {numbers}: give guide.nodes."
            )


DEFAULT = RowOptions()
