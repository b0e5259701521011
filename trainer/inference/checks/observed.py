"""Checks each row once: observed values lie in the support of their distributions, indices in the tables they index.

The model is evaluated without a gradient, with every latent at the image of u = 0. Where that is more than is needed,
since values and indices are columns as they stand, the columns alone are checked, or only their least and greatest
numbers. What a mask or a weight of 0 takes out of the likelihood may be anything.

Shapes: B rows of a batch.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import pyro
import torch
from pyro import poutine
from torch import Tensor

from trainer.errors import UserError, first_line
from trainer.inference.checks.faults import (
    Fault,
    by_row,
    counted,
    observed,
    of_lookup,
    of_weight,
    outside,
    row_dim,
    without_density,
)
from trainer.inference.checks.indices import Lookup, WatchIndices, always_fits
from trainer.inference.model.latents import AtZero
from trainer.inference.model.parameters import Parameters
from trainer.inference.model.plates import WEIGHT, Batch, PlatedModel
from trainer.inference.model.ragged import Column, parts
from trainer.inference.model.supports import holds, is_interval, support_of, supported, tensors_of

R = TypeVar("R")
_FEWEST_ROWS, _MOST_ROWS, _NUMBERS = 256, 65_536, 2**21  # evaluated at once: a row of an image takes much memory
_LEARN_ROWS, _PROBE_ROWS = 4096, 64
_OF_ROWS = (IndexError, RuntimeError, ValueError, AssertionError)
"""What a model may raise for the values of some rows."""

Call = Callable[[Callable[[], poutine.Trace], bool], poutine.Trace]
"""Calls a function with the model's parameters in place, which require a gradient where the flag says so."""


def with_parameters(parameters: Parameters, theta: Tensor) -> Call:
    """The parameters of ``theta`` [P]."""

    def call(run: Callable[[], poutine.Trace], with_gradient: bool) -> poutine.Trace:
        values = parameters.unflatten(theta.detach().requires_grad_(with_gradient))
        return parameters.call(values, lambda _: run())

    return call


RowIds = Callable[[list[int]], list[int]]
"""The row ids of rows at places in a batch."""


class RowCheck:
    """Refuses rows that cannot be right, by their row ids.

    ``bounds``: the least and the greatest number of each column that has them, over all rows.
    """

    def __init__(
        self,
        model: PlatedModel,
        call: Call = lambda run, _: run(),
        bounds: Mapping[str, tuple[float, float]] | None = None,
    ):
        self.model, self.call, self.bounds = model, call, bounds or {}
        self._varying: set[str] | None = None
        self._filters: dict[str, list[Callable[[Column], bool]]] | None = None

    def refuse(self, batch: Batch, row_id: RowIds | None = None, density: bool = False, of_all: bool = True) -> None:
        """Raises UserError for the first row of ``batch`` that is wrong; ``row_id``: of rows at places in the batch,
        where it does not have them.

        ``density``: also where the log density of what is observed is not finite; ``of_all``: in every row too, which
        is hardly the fault of rows.
        """
        together = _together(batch)
        for first in range(0, batch.size, together):
            for fault in self.faults(_rows(batch, slice(first, first + together)), density):
                if fault.of_all and not of_all:
                    continue
                places = [first + row for row in fault.rows]
                known = places if batch.row_id is None else batch.row_id[places].tolist()
                raise UserError(fault.sentence(row_id(places) if row_id else known))

    def learn(self, batch: Batch) -> None:
        """Finds out, from rows that are right, which columns of other rows have to be looked at, and how."""
        batch = _rows(batch, slice(0, min(_LEARN_ROWS, _together(batch))))
        trace, lookups = self._evaluate(batch)
        filters: dict[str, list[Callable[[Column], bool]]] = {}
        for site in observed(trace, self.model.plate):
            support, name = support_of(site["fn"]), column_of(site["value"], batch.columns)
            if support is None:
                continue
            if name is None or any(True for _ in tensors_of(support)):
                return  # the model has to be evaluated
            if not self._known(name, support, batch):
                filters.setdefault(name, []).append(partial(_all_hold, support))
        for lookup in lookups:
            name = lookup.column(batch.columns)
            if always_fits(lookup, None if name is None else batch.columns[name]):
                continue
            if name is None or not isinstance(batch.columns[name], Tensor):
                return
            low, high = self.bounds.get(name, (-1, lookup.size))
            if low < 0 or high >= lookup.size:
                filters.setdefault(name, []).append(partial(_all_within, 0, lookup.size - 1))
        if self.model.weighted and not self.bounds.get(WEIGHT, (-1, 0))[0] >= 0:
            filters.setdefault(WEIGHT, []).append(partial(_all_within, 0, math.inf))
        self._filters = filters

    def is_right(self, columns: Mapping[str, Column]) -> bool:
        """Whether the columns alone tell that all rows are right, however their rows are arranged."""
        if self._filters is None:
            return False
        return all(check(columns[name]) for name, checks in self._filters.items() for check in checks)

    def faults(self, batch: Batch, density: bool = False) -> Iterator[Fault]:
        """What is wrong with rows of ``batch``, one kind after the other."""
        if self.model.weighted:
            yield from of_weight(batch.columns[WEIGHT])
        try:
            trace, lookups = self._evaluate(batch)
        except _OF_ROWS as error:
            yield _failing(self._evaluate, batch, error)
            return
        used = torch.zeros(batch.size, dtype=torch.bool, device=batch.valid.device)
        sites = list(observed(trace, self.model.plate))
        for site in sites:
            dim = row_dim(site, self.model.plate)
            counts = counted(site)
            used |= by_row(counts, dim, batch.size).any(1)
            for fault in outside(site, counts, supported(site["fn"], site["value"]), dim, batch.size):
                if site["name"] not in self._of_latents(batch):
                    yield fault
        for lookup in lookups:
            yield from of_lookup(lookup, used if sites else ~used, batch.columns)
        for site in sites if density else ():
            for fault in without_density(site, row_dim(site, self.model.plate), batch.size):
                if site["name"] not in self._of_latents(batch):
                    yield fault

    def _evaluate(self, batch: Batch, with_gradient: bool = False) -> tuple[poutine.Trace, list[Lookup]]:
        device = batch.valid.device
        zero = AtZero(batch.dtype, device)
        zero.options["requires_grad"] = with_gradient

        def run() -> poutine.Trace:
            with zero:
                return poutine.trace(self.model).get_trace(batch)

        kept = torch.random.fork_rng([] if device.type == "cpu" else [device])
        watch = WatchIndices(batch.columns)
        with kept, torch.set_grad_enabled(with_gradient), pyro.validation_enabled(False), watch:
            return self.call(run, with_gradient), watch.found

    def _of_latents(self, batch: Batch) -> set[str]:
        """The sites whose support depends on latents: a value that is outside it here may be inside elsewhere."""
        if self._varying is None:
            trace, _ = self._evaluate(_rows(batch, slice(0, _PROBE_ROWS)), with_gradient=True)
            self._varying = {
                site["name"]
                for site in observed(trace, self.model.plate)
                if any(each.requires_grad for each in tensors_of(support_of(site["fn"])))
            }
        return self._varying

    def _known(self, name: str, support: Any, batch: Batch) -> bool:
        """Whether the least and the greatest number of a column tell that all of it lies in ``support``."""
        if name not in self.bounds or not is_interval(support):
            return False
        if support.is_discrete and batch.columns[name].is_floating_point():
            return False
        return bool(holds(support, torch.tensor(self.bounds[name], dtype=torch.float64)).all())


def with_lookups_checked(evaluate: Callable[[Batch], R], batch: Batch) -> R:
    """``evaluate(batch)``. Raises UserError for the first row whose index is out of range, or that fails alone."""
    try:
        with WatchIndices(batch.columns) as watch:
            made = evaluate(batch)
        every = torch.ones(batch.size, dtype=torch.bool, device=batch.valid.device)
        found = (fault for lookup in watch.found for fault in of_lookup(lookup, every, batch.columns))
        fault = next(found, None)
    except _OF_ROWS as error:
        fault = _failing(evaluate, batch, error)
    if fault is not None:
        raise UserError(fault.sentence([row if batch.row_id is None else int(batch.row_id[row]) for row in fault.rows]))
    return made


def _failing(evaluate: Callable[[Batch], Any], batch: Batch, error: Exception) -> Fault:
    """The first row at which the model cannot be evaluated. Raises ``error`` where it is not for some rows."""

    def fails(rows: list[int]) -> Exception | None:
        try:
            evaluate(batch.at(torch.tensor(rows, device=batch.valid.device)))
        except _OF_ROWS as found:
            return found
        return None

    rows = list(range(batch.size))
    if fails(rows[:1]) and fails(rows[-1:]):
        raise error
    while len(rows) > 1:
        half = rows[: len(rows) // 2]
        rows = half if fails(half) else rows[len(half) :]
    alone = fails(rows)
    if alone is None:
        raise error
    return Fault(rows, "the model cannot be evaluated", f" ({first_line(alone)})", "correct the row, or drop it")


def _all_hold(support: Any, column: Tensor) -> bool:
    return bool(holds(support, column).all())


def _all_within(low: float, high: float, column: Tensor) -> bool:
    return bool(((column >= low) & (column <= high)).all())


def column_of(value: Tensor, columns: Mapping[str, Column]) -> str | None:
    """The column that an observed value is."""
    for name, column in columns.items():
        flat = column.reshape(-1) if isinstance(column, Tensor) else value.new_empty(0)
        if len(flat) == value.numel() and bool((flat == value.reshape(-1)).all()):
            return name
    return None


def _together(batch: Batch) -> int:
    """How many rows are evaluated at once."""
    numbers = sum(each.numel() for column in batch.columns.values() for each in parts(column))
    return max(_FEWEST_ROWS, min(_MOST_ROWS, _NUMBERS * batch.size // max(numbers, 1)))


def _rows(batch: Batch, rows: Any) -> Batch:
    """Some rows of a batch."""
    columns = {name: column[rows] for name, column in batch.columns.items()}
    count = len(next(iter(columns.values())))
    row_id = None if batch.row_id is None else batch.row_id[rows]
    return batch._replace(columns=columns, valid=batch.valid.new_tensor(count), row_id=row_id)
