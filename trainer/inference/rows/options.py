"""How the continuous latents of rows are held, as options say it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.errors import UserError
from trainer.inference.rows.integral import GRID
from trainer.inference.rows.sites import MOST_NUMBERS

Method = Literal["auto", "integrate", "amortise", "mean_field"]


@dataclass(frozen=True)
class RowOptions:
    """Those of `guide.`, beside a guide's own; None: the default."""

    rows: Method = "auto"
    nodes: int | None = None
    """Along each number of a row that has one or two."""
    row_draws: int | None = None
    """Of a row that has more, each with its mirror image."""
    widths: Sequence[int] | None = None
    """Of the layers of an encoder."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What an encoder knows of the columns (`trainer.inference.guides.encoder.Facts`), which no user gives."""

    def encodes(self, numbers: int) -> bool:
        """Whether an encoder holds so many ``numbers`` of a row."""
        return numbers > 0 and (self.rows == "amortise" or (self.rows == "auto" and numbers > MOST_NUMBERS))

    def given(self) -> tuple[str, ...]:
        """The names of those that a user has given."""
        return tuple(name for name in OPTIONS if getattr(self, name) != getattr(DEFAULT, name))

    def refuse_unused(self, held: Sequence[str], numbers: int) -> None:
        """Raises UserError where an option says nothing of a model whose rows have so many ``numbers``, and whose guide
        holds the latents ``held`` of rows.
        """
        given = self.given()
        if not given:
            return
        names = ", ".join(f'"{name}"' for name in held)
        if names:
            raise UserError(
                f"guide.{given[0]} is for latents of rows that the guide leaves, and yours holds {names}: drop it."
            )
        if not numbers:
            raise UserError(f"guide.{given[0]} is for continuous latents of rows, and the model has none: drop it.")
        used = "widths" if self.encodes(numbers) else "nodes" if numbers <= GRID else "row_draws"
        for name in given:
            if name not in ("rows", used):
                raise UserError(f"guide.{name} is for {_FOR[name]}, and these are {_FOR[used]}: give guide.{used}.")


OPTIONS = ("rows", "nodes", "row_draws", "widths")
"""Those that a user may give."""
DEFAULT = RowOptions()
_FOR = {
    "nodes": "rows of one or two numbers",
    "row_draws": "rows of more than two numbers",
    "widths": "rows that an encoder holds",
}
