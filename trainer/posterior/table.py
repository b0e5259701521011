"""The closing table of a run: every site's posterior on one screen."""

import numpy as np
from rich.table import Table
from torch import Tensor

from trainer.posterior.summary import SiteSummary

_ROWS = 8  # of a site before it is summarised in one


def closing_table(summaries: list[SiteSummary], parameters: dict[str, Tensor] | None = None) -> Table:
    """Site, mean, sd and 90 % interval; a large site is one row with the range of its means and its median sd.

    ``parameters``: the model's own trained parameters, listed as point estimates.
    """
    table = Table(title="posterior", title_justify="left", header_style="bold")
    table.add_column("site", overflow="fold")
    for heading in ("mean", "sd", "5 %", "95 %"):
        table.add_column(heading, justify="right")
    for site in summaries:
        if site.name.endswith("@unconstrained"):
            continue
        if site.mean.size > _ROWS:
            table.add_row(
                f"{site.name}[{' x '.join(f'{n:,}' for n in site.shape)}]",
                f"{_number(site.mean.min())} to {_number(site.mean.max())}",
                f"median {_number(float(np.median(site.sd)))}",
                _number(site.quantiles[0].min()),
                _number(site.quantiles[2].max()),
            )
            continue
        for index in np.ndindex(*site.shape):
            at = f"[{','.join(map(str, index))}]" if index else ""
            numbers = (site.mean[index], site.sd[index], site.quantiles[0][index], site.quantiles[2][index])
            table.add_row(site.name + at, *map(_number, numbers))
    for name, value in (parameters or {}).items():
        shape = f"[{' x '.join(map(str, value.shape))}]" if value.dim() else ""
        span = _number(float(value)) if not value.dim() else f"{_number(value.min())} to {_number(value.max())}"
        table.add_row(f"{name}{shape}", span, "point", "", "")
    return table


def _number(value: float | Tensor | np.floating) -> str:
    return f"{float(value):.4g}"
