"""Fits without an optimum: where a model meets its observations exactly, their spread goes to 0 and the density to
infinity, as for a constant column, or one that is a linear function of the others.

The spread of a distribution is compared with that of what it stands for: an sd with the sd of the column, in logarithms
where the support is positive. Shapes: B rows, D latents.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Independent, TransformedDistribution, constraints, transforms

from trainer.errors import UserError
from trainer.inference.guides.mean_field import Noise
from trainer.inference.model.latents import Site, is_discrete
from trainer.inference.model.plates import Batch, inside
from trainer.inference.step import Inference

_OF_FLOAT32, _OF_FLOAT64 = 1e-6, 1e-10  # of a column's spread: what rounding may leave of an exact value
_ROUNDING = 1e-12  # of its size, below which a column is constant
_MARGIN = math.log(10.0)
_FEW = 2048
_MOST_STEPS = 60  # of a factor of ten, in one latent
_FREE = (transforms.ExpTransform, transforms.SigmoidTransform, transforms.TanhTransform)
Loss = Callable[[Tensor], Tensor]


class Spread(NamedTuple):
    """Of an observed site."""

    what: str
    """The column, or the site where no column is observed as it stands."""
    spread: Tensor
    """[] log of the median row's, beside that of the values."""
    off: float
    """Log of how far the median row's value is from what is expected of it, beside the spread of the values."""
    numbers: int
    """A row's."""
    limit: float
    """Log of what rounding may leave."""
    constant: bool
    """Whether the values are."""

    @property
    def is_nothing(self) -> bool:
        """Whether the values are met and the spread is nothing beside theirs; a narrow prior makes it small alone."""
        return bool(self.spread <= self.limit) and self.off <= self.limit + _MARGIN

    def sentence(self, latent: str) -> str:
        """What is wrong, and what to do; ``latent``: what makes the spread."""
        if self.constant:
            told, remedy = "is constant", "leave it out"
        else:
            told = "is an exact function of the other columns"
            remedy = "look for a column that holds the target and for rows that repeat a few, leave it out"
        return (
            f"{self.what} {told}, so the density has no maximum: it grows without end as {latent} goes to its limit; "
            f"{remedy}, or fix {latent} at the precision of the measurement."
        )


class _Scale(NamedTuple):
    """The latent that makes most of an observed site's spread."""

    site: str
    latent: int
    """Its place among the D."""
    by_ten: float
    """How far it moves where the spread becomes ten times as large."""


def refuse_exact(
    inference: Inference, rows: Batch, at: Tensor, joint: Callable[[Inference, Batch], Loss],
    lowest: Callable[[Loss, Tensor], Tensor] | None,
) -> None:  # fmt: skip
    """Raises UserError where an observed site's spread is nothing at the latents ``at`` [D].

    ``joint(inference, rows)``: minus the log joint. ``lowest(loss, like)``, given where no mode is known: the place
    near 0, a tensor as ``like``, at which a loss is lowest; then also where minus the log joint falls without end as
    the spread goes to 0.
    """
    view = inference.gaussian
    assert view is not None
    at, few = at.detach().clone().requires_grad_(), _first(rows)
    for name, found in _spreads(inference, view.theta(at, 0.0 * at), few).items():
        if not found.spread.requires_grad:  # a known one
            continue
        (slope,) = torch.autograd.grad(found.spread, at, retain_graph=True, allow_unused=True)
        if slope is None or not slope.isfinite().all() or not slope.any():
            continue
        latent = int(slope.abs().argmax())
        scale = _Scale(name, latent, math.log(10.0) / float(slope[latent]))
        if inference.num_obs * found.numbers < len(at):  # fewer than the latents: their priors hold the density
            continue
        exact = found.is_nothing
        if not exact and lowest is not None and inference.num_obs >= len(at):  # else each row may have a latent
            exact = all(
                _falls(inference, some, joint(inference, some), at.detach(), lowest, scale) for some in (few, rows)
            )
        if exact:
            raise UserError(found.sentence(f'"{view.latent_name(latent)}"'))


def met_exactly(inference: Inference, theta: Tensor, rows: Batch) -> str | None:
    """A sentence where at ``theta`` [P] an observed site's spread is nothing beside that of its values."""
    few = _first(rows)
    with torch.no_grad():
        found = _spreads(inference, theta, few).values()
    return next((each.sentence("its scale") for each in found if each.is_nothing), None)


def _falls(
    inference: Inference, rows: Batch, loss: Loss, at: Tensor, lowest: Callable[[Loss, Tensor], Tensor], scale: _Scale
) -> bool:
    """Whether the loss is lower each time that ``scale`` takes the spread down by ten, until that is nothing."""
    view = inference.gaussian
    assert view is not None
    free = torch.ones_like(at)
    free[scale.latent] = 0.0
    least = float(loss(at))
    for _ in range(_MOST_STEPS):
        with torch.no_grad():
            if _spreads(inference, view.theta(at, 0.0 * at), rows)[scale.site].is_nothing:
                return True
        moved = at.clone()
        moved[scale.latent] -= scale.by_ten
        at = moved + free * lowest(lambda change: loss(moved + free * change), at)  # noqa: B023
        before, least = least, float(loss(at))
        if not least < before:
            return False
    return False


def _first(rows: Batch) -> Batch:
    """A few of ``rows``, on which most models are seen not to be exact."""
    count = min(_FEW, int(rows.batch_rows))
    columns = {name: column[0][:count][None] for name, column in rows.columns.items()}
    number = torch.tensor(count, device=rows.batch_rows.device)
    return Batch(columns, number[None], number, None if rows.row_id is None else rows.row_id[:, :count])


def _is_coarse(column: Any) -> bool:
    """Whether it holds fractions as float32 does."""
    if not isinstance(column, Tensor) or not column.is_floating_point():
        return False
    return bool((column == column.float()).all()) and bool((column != column.round()).any())


def _spreads(inference: Inference, theta: Tensor, rows: Batch) -> dict[str, Spread]:
    """Of the observed sites in the data plate whose distribution has one."""
    dtype = theta.dtype if inference.wide else torch.float32
    theta = theta.to(dtype)
    columns = {name: c[0].to(dtype) if c.is_floating_point() else c[0] for name, c in rows.columns.items()}
    batch = rows.slot(0)._replace(columns=columns, num_obs=inference.num_obs)
    elements, per_row = inference.guide.noise_size
    noise = Noise(theta.new_zeros(elements), theta.new_zeros(batch.size, per_row) if per_row else None, 0)

    def trace(params: dict[str, Tensor]) -> poutine.Trace:
        return inference.guide.draw(inference.model, params, noise, batch, "monte_carlo").trace

    with pyro.validation_enabled(False):
        nodes = inference.parameters.call(inference.parameters.unflatten(theta), trace).nodes
    observed = [name for name, kind in zip(inference.sites, inference.kinds) if kind == "likelihood" and name in nodes]
    here = [name for name in observed if inside(nodes[name], inference.model.plate)]
    made = {name: _relative(nodes[name], columns, not inference.wide) for name in here}
    return {name: each for name, each in made.items() if each is not None}


def _relative(site: Site, columns: dict[str, Any], narrow: bool) -> Spread | None:
    """``narrow``: whether the model computes in float32."""
    fn, value = site["fn"], site["value"]
    same = (n for n, each in columns.items() if isinstance(each, Tensor) and torch.equal(each.to(value), value))
    column = next(same, None)
    while True:
        if isinstance(fn, Independent) or hasattr(fn, "_mask"):
            fn = fn.base_dist
        elif isinstance(fn, TransformedDistribution) and all(isinstance(each, _FREE) for each in fn.transforms):
            for each in reversed(fn.transforms):
                value = each.inv(value)
            fn = fn.base_dist
        else:
            break
    spread = None if is_discrete(fn) or isinstance(fn, pyro.distributions.Delta) else _spread(fn)
    if spread is None or value.dim() == 0 or not value.is_floating_point():
        return None
    value, center = value.double(), _center(fn, value).double()
    positive = isinstance(fn.support, type(constraints.positive)) or fn.support is constraints.nonnegative
    if positive:
        spread, value, center = spread / center.abs(), value.log(), center.log()
    deviation, size = value.std(0, correction=0), value.abs().amax(0)
    constant = deviation <= _ROUNDING * size
    whole = torch.ones_like(size) if positive else torch.where(size > 0, size, 1.0)
    beside = torch.where(constant, whole, deviation)
    median = _median(spread / beside, value)
    least = median.argmin()
    off = _median((value - center).abs() / beside, value)[least].detach()
    coarse = narrow or any(map(_is_coarse, columns.values() if column is None else [columns[column]]))
    limit = math.log(_OF_FLOAT32 if coarse else _OF_FLOAT64)
    what = f'what is observed at site "{site["name"]}"' if column is None else f'column "{column}"'
    numbers = value[0].numel()
    return Spread(what, median[least].log(), float(off.log()), numbers, limit, bool(constant.reshape(-1)[least]))


def _median(each: Tensor, like: Tensor) -> Tensor:
    """Over the rows, of every number of a row."""
    return each.expand_as(like).reshape(len(like), -1).median(0).values


def _center(fn: Any, value: Tensor) -> Tensor:
    """The mean of a distribution, or its location where it has none; ``value`` where it has neither."""
    try:
        mean = fn.mean
    except (NotImplementedError, AttributeError):
        mean = None
    center = mean if mean is not None and mean.isfinite().all() else getattr(fn, "loc", value)
    return center if isinstance(center, Tensor) else value


def _spread(fn: Any) -> Tensor | None:
    """The sd of a distribution, or its scale where it has none."""
    try:
        spread = fn.variance.sqrt()
    except (NotImplementedError, AttributeError):
        spread = None
    if spread is None or not spread.isfinite().all():
        spread = getattr(fn, "scale", None)
    return spread if isinstance(spread, Tensor) else None
