"""What stands outside the data plate: whether its value depends on the rows.

A term that does not counts once, as a part of the prior. One that does would be another one at every step, and is
refused with the remedy of its case. Found by evaluation: the same latents, other rows. Shapes: B rows.
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.runtime import Message
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from trainer.errors import UserError, first_line
from trainer.inference.model.latents import AtZero, Site, is_deterministic, is_latent, log_prob
from trainer.inference.model.plates import Batch, PlatedModel, inside
from trainer.inference.model.ragged import Jagged
from trainer.inference.model.supports import innermost

SPREADS = (
    0.3,
    1e-3,
)  # of the latents around zero, unconstrained; the latter where not all can be evaluated at the first
_MOST_COLUMNS = 64
FAILURES = (RuntimeError, IndexError, ValueError, ZeroDivisionError)
_CLOSE = {torch.float64: 1e-12, torch.float32: 1e-6}

Sites = dict[str, Site]


class Scattered(AtZero):
    """Sets every latent to numbers of its own, the same ones whatever the rows; those of rows change with the batch."""

    def __init__(self, batch: Batch, plate: str, spread: float):
        super().__init__(batch.dtype, batch.valid.device)
        self.plate, self.rows, self.spread = plate, batch.size, spread

    def place(self, msg: Message[..., Any], shape: tuple[int, ...]) -> Tensor:
        first = zlib.crc32(str(msg["name"]).encode()) % 997 + (self.rows if inside(msg, self.plate) else 0)
        numbers = torch.arange(torch.Size(shape).numel(), **self.options)
        return (self.spread * (numbers + first).cos()).reshape(shape)


def check_outside(model: PlatedModel, batch: Batch, global_sites: tuple[str, ...]) -> tuple[str, ...]:
    """The deterministic sites outside the data plate whose value the latents alone decide, in the order of the model.

    Raises UserError for a prior, a factor or an observed site there that depends on the rows, but for ``global_sites``.
    """
    with torch.random.fork_rng(devices=()), pyro.validation_enabled(False):  # the generator is the parameters'
        return _checked(model, batch, int(batch.valid), global_sites)


def _checked(model: PlatedModel, batch: Batch, rows: int, global_sites: tuple[str, ...]) -> tuple[str, ...]:
    try:
        whole, others = _traced(model, batch, rows, SPREADS[0], global_sites)
    except FAILURES:
        try:
            whole, others = _traced(model, batch, rows, SPREADS[1], global_sites)
        except FAILURES as error:
            raise UserError(
                f"the model runs on its first rows and not on some of them ({first_line(error)}): what it has for each "
                "row must be a column, and a size a number that does not follow the data."
            ) from error
    names = [name for name, site in whole.items() if _is_term(site)]
    if len([name for name in names if any(name not in found for found in others)]) > 1:
        raise site_per_row(model, names)
    depends = {name for name in whole if any(_differs(name, whole, found) for found in others)}
    for name, site in whole.items():
        if name in depends and name not in global_sites and not is_deterministic(site):
            raise _refused(name, site, model, rows, [found[name] for found in others if name in found])
    return tuple(name for name, site in whole.items() if _is_function(site) and name not in depends)


def _traced(
    model: PlatedModel, batch: Batch, rows: int, spread: float, global_sites: tuple[str, ...]
) -> tuple[Sites, list[Sites]]:
    """The sites outside the data plate on all rows and, at the same latents, on others."""
    whole = _sites(model, batch.at(torch.arange(rows)), spread)
    others = [_sites(model, other, spread) for other in _fractions(batch, rows)]
    if any(_is_term(site) and name not in global_sites for name, site in whole.items()):
        for other in _extremes(model, batch, rows):
            with suppress(*FAILURES, UserError):  # values that nobody has measured
                others.append(_sites(model, other, spread))
    return whole, others


def _sites(model: PlatedModel, batch: Batch, spread: float) -> Sites:
    torch.manual_seed(0)
    with Scattered(batch, model.plate, spread), torch.no_grad():
        trace = poutine.trace(model).get_trace(batch)
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not isinstance(site["fn"], _Subsample) and not inside(site, model.plate)
    }


def _fractions(batch: Batch, rows: int) -> Iterator[Batch]:
    """The first third, and the others in another order."""
    if rows > 1:
        index = torch.arange(rows, device=batch.valid.device)
        cut = (rows + 2) // 3
        yield batch.at(index[:cut])
        yield batch.at(index[cut:].flip(0))


def _extremes(model: PlatedModel, batch: Batch, rows: int) -> Iterator[Batch]:
    """Other values, and for each column the rows where it is low and those where it is high."""
    index = torch.arange(rows, device=batch.valid.device)
    moved = {name: c if isinstance(c, Jagged) else _moved(c) for name, c in batch.columns.items()}
    yield batch.at(index)._replace(columns={name: c[index] for name, c in moved.items()})
    for name in model.own[:_MOST_COLUMNS]:
        column = batch.columns[name]
        if rows > 1 and not isinstance(column, Jagged):
            order = column[:rows].reshape(rows, -1)[:, 0].argsort()
            yield batch.at(order[: (rows + 1) // 2])
            yield batch.at(order.flip(0)[: max(1, rows // 3)])


def _moved(values: Tensor) -> Tensor:
    """Other values of the same kind; integers within their range, since they may index."""
    if values.dtype == torch.bool:
        return ~values
    if values.is_floating_point() or not values.numel():
        return values + 1
    return values.max() + values.min() - values


def _is_term(site: Site) -> bool:
    """Whether an observed site has a density."""
    return bool(site["is_observed"]) and not is_deterministic(site)


def _is_function(site: Site) -> bool:
    """Whether a site is what others make of it: deterministic, or a reparameterized one that kept a density."""
    return is_deterministic(site) or (bool(site["is_observed"]) and isinstance(innermost(site["fn"]), dist.Delta))


def _differs(name: str, one: Sites, two: Sites) -> bool:
    if name not in two:  # a site that other rows do not have
        return True
    return any(apart(a, b) for a, b in zip(_facts(one[name]), _facts(two[name])))


def _facts(site: Site) -> list[Any]:
    """What a site adds to the log joint; a deterministic one its value."""
    if is_deterministic(site):
        return [site["value"]]
    return [log_prob(site), site["scale"], True if site["mask"] is None else site["mask"]]


def apart(one: Any, two: Any) -> bool:
    """Whether two values are not the same but for rounding."""
    a, b = torch.as_tensor(one), torch.as_tensor(two)
    close = {"rtol": _CLOSE.get(a.dtype, 0.0), "atol": 1e-30, "equal_nan": True}
    return a.shape != b.shape or not torch.allclose(a.double(), b.double(), **close)  # type: ignore[arg-type]


def site_per_row(model: PlatedModel, names: Sequence[str]) -> UserError:
    """The sentence for a loop over the rows, whose observed sites ``names`` grow in number with them."""
    stem, column = names[0].rstrip("0123456789").rstrip("_") or "y", next(iter(model.own), "x")
    return UserError(
        f'the model has a site for each row ("{names[0]}", "{names[1]}", …): write one for all of them, '
        f'`with pyro.plate("{model.plate}", len({column})): pyro.sample("{stem}", ..., obs=...)`, with whole '
        "columns in place of their elements; where a row depends on those before it, make the whole series one row "
        "(svi shard group_by=COLUMN)."
    )


def _refused(name: str, site: Site, model: PlatedModel, rows: int, others: list[Site]) -> UserError:
    """The sentence for a site that depends on the rows, from its nodes in traces of all of them and of some."""
    place = f'outside plate "{model.plate}" and depends on the rows'
    plate = f'`with pyro.plate("{model.plate}", len({next(iter(model.own), "x")})):`'
    if is_latent(site):
        shape, sizes = tuple(site["value"].shape), {tuple(other["value"].shape) for other in others}
        if sizes - {shape}:
            return UserError(
                f'latent "{name}" has shape {list(shape)} on {rows:,} rows and {list(min(sizes - {shape}))} on some of '
                f"them, {place}: give its size as a number, not by a column; what each row has stands in {plate}."
            )
        return UserError(
            f'the prior of latent "{name}" stands {place}, so it would be another one at every step: compute what it '
            "takes from them once, on the whole table, and give it as a number."
        )
    if type(site["fn"]).__name__ == "Unit":
        return UserError(
            f'pyro.factor("{name}") stands {place}: move it into {plate} with one value for each row, not their sum.'
        )
    for frame in site["cond_indep_stack"]:
        sizes = {each.size for other in others for each in other["cond_indep_stack"] if each.name == frame.name}
        if sizes - {frame.size} and frame.size == rows:
            return UserError(
                f'observed site "{name}" stands in plate "{frame.name}", which has a member for each row, {place}: say '
                f"plate={frame.name} where that is the plate of all rows, or put the site into {plate}."
            )
        if sizes - {frame.size}:
            return UserError(
                f'observed site "{name}" stands in plate "{frame.name}", {place}: keep all rows in {plate}, and say '
                "which of them the site is about with poutine.mask(mask=...) or torch.where (no boolean index)."
            )
    shapes = {tuple(other["fn"].event_shape) for other in others} - {tuple(site["fn"].event_shape)}
    if shapes and not isinstance(site["fn"], torch.distributions.Independent):
        return UserError(
            f'observed site "{name}" is one {type(site["fn"]).__name__} over all rows, {place}: only rows that are '
            f"independent given the latents can come in batches; write such a likelihood in {plate}, or make each "
            "whole series one row (svi shard group_by=COLUMN)."
        )
    return UserError(
        f'observed site "{name}" stands {place}, so it would not be scaled with the data: move it into {plate} with a '
        f"value for each row (plate=NAME for another plate), or name it in global_sites=[{name}] if it counts once."
    )
