"""From the user's callables and one batch to an `Inference` with its first parameters; nothing is trained before."""

import functools
import inspect
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoGuideList, AutoLaplaceApproximation
from pyro.poutine.block_messenger import BlockMessenger
from torch import Tensor

from trainer.errors import UserError, meant
from trainer.inference.checks.coupled import check_states
from trainer.inference.checks.enumeration import LEAST_ROWS, refuse_large
from trainer.inference.checks.model_checks import (
    check_exchangeable,
    check_finite,
    check_model,
    is_finite,
    on_the_first_batch,
    refuse_batch_norm,
)
from trainer.inference.checks.observed import RowCheck, with_parameters
from trainer.inference.checks.padding import check_padding
from trainer.inference.checks.row_densities import check_row_densities
from trainer.inference.guides.arrow import Arrow
from trainer.inference.guides.auto_laplace import Laplace, LaplaceOfGlobals
from trainer.inference.guides.block import Block
from trainer.inference.guides.by_site import BySite
from trainer.inference.guides.discrete import WithStates, states_of_model
from trainer.inference.guides.encoded import Encoded
from trainer.inference.guides.encoder import facts_of
from trainer.inference.guides.full_rank import FullRank
from trainer.inference.guides.low_rank import LowRank
from trainer.inference.guides.mean_field import Guide, MeanField, Noise
from trainer.inference.guides.point import Point
from trainer.inference.guides.pyro_guides import PyroGuide, is_autoguide, no_guide
from trainer.inference.model.arguments import unwrapped
from trainer.inference.model.latents import has_latents
from trainer.inference.model.noise_mode import AtMean
from trainer.inference.model.parameters import Parameters
from trainer.inference.model.plates import Batch, PlatedModel
from trainer.inference.objectives.elbo import elbo_terms
from trainer.inference.objectives.objective import Objective
from trainer.inference.rows.entries import OfEntries, as_given, with_entries
from trainer.inference.rows.lists import with_lists
from trainer.inference.rows.marginal import without_latents_of_rows
from trainer.inference.rows.options import DEFAULT, RowOptions
from trainer.inference.rows.sites import AtFirst
from trainer.inference.step import Inference, in_dtype

GuideFactory = Callable[[PlatedModel, Batch], Guide]

_NOTHING = (
    "the model has neither a latent site nor a parameter: add a pyro.sample without obs=, or a pyro.param.",
    "neither guide nor model has a parameter to train: give the guide a pyro.param.",
)
_FEWER_STATES = "give them fewer states, or sum some of them out in the model (dist.MixtureSameFamily, DiscreteHMM)"
_OF_ROWS_ALONE = (
    "all latents are of rows, which are integrated out, so nothing is left to learn: give what they have in common "
    '(their mean, their spread) a prior outside plate "data".'
)


def is_family(guide: Any) -> bool:
    """Whether ``guide`` is a class that keeps to `Guide`, and so is made of the plated model and a batch."""
    return inspect.isclass(guide) and all(hasattr(guide, name) for name in ("setup", "draw", "gaussian", "ended"))


def of_family(family: GuideFactory, plated: PlatedModel, batch: Batch) -> Guide:
    """A guide of such a class, or the empty one where the model has no latent: maximum likelihood."""
    if not has_latents(plated, batch):
        return PyroGuide(PlatedModel(no_guide, (), plated.plate), plated.plate)
    states, others = states_of_model(plated, batch)
    if not states:
        return family(plated, batch)
    with AtFirst(plated.plate):
        return WithStates(states, family(plated, batch) if others else None)


@dataclass(frozen=True)
class OfGlobals:
    """Makes a guide of latents outside the data plate, so that those of rows have to be integrated out."""

    make: GuideFactory
    can_be_empty: bool = False

    def of_globals(self, model: Any) -> bool:
        return True

    def __call__(self, plated: PlatedModel, batch: Batch) -> Guide:
        if plated.sites is not None and not self.can_be_empty and not has_latents(plated, batch):
            raise UserError(_OF_ROWS_ALONE)
        return self.make(plated, batch)


FAMILIES: dict[str, Callable[..., Guide]] = {
    "mean_field": MeanField,
    "full_rank": FullRank,
    "block": Block,
    "low_rank": LowRank,
    "by_site": BySite,
    "arrow": Arrow,
    "point": Point,
    "laplace": LaplaceOfGlobals,
}
"""The guides that have a name."""

mean_field: GuideFactory = OfGlobals(functools.partial(of_family, MeanField), can_be_empty=True)
"""Makes the default guide."""


def guide_factory(guide: Any, columns: Iterable[str], plate: str = "data") -> GuideFactory:
    """What makes the guide: a name of `FAMILIES`, the class of a family, a guide of Pyro's (a class or an instance), or
    the user's, any callable; also one that makes a guide of the model, as ``lambda model: AutoNormal(model)``.

    Raises UserError for another name.
    """
    guide = FAMILIES.get(guide, guide) if isinstance(guide, str) else guide
    if isinstance(guide, str) or not callable(guide):
        known = meant(str(guide), FAMILIES, f"there are {', '.join(FAMILIES)}")
        raise UserError(
            f"guide={guide} is unknown ({known}): give one of these, one of pyro.infer.autoguide, or your own guide."
        )
    made = guide.func if isinstance(guide, functools.partial) else guide
    guide = made if isinstance(guide, functools.partial) and not (guide.args or guide.keywords) else guide
    if is_family(made):
        return OfGlobals(functools.partial(of_family, guide), can_be_empty=True)
    if inspect.isclass(made) and is_autoguide(made):
        return OfGlobals(lambda plated, _: _of_autoguide(guide(plated.fn), plated.fn, columns, plate))
    if is_autoguide(guide):
        return OfGlobals(lambda plated, _: _of_autoguide(_of_model(guide, plated), guide.model, columns, plate))
    return OfCallable(guide, tuple(columns), plate)


def _is_of_globals(guide: GuideFactory, model: Any) -> bool:
    """Whether it makes a guide that holds no latent of a row of ``model``."""
    told = getattr(guide, "of_globals", None)
    return is_family(guide) or (told is not None and told(model))


@dataclass(frozen=True)
class OfCallable:
    """Makes the guide of the user's ``guide``, or of what it makes of the model."""

    guide: Any
    columns: tuple[str, ...]
    plate: str

    def __call__(self, plated: PlatedModel, batch: Batch) -> Guide:
        made = self._made(plated.fn)
        if is_autoguide(made):
            return _of_autoguide(made, made.model, self.columns, self.plate)
        fn = made if callable(made) else self.guide
        if isinstance(plated.generative.fn, OfEntries):
            fn = type(plated.generative.fn)(fn, self.plate)
        return PyroGuide(PlatedModel(fn, self.columns, self.plate, what="guide"), self.plate)

    def of_globals(self, model: Any) -> bool:
        """Whether it makes one of Pyro's guides, which hold no latent of a row, of ``model``."""
        made = self._made(model)
        return is_autoguide(made) and not isinstance(made, AutoGuideList)

    def _made(self, model: Any) -> Any:
        """What it makes of ``model``, if it has one argument to give it, and that is not a column."""
        if isinstance(self.guide, torch.nn.Module):
            return None
        taken = inspect.signature(self.guide).parameters.values()
        needed = [each.name for each in taken if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
        if len(needed) != 1 or any(each.name in self.columns for each in taken):
            return None
        with suppress(Exception), poutine.block():
            return self.guide(model)
        return None


def _of_model(guide: AutoGuide, plated: PlatedModel) -> AutoGuide:
    """``guide``, or its like for ``plated`` where latents of rows of its own model are integrated out."""
    (model, handlers), fn = unwrapped(guide.model), plated.fn
    if plated.sites is None or model is not as_given(plated.generative.fn) or any(map(_hides, handlers)):
        return guide
    for handler in reversed(handlers):
        fn = handler(fn)
    made: AutoGuide = object.__new__(type(guide))  # a copy of Python's would take the model from both
    made.__dict__ = {**guide.__dict__, "_model": (fn,), "prototype_trace": None}
    return made


def _hides(handler: Any) -> bool:
    return isinstance(handler, BlockMessenger)


def _of_autoguide(made: Any, model: Any, columns: Iterable[str], plate: str) -> Guide:
    """The guide of an object of `pyro.infer.autoguide`, which takes the columns that ``model`` takes."""
    if isinstance(made, AutoLaplaceApproximation):
        return Laplace(made)
    return PyroGuide(PlatedModel(made, columns, plate, like=model), plate)


def set_up(  # noqa: PLR0913  all that a problem is, most of it by name
    model: Callable[..., Any],
    guide: GuideFactory,
    batch: Batch,
    num_obs: float,
    objective: Objective,
    *,
    plate: str = "data",
    global_sites: Iterable[str] = (),
    seed: int = 0,
    rows: RowOptions = DEFAULT,
    grouped: bool = False,
) -> tuple[Inference, Tensor]:
    """The inference problem and theta [P] at its start, checked on ``batch`` with Pyro's validation on.

    ``global_sites``: observed sites that may stand outside the data plate. ``rows``: how latents of rows are held.
    ``grouped``: whether rows were packed in groups, of which `length` has the sizes. Raises UserError for what cannot
    be right.
    """
    plated, of_globals = PlatedModel(model, batch.columns, plate), _is_of_globals(guide, model)
    torch.manual_seed(seed)
    made: list[Guide] = []
    derived: list[str] = []

    def run() -> tuple[dict[str, Tensor], tuple[Any, ...]]:
        nonlocal plated, rows
        plated = with_lists(with_entries(plated, batch), batch)
        plated = without_latents_of_rows(plated, batch, guide_holds=not of_globals, options=rows)
        refuse_large(plated, int(min(num_obs, LEAST_ROWS)), batch.dtype, _FEWER_STATES)
        check_row_densities(plated, batch)
        with AtFirst(plate):
            derived.extend(check_model(plated, batch, tuple(global_sites)))
        own = {name: batch.columns[name] for name in plated.own}
        rows = replace(rows, facts=facts_of(own, rows.facts) if plated.encoded else {})
        made.append(Encoded(guide, plated, batch, rows) if plated.encoded else guide(plated, batch))
        return made[0].setup(plated, batch), (model, *made[0].callables)

    with pyro.validation_enabled(True), on_the_first_batch():
        parameters = Parameters.capture(run)
        refuse_batch_norm(parameters.modules)
        if not parameters.shapes and plated.sites is not None:
            raise UserError(_OF_ROWS_ALONE)
        if not parameters.shapes:
            raise UserError(_NOTHING[has_latents(plated, batch)])
        theta = parameters.flatten(parameters.initial).to(batch.dtype)
        fitted = made[0]

        def evaluate(at: Batch, dtype: torch.dtype = theta.dtype) -> Any:
            def terms(values: dict[str, Tensor]) -> Any:
                return elbo_terms(plated, fitted, values, _quiet_noise(fitted, at, theta.to(dtype)), at, objective.kl)

            return parameters.call(parameters.unflatten(theta.to(dtype)), terms)

        with torch.no_grad():
            first = evaluate(batch)
            if not is_finite(first):
                RowCheck(plated.at_first, with_parameters(parameters, theta)).refuse(batch, density=True)
            check_finite(first)
            with AtMean():
                check_exchangeable(evaluate, batch)
                if grouped:
                    check_padding(evaluate, batch)
                if plated.sites is not None and plated.sites.discrete:
                    parameters.call(parameters.unflatten(theta), lambda _: check_states(plated.generative, batch))
        wide = batch.dtype == torch.float64 or _computes_wide(evaluate, batch)
    kinds = tuple(term.kind for term in first.values())
    facts = tuple(first), kinds, wide, tuple(derived), rows
    return Inference(plated, fitted, parameters, objective, float(num_obs), *facts), theta


def _computes_wide(evaluate: Callable[..., Any], batch: Batch) -> bool:
    """Whether the model can be evaluated in float64: not where a matrix of its own is float32."""
    try:
        with in_dtype(torch.float64), torch.no_grad(), torch.random.fork_rng(devices=()):
            evaluate(batch.floats_as(torch.float64), torch.float64)
    except RuntimeError:
        return False
    return True


def _quiet_noise(guide: Guide, batch: Batch, theta: Tensor) -> Noise:
    """Noise of half a standard deviation everywhere: one fixed z for the checks."""
    elements, per_row = guide.noise_size
    rows = theta.new_full((batch.size, per_row), 0.5) if per_row else None
    return Noise(theta.new_full((elements,), 0.5), rows, 0)
