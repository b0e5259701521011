"""A model whose latents of rows are integrated out: what is left to a guide are its latents outside the data plate.

At each draw of these the density of a row is a number, log p(y_i | z): discrete latents of the row are summed out
(Pyro's enumeration; Obermeyer, Bingham, Jankowiak, Chiu, Pradhan, Rush and Goodman, "Tensor variable elimination for
plated factor graphs", ICML 2019), continuous ones integrated (`trainer.inference.rows.integral`). Nothing is kept of a
row, so the number of rows costs no memory, and the rest of the program sees a model without latents of rows.

Shapes: B rows, d continuous numbers of a row.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from trainer.inference.model.latents import (
    AtZero,
    FromUnconstrained,
    by_row,
    is_deterministic,
    is_latent,
    log_prob,
    masked,
)
from trainer.inference.model.plates import Batch, DataPlate, PlatedModel, inside
from trainer.inference.model.written import Written
from trainer.inference.rows.entries import of_real_entries
from trainer.inference.rows.integral import (
    Fineness,
    Nodes,
    around_the_mode,
    log_gaussian_integral,
    log_integral,
    nodes_of,
)
from trainer.inference.rows.mean_field import log_bound, nodes_of_mean
from trainer.inference.rows.memory import largest
from trainer.inference.rows.options import DEFAULT, RowOptions
from trainer.inference.rows.quadratic import is_quadratic
from trainer.inference.rows.sites import AtFirst, NotIntegrable, RowSites, row_sites
from trainer.inference.rows.sums import NONE, Enumerated, summed_out

Columns = Mapping[str, Any]
Globals = dict[str, Tensor]
_FEW_STATES = 2**12  # joint states of a row, for which memory need not care
_FEW, _BYTES_OF_A_ROW = 16, 1024  # rows that are measured; what one without latents writes
_MANY, _OF_A_NUMBER = 2**14, 64  # numbers of a row for which memory is not tried, and bytes for each
_EVALUATIONS, _OF_A_GAUSSIAN, _OF_A_BOUND = 20, 5, 60  # of the model, for the modes and the integrals of the rows


class Marginal:
    """The model ``fn`` as a callable of its columns, its latents of rows integrated out.

    ``fineness``: None: as before anything is measured.
    """

    def __init__(self, fn: Callable[..., Any], plate: str, sites: RowSites, fineness: Fineness | None = None):
        self.generative, self.plate, self.sites = fn, plate, sites
        self.refine(fineness or Fineness.at_first(sites.size))
        self.site = "+".join(sites.observed)
        """The site that stands for the observed ones."""
        self.gaussian = False
        """Whether the integral is known in closed form."""

    def refine(self, fineness: Fineness) -> None:
        """Integrates so finely from now on."""
        self.fineness = fineness
        of_fineness = nodes_of_mean if self.sites.bound else nodes_of
        self.nodes = of_fineness(fineness, torch.zeros((), dtype=torch.float64))

    def __call__(self, **columns: Any) -> None:
        density = self.log_density(columns, self.of_globals(**columns))
        with pyro.plate(self.plate, len(density)):
            pyro.factor(self.site, density)

    def of_globals(self, **columns: Any) -> Globals:
        """What stands outside the data plate, and what the guide holds of the rows; gives the values of latents."""
        rows = rows_of(columns)
        outside = _Outside(self.plate, self.sites.kept, rows)
        with outside, AtFirst(self.plate, outside=False), DataPlate(self.plate, rows):
            self.generative(**columns)
        return outside.values

    def log_density(self, columns: Columns, at: Globals) -> Tensor:
        """log p(y_i | z) [B] at the latents ``at`` outside the data plate."""
        if not self.sites.continuous:
            return self.joint(columns, at)
        still, start = {name: value.detach() for name, value in at.items()}, self._zeros(rows_of(columns))
        if self.gaussian:
            return log_gaussian_integral(
                lambda u: self.joint(columns, still, u), lambda u: self.joint(columns, at, u), start
            )
        nodes = Nodes(self.nodes.at.to(start), self.nodes.log_weights.to(start))
        normal = around_the_mode(lambda u: self.joint(columns, still, u), start, self.fineness.steps)
        if self.sites.bound:
            return log_bound(
                lambda u: self.joint(columns, still, u), lambda u: self.joint(columns, at, u), normal, nodes
            )
        return log_integral(lambda u: self.joint(columns, at, u), normal, nodes)

    def look(self, columns: Columns) -> None:
        """Finds out whether the rows' densities are Gaussian in their own numbers."""
        if self.sites.continuous and not self.sites.discrete and not self.sites.bound:
            rows = rows_of(columns)
            with poutine.block(), AtZero(rows.dtype, rows.valid.device):
                at = self.of_globals(**columns)
                self.gaussian = is_quadratic(lambda u: self.joint(columns, at, u), self._zeros(rows))

    def written(self, columns: Columns) -> int:
        """Bytes that the density of a row writes."""
        rows = rows_of(columns)
        with poutine.block(), AtZero(rows.dtype, rows.valid.device), Written() as made, torch.no_grad():
            self.log_density(columns, self.of_globals(**columns))
        written: int = made.bytes // rows.size
        return written

    def numbers(self, columns: Columns) -> int:
        """How many the tensors have for a row while states are enumerated; 1 where a row has few."""
        if self.sites.states <= _FEW_STATES:
            return 1
        some = rows_of(columns)
        some = some.at(torch.arange(2) % some.size)
        with poutine.block(), AtZero(some.dtype, some.valid.device):
            at = self.of_globals(**some.columns)
            with AtFirst(self.plate):  # what distributions keep of themselves is made of values
                poutine.trace(self.generative).get_trace(**some.columns).compute_log_prob()
        return largest(lambda: self.joint(some.columns, at, self._zeros(some))) // some.size

    def _zeros(self, rows: Batch) -> Tensor:
        return torch.zeros(rows.size, self.sites.size, dtype=rows.dtype, device=rows.valid.device)

    def joint(self, columns: Columns, at: Globals, u: Tensor | None = None) -> Tensor:
        """log p(y_i, u_i | z) [B], discrete latents summed out; [S B] for the rows' ``u`` [S B, d] S times over."""
        rows = rows_of(columns)
        if u is not None and len(u) != rows.size:
            columns = {**columns, **rows.at(torch.arange(len(u), device=u.device) % rows.size).columns}
        return self.density(self.factors(columns, at, u), rows_of(columns).size)

    def density(self, trace: poutine.Trace, rows: int, tilts: Mapping[str, Tensor] = NONE) -> Tensor:
        """`joint` by what `factors` gives; ``tilts``: as `summed_out` takes them."""
        if self.sites.discrete:
            return summed_out(trace, self.plate, rows, tilts)
        return torch.stack([by_row(site["log_prob"], site, self.plate) for site in trace.nodes.values()]).sum(0)

    def factors(self, columns: Columns, at: Globals, u: Tensor | None = None) -> poutine.Trace:
        """The sites of the rows alone, each with its ``log_prob`` at every state of the discrete ones."""
        given = FromUnconstrained({} if u is None else {each.name: each.of(u) for each in self.sites.continuous})
        enumerated = bool(self.sites.discrete)
        model = config_enumerate(self.generative, default="parallel") if enumerated else self.generative
        with (
            poutine.block(hide_fn=lambda site: site["type"] == "sample"),
            poutine.trace() as tracer,
            Enumerated(first_available_dim=-1 - self.sites.nesting) if enumerated else nullcontext(),
            given,
            _Values(at),
            DataPlate(self.plate, rows_of(columns)),
        ):
            model(**columns)
        trace = tracer.trace
        for name, site in list(trace.nodes.items()):
            is_site = site["type"] == "sample" and not isinstance(site["fn"], _Subsample)
            if not is_site or not inside(site, self.plate) or name in self.sites.kept:
                trace.remove_node(name)
                continue
            value = log_prob(site)
            if name in given.jacobian:
                value = value + given.jacobian[name]
            if name in given.u:
                value = of_real_entries(site, value, given.u[name])
            # A latent that is masked is still somewhere, so it keeps its density.
            site["log_prob"] = masked(value, site["mask"] if site["is_observed"] else None) * site["scale"]
        return trace


class MarginalModel(PlatedModel):
    """A model without its latents of rows."""

    def __init__(self, model: PlatedModel, batch: Batch, sites: RowSites, options: RowOptions):
        first = Fineness.at_first(sites.size, options.nodes, options.row_draws)
        self._marginal = marginal = Marginal(model.fn, model.plate, sites, first)
        super().__init__(marginal, batch.columns, model.plate, like=model.fn)
        marginal.look({name: batch.columns[name] for name in self.own if name in batch.columns})
        self.sites = sites
        self._written, self._nodes = 0, len(marginal.nodes.at)
        with suppress(Exception):  # of the model, as the checks that follow say
            self.numbers = max(1, marginal.numbers({n: batch.columns[n] for n in self.own if n in batch.columns}))
            self._written = self.numbers * _OF_A_NUMBER
            if self.numbers < _MANY:
                few = batch.at(torch.arange(min(batch.size, _FEW)))
                self._written = marginal.written({name: few.columns[name] for name in self.own if name in few.columns})
        of_rows = _OF_A_GAUSSIAN if marginal.gaussian else _OF_A_BOUND if sites.bound else _EVALUATIONS
        self._evaluations = of_rows if sites.continuous else 1
        self._of_globals = PlatedModel(marginal.of_globals, batch.columns, model.plate, like=model.fn)
        self._generative = model
        self._at_first = PlatedModel(AtFirst(model.plate)(model.fn), batch.columns, model.plate)

    @property
    def evaluations(self) -> int:
        return self._evaluations

    @property
    def copies(self) -> int:
        return max(1, self._written * len(self._marginal.nodes.at) // self._nodes // _BYTES_OF_A_ROW)

    @property
    def fineness(self) -> Fineness | None:
        return self._marginal.fineness if self.sites.continuous and not self._marginal.gaussian else None

    def refine(self, fineness: Sequence[int] | None) -> None:
        if fineness is not None:
            self._marginal.refine(Fineness(*fineness))

    @property
    def generative(self) -> PlatedModel:
        return self._generative

    @property
    def of_globals(self) -> PlatedModel:
        return self._of_globals

    @property
    def at_first(self) -> PlatedModel:
        return self._at_first


def without_latents_of_rows(
    model: PlatedModel, batch: Batch, guide_holds: bool = False, options: RowOptions = DEFAULT
) -> PlatedModel:
    """``model`` with its latents of rows integrated out, or as it is where it has none or cannot run.

    ``guide_holds``: but the continuous ones, which are the guide's; so do those stay that an encoder is to hold. Raises
    NotIntegrable for what cannot be, and UserError for ``options`` that say nothing of the model.
    """
    try:
        sites = row_sites(model, batch)
    except NotIntegrable:
        raise
    except Exception:  # of the model, as the checks that follow say
        return model
    encoded = not guide_holds and options.encodes(sites.size)
    options.refuse_unused([each.name for each in sites.continuous if guide_holds], sites.size)
    if guide_holds or encoded:
        sites = sites.left_to_the_guide()
    sites.refuse_many()
    sites = replace(sites, bound=options.rows == "mean_field" and bool(sites.continuous))
    found = MarginalModel(model, batch, sites, options) if sites and sites.observed else model
    found.encoded = sites.held if encoded else ()
    return found


def rows_of(columns: Columns) -> Batch:
    """The rows of the columns that there are."""
    return Batch.whole({name: value for name, value in columns.items() if value is not None})


class _Outside(AtZero):
    """Keeps what stands inside the data plate from the handlers around, and notes the values of other latents."""

    def __init__(self, plate: str, kept: Container[str], rows: Batch):
        super().__init__(rows.dtype, rows.valid.device)
        self.plate, self.kept = plate, kept
        self.values: Globals = {}

    def _pyro_sample(self, msg: Message[..., Any]) -> None:
        if isinstance(msg["fn"], _Subsample):
            msg["stop"] = msg["name"] == self.plate
        elif inside(msg, self.plate) and msg["name"] not in self.kept:
            msg["stop"] = True
            super()._pyro_sample(msg)

    def _pyro_post_sample(self, msg: Message[..., Any]) -> None:
        known = not inside(msg, self.plate) or msg["name"] in self.kept
        if is_latent(msg) and known and not is_deterministic(msg):
            self.values[str(msg["name"])] = msg["value"]  # type: ignore[assignment]


class _Values(Messenger):
    """Gives latents outside the data plate, and those that the guide holds, their values."""

    def __init__(self, at: Globals):
        super().__init__()
        self.at = at

    def _pyro_sample(self, msg: Message[..., Any]) -> None:
        if msg["name"] in self.at and not msg["is_observed"]:
            msg["value"], msg["done"] = self.at[str(msg["name"])], True
