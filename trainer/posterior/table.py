"""The closing table of a run: every site's posterior on one screen."""

import math
from collections.abc import Mapping

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from torch import Tensor

from trainer.posterior.summary import SiteSummary


def closing_table(
    summaries: list[SiteSummary], parameters: Mapping[str, Tensor] | None = None, max_rows_per_site: int = 8
) -> Group:
    """Mean, sd and 90 % interval of every latent; a site with more rows is one, of its means' range and median sd.

    ``parameters``: the model's own trained parameters, in a second table of point estimates.
    """
    shown = [site for site in summaries if not site.name.endswith("@unconstrained")]
    table = _table("posterior", "site", "index", "mean", "sd", "5 %", "95 %")
    for site in shown:
        if site.mean.size > max_rows_per_site:
            sd = float(np.median(site.sd))
            low, high, middle = _aligned(sd, [float(site.mean.min()), float(site.mean.max()), sd])
            table.add_row(site.name, _size(site.shape), f"{low} to {high}", f"~{middle}")
            table.caption = "~ of a site of many values: the range of the means, and the median sd"
            continue
        name = site.name
        for index in np.ndindex(*site.shape):
            numbers = [float(each[index]) for each in (site.mean, site.sd, *site.quantiles[[0, 2]])]
            table.add_row(name, ",".join(map(str, index)), *_aligned(float(site.sd.min()), numbers))
            name = ""
    tables = [table] if shown else []
    if not parameters:
        return Group("", *tables, "")
    points = _table("model parameters (point estimates)", "name", "shape", "value")
    for name, value in parameters.items():
        text = f"{value.min():.4g} to {value.max():.4g}" if value.numel() > 1 else f"{value.item():.4g}"
        points.add_row(name, _size(tuple(value.shape)), text)
    return Group("", *(each for one in tables for each in (one, "")), points, "")


def _table(title: str, name: str, place: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left", box=box.SIMPLE_HEAD)
    table.show_edge = table.pad_edge = False
    table.add_column(name, overflow="fold")
    table.add_column(place, style="dim", overflow="fold")
    for heading in numbers:  # the first also holds ranges, which a narrow terminal may break at their spaces
        table.add_column(heading, justify="right", overflow="fold", no_wrap=heading != numbers[0])
    return table


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{n:,}" for n in shape)


def _aligned(sd: float, numbers: list[float]) -> list[str]:
    """The numbers to the second digit of ``sd``: what is known of them, with their points in line."""
    if sd > 0 and all(map(math.isfinite, [sd, *numbers])) and max(map(abs, numbers)) < 1e9:
        decimals = max(1 - math.floor(math.log10(sd)), 0)
        if decimals <= 6:
            return [f"{number:,.{decimals}f}" for number in numbers]
    return [f"{number:.5g}" if sd == 0 else f"{number:.3g}" for number in numbers]
