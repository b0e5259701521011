"""What is checked before the first step, on one batch, so that nothing wrong is trained in silence.

Every check raises `UserError` with the site's name and what to write instead.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.util import check_site_shape

from trainer.errors import UserError, counted, first_line
from trainer.inference.checks.cut_off import refuse_cut_off
from trainer.inference.checks.dependence import check_outside, site_per_row
from trainer.inference.checks.faults import observed
from trainer.inference.checks.observed import RowCheck
from trainer.inference.model.arguments import left_at_default
from trainer.inference.model.latents import (
    AtZero,
    Site,
    is_deterministic,
    is_discrete,
    is_latent,
    log_prob,
    refuse_latent,
)
from trainer.inference.model.plates import Batch, PlatedModel, WrongSize, inside
from trainer.inference.objectives.objective import Term

_CHECK_ROWS = 256
_WITH_FLOATS = "used as indices must|'indices' to have one|applicable to index tensor|Expected dtype int32.*for index"
_ALL_DIMS = 64  # as many as a tensor can have


@contextmanager
def on_the_first_batch() -> Iterator[None]:
    """What validation finds inside the model (a distribution refuses its parameters) as one sentence with the site."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        if str(error).startswith("Multiple "):
            told = first_line(error).rstrip(".")
            raise UserError(f"{told}: give each site and parameter a name of its own.") from error
        if "shape of the mask" in str(error):
            raise UserError(
                f"the model indexes with a column of truth values, which selects rows ({first_line(error)}): "
                "write effect[treated.long()] to look up a value for each row, or torch.where to choose between two."
            ) from error
        if not re.search(_WITH_FLOATS, str(error)):
            raise
        raise UserError(
            f"the model indexes with a column that is not of whole numbers ({first_line(error)}): give the column as "
            "integers (astype(int), where values are missing after missing=drop), or write effect[group.long()]."
        ) from error
    except ValueError as error:
        told, _, shapes = str(error).partition("Trace Shapes:")  # the table that Pyro adds to an error
        reached = re.findall(r"^ *(\S+) dist\b", shapes, re.MULTILINE)
        where = f' after site "{reached[-1]}"' if reached else ""
        why = first_line(ValueError(told)).removesuffix(", but found invalid values:")
        range_of = ": give what it is made of a prior or a transform (.exp(), softplus) that keeps to it"
        remedy = range_of if why.startswith("Expected parameter") else ""
        raise UserError(f"the model cannot be evaluated on its first batch{where}: {why}{remedy}.") from error


def check_model(model: PlatedModel, batch: Batch, global_sites: tuple[str, ...]) -> tuple[str, ...]:
    """Every observed site stands in the data plate, or counts once, and has values that it can; no latent of a row is
    discrete, and a gradient follows each that counts.

    Returns the deterministic sites that `check_outside` does.
    """
    try:
        with AtZero(batch.dtype, batch.valid.device):
            trace = _first_trace(model, batch)
    except (RuntimeError, IndexError, ValueError):
        RowCheck(model.at_first).refuse(batch, density=True, of_all=False)  # it may be the fault of some rows
        raise
    plate = model.plate
    for site in observed(trace, plate):
        _refuse_selected(site, plate)
    RowCheck(model.at_first).refuse(batch)
    sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
    seen = {name: site for name, site in sites.items() if site["is_observed"] and not is_deterministic(site)}
    if not seen:
        raise UserError(_nothing_observed(model, batch))
    for site in sites.values():
        if is_latent(site) and (inside(site, plate) or not is_discrete(site["fn"])):
            refuse_latent(site, plate, can_be_local=True)
    derived = check_outside(model, batch, global_sites)
    if not any(inside(site, plate) for site in seen.values()):
        raise UserError(
            f'the model has no plate "{plate}" with an observed site in it: put them in '
            f'`with pyro.plate("{plate}", len(x)):`, or name your own plate with plate=NAME.'
        )
    for site in seen.values():
        _check_shape(site)
    refuse_cut_off(model, batch)
    return derived


def _nothing_observed(model: PlatedModel, batch: Batch) -> str:
    absent = left_at_default(model.fn, batch.columns)
    if not absent:
        return "the model observes nothing: pass a column as obs= to one of its pyro.sample sites."
    are = "its argument {} is not a column" if len(absent) == 1 else "its arguments {} are no columns"
    return (
        f"the model observes nothing: {are.format(', '.join(absent))} of the data ({', '.join(batch.columns)}); rename "
        f"the column that it observes, or pack it with columns.{absent[-1]}=NAME."
    )


def _first_trace(model: PlatedModel, batch: Batch) -> poutine.Trace:
    """The model's trace. Raises UserError for a size or a loop that is not that of the batch."""
    tracer = poutine.trace(model)
    try:
        return tracer.get_trace(batch)
    except IndexError as error:
        sites = tracer.msngr.trace.nodes.items()
        names = [name for name, s in sites if s["type"] == "sample" and s["is_observed"] and not inside(s, model.plate)]
        if len(names) > 1 and f"size {batch.size}" in str(error):  # a loop over the rows of the table
            raise site_per_row(model, names) from error
        raise
    except ValueError as error:
        if "Shape mismatch inside plate" not in str(error):
            raise
        raise UserError(
            f"{first_line(error).rstrip('.')}: the last axis is that of the rows; declare several numbers of a row "
            "as one event with .to_event(1), and keep all rows (no boolean index): which ones a site is about say "
            "poutine.mask(mask=...) and torch.where."
        ) from error
    except WrongSize as error:
        halves = [batch.at(half) for half in torch.arange(int(batch.valid)).tensor_split(2)]
        sizes = [_size(model, half) for half in halves]
        if all(size == error.size for size in sizes):
            raise
        short = f'plate("{error.plate}") takes {error.size} rows where the batch has {error.rows}'
        if all(half.size - (size or half.size) == error.rows - error.size > 0 for half, size in zip(halves, sizes)):
            raise UserError(
                f"{short}, as a lag over the rows does: a row that depends on the one before it is not exchangeable; "
                "make a whole series one row (svi shard group_by=COLUMN), or pack the values before as columns."
            ) from None
        raise UserError(
            f"{short}, and its size changes with the data: do not select rows (by a boolean index), keep all of them "
            f'in pyro.plate("{error.plate}", len(x)), and say which ones a site is about with poutine.mask(mask=...) '
            "or torch.where."
        ) from None


def _size(model: PlatedModel, batch: Batch) -> int | None:
    """What the data plate is declared with, where that is not the batch's."""
    try:
        poutine.trace(model).get_trace(batch)
    except WrongSize as error:
        return error.size
    except (RuntimeError, IndexError, ValueError):
        pass
    return None


def _refuse_selected(site: Site, plate: str) -> None:
    """Raises UserError where an observed value is some of the rows of the data plate alone."""
    frame = next(frame for frame in site["cond_indep_stack"] if frame.name == plate)
    value, dim = site["value"], frame.dim - len(site["fn"].event_shape)
    rows = value.shape[dim] if value.dim() >= -dim else 1
    if rows not in (1, frame.size):
        raise UserError(
            f'site "{site["name"]}" observes {counted(rows, "row")} of the {frame.size} in plate "{plate}": keep all '
            "rows (no boolean index), and say which ones the site is about with poutine.mask(mask=...) or torch.where."
        )


def _check_shape(site: Site) -> None:
    """The batch shape of an observed site is that of its plates: not, say, [B, B] for a mean [B, 1] and data [B]."""
    density = log_prob(site)
    with_density: Any = {**site, "log_prob": density}
    try:
        check_site_shape(with_density, max_plate_nesting=_ALL_DIMS)
    except ValueError as error:
        if "log_prob shape" not in str(error):
            raise UserError(first_line(error)) from error
        drawn, value = [*site["fn"].batch_shape, *site["fn"].event_shape], list(site["value"].shape)
        remedy = (
            "give both one number per row, as x[:, 0] does of a column [N, 1]"
            if drawn != value
            else "declare the numbers of a row as one event with .to_event(1), or put them in a plate of their own"
        )
        raise UserError(
            f'site "{site["name"]}" has densities of shape {list(density.shape)}, which its plates are not: its '
            f"distribution is {drawn} and its value {value}; {remedy}."
        ) from error


def is_finite(terms: dict[str, Term]) -> bool:
    """Whether every term is."""
    return all(bool(torch.isfinite(term.value)) for term in terms.values())


def check_finite(terms: dict[str, Term]) -> None:
    """Every term at the start is finite."""
    bad = [name for name, term in terms.items() if not torch.isfinite(term.value)]
    if bad:
        sites = f"site {bad[0]}" if len(bad) == 1 else f"sites {', '.join(bad)}"
        raise UserError(
            f"the ELBO is not finite at the start, at {sites}: look for values outside the distribution's "
            "support (log of a negative number, a count below zero) or priors that are too wide."
        )


def refuse_batch_norm(modules: torch.nn.Module) -> None:
    """Raises UserError for a layer that normalizes by the rows that come together."""
    for name, module in modules.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            raise UserError(
                f'module "{name}" is a {type(module).__name__} in training mode, so the model is not exchangeable over '
                "rows: what it makes of a row depends on the others of its batch; take LayerNorm or leave it out, or "
                "give it in evaluation mode (.eval()) with the statistics that it has learned."
            )


def check_exchangeable(evaluate: Callable[[Batch], dict[str, Term]], batch: Batch) -> None:
    """At a fixed z the batch's log-likelihood is the sum of its halves' and does not change when rows are permuted.

    What a Markov chain, a model that centres its batch or a BatchNorm would fail.
    """
    rows = min(int(batch.valid), _CHECK_ROWS)
    if rows < 2:
        return

    def at(index: torch.Tensor) -> torch.Tensor:
        terms = [term.value for term in evaluate(batch.at(index)).values() if term.scaled]
        if not terms:
            raise UserError(
                "no site of the model stands in its data plate, so no row would count: put the observed sites into "
                '`with pyro.plate("data", len(x)):`, and name in global_sites only what is not a row of the data.'
            )
        return torch.stack(terms).sum()

    index = torch.arange(rows, device=batch.valid.device)
    whole, turned = at(index), at(index.flip(0).roll(rows // 3))
    # Several splits, since what a model takes from one half may by chance equal what it takes from the other.
    splits = [(index[: rows // n], index[rows // n :]) for n in (2, 3, 5) if rows >= n] + [(index[::2], index[1::2])]
    sums = [at(one) + at(other) for one, other in splits]
    apart = max(sums, key=lambda total: abs(float(total - whole)))
    # A row's own arithmetic differs by rounding alone; centring 256 rows of a weak model shows at 2e-5.
    tolerance = (1e-9 if batch.dtype == torch.float64 else 5e-6) * (1 + 2 * abs(whole))
    if abs(turned - whole) > tolerance or abs(apart - whole) > tolerance:
        raise UserError(
            f"the model is not exchangeable over rows: the log-likelihood of {rows} rows is {float(whole):.6g} nats, "
            f"{float(turned):.6g} with the rows permuted and {float(apart):.6g} as the sum of two parts; "
            "make a whole sequence or group one row (svi shard group_by=COLUMN), and take out what looks "
            "across the batch (centering, BatchNorm, dropout)."
        )


def finite_or_raise(values: dict[str, Any], step: int, rows: Sequence[int] = ()) -> None:
    """Raises FloatingPointError naming the sites whose ``values`` (floats) are not finite, the step, and the ids of the
    ``rows`` behind it.
    """
    bad = [name for name, value in values.items() if not torch.isfinite(torch.as_tensor(value)).all()]
    if bad:
        names, ids = ", ".join(bad), ", ".join(map(str, rows))
        remedy = f"look at row {ids} (row_id)" if rows else "look for extreme values in the data"
        raise FloatingPointError(f"not finite at step {step}: {names}; lower optimizer.lr, or {remedy}.")
