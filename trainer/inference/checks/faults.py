"""What is wrong with rows, from the sites of a trace and the indices that it used. Shapes: B rows of a batch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from trainer.inference.checks.indices import Lookup
from trainer.inference.model.latents import Site, is_deterministic, log_prob
from trainer.inference.model.plates import WEIGHT, inside
from trainer.inference.model.ragged import Column
from trainer.inference.model.supports import in_words, innermost

_FEW = 5


class Fault(NamedTuple):
    """What is wrong with some rows of a batch."""

    rows: list[int]
    """Their places in the batch, the first few."""
    what: str
    """Of the first of them."""
    why: str
    remedy: str
    of_all: bool = False
    """Whether all rows of the batch have it."""

    def sentence(self, row_id: Sequence[int]) -> str:
        """With the number of each of ``rows``."""
        first, *more = dict.fromkeys(row_id)
        others = f", and so in row{'s' * (len(more) > 1)} {', '.join(map(str, more))}" if more else ""
        return f"{self.what} in row {first} (row_id){self.why}{others}: {self.remedy}."


def observed(trace: poutine.Trace, plate: str) -> Iterator[Site]:
    """The sites inside the data plate whose values are data."""
    for site in trace.nodes.values():
        if site["type"] != "sample" or not site["is_observed"] or isinstance(site["fn"], _Subsample):
            continue
        is_data = isinstance(site["value"], Tensor) and site["value"].numel() and not is_deterministic(site)
        if is_data and inside(site, plate):
            yield site


def counted(site: Site) -> Tensor:
    """Whether mask and scale let an element of the batch shape count."""
    value = site["value"]
    counts: Tensor = value.new_ones(site["fn"].batch_shape, dtype=torch.bool)
    mask, scale = site["mask"], torch.as_tensor(site["scale"], device=value.device)
    counts = counts & (scale > 0)
    return counts if mask is None else counts & torch.as_tensor(mask, device=value.device)


def row_dim(site: Site, plate: str) -> int:
    """The dimension of the batch shape, from the right, that is the rows'."""
    return int(next(frame.dim for frame in site["cond_indep_stack"] if frame.name == plate))


def by_row(values: Tensor, dim: int, rows: int, inner: int = 0) -> Tensor:
    """``values`` [batch shape + ``inner`` dimensions] as [B, ...], everything else flattened."""
    dim = dim - inner
    shape = torch.broadcast_shapes(values.shape, (rows, *(1,) * (-dim - 1)))
    return values.expand(shape).movedim(dim, 0).reshape(rows, -1)


def of_weight(weight: Tensor) -> Iterator[Fault]:
    where = (~((weight >= 0) & torch.isfinite(weight))).nonzero()[:_FEW, 0].tolist()
    if where:
        what = f'column "{WEIGHT}" is {float(weight[where[0]]):g}'
        yield Fault(where, what, "", "a row stands for 0 observations or more")


def outside(site: Site, counts: Tensor, right: Tensor, dim: int, rows: int) -> Iterator[Fault]:
    """Values that count and are not ``right`` [batch shape + a few dimensions of an event]."""
    inner = max(right.dim() - len(site["fn"].batch_shape), 0)
    bad = by_row(counts.reshape(*counts.shape, *(1,) * inner) & ~right, dim, rows, inner)
    where = bad.any(1).nonzero()[:_FEW, 0].tolist()
    if not where:
        return
    fn = innermost(site["fn"])
    yield Fault(
        where,
        f'site "{site["name"]}" observes {_first_value(site, bad, dim, where[0])}',
        f", outside the support of {type(fn).__name__} ({in_words(fn.support)})",
        "correct it, drop the row, or take it out of the likelihood with poutine.mask",
    )


def of_lookup(lookup: Lookup, used: Tensor, columns: Mapping[str, Column]) -> Iterator[Fault]:
    """Indices that torch refuses, and, of the rows that are ``used`` [B], those that it would count from the end."""
    rows, at = lookup.outside(lookup.low)
    if not len(rows):
        rows, at = lookup.outside(0)
        kept = rows < len(used)  # entries that no row has are not of any
        rows, at = rows[kept], at[kept]
        rows, at = rows[used[rows]], at[used[rows]]
    if len(rows):
        name = lookup.column(dict(columns))
        yield Fault(
            list(dict.fromkeys(rows.tolist()))[:_FEW],
            f'{f"""column "{name}" """ if name else "an index made from the columns "}is {int(at[0])}',
            f", where the model indexes a table of {lookup.size:,} (0 to {lookup.size - 1:,})",
            "number the levels from 0, or give the table a place for each",
        )


def without_density(site: Site, dim: int, rows: int) -> Iterator[Fault]:
    density = log_prob(site)
    bad = by_row(counted(site) & ~torch.isfinite(density), dim, rows)
    where = bad.any(1).nonzero()[:_FEW, 0].tolist()
    if where:
        there = by_row(density, dim, rows)[where[0]][bad[where[0]]][0]
        yield Fault(
            where,
            f'the log density of site "{site["name"]}" is {float(there):g} at {_first_value(site, bad, dim, where[0])}',
            " where training starts",
            "look for an extreme value (an amount of 0, a share of 0 or 1), and for a model that divides by zero or "
            "takes the log of it there",
            bool(bad.any(1).all()),
        )


def _first_value(site: Site, bad: Tensor, dim: int, row: int) -> str:
    """The first ``bad`` [B, ...] value of a row."""
    shape = site["fn"].batch_shape
    value = site["value"].expand(torch.broadcast_shapes(site["value"].shape, shape + site["fn"].event_shape))
    each = by_row(value, dim, len(bad), value.dim() - len(shape))[row].reshape(bad.shape[1], -1)
    return _shown(each[int(bad[row].int().argmax())])


def _shown(values: Tensor) -> str:
    each = [f"{value:.6g}" for value in values.tolist()[:4]]
    return each[0] if len(values) == 1 else f"[{', '.join(each)}{', …' if len(values) > 4 else ''}]"
