"""From the user's callables and one batch to an `Inference` with its first parameters; nothing is trained before."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from trainer.errors import UserError
from trainer.svi.checks import check_exchangeable, check_finite, check_model, on_the_first_batch
from trainer.svi.guides import Guide, MeanField, Noise, PyroGuide
from trainer.svi.objective import Objective, elbo_terms
from trainer.svi.parameters import Parameters
from trainer.svi.plates import Batch, PlatedModel
from trainer.svi.step import Inference

GuideFactory = Callable[[PlatedModel, Batch], Guide]


def guide_factory(guide: Any, columns: Iterable[str], plate: str = "data") -> GuideFactory:
    """What makes the guide: "mean_field", a class of Pyro's autoguides, or a guide of the user's, any callable.

    Raises UserError for another name.
    """
    if guide in ("mean_field", MeanField):
        return MeanField
    if isinstance(guide, str) or not callable(guide):
        raise UserError(f"guide={guide} is unknown: give mean_field, one of pyro.infer.autoguide, or your own guide.")
    made = guide.func if isinstance(guide, functools.partial) else guide
    if inspect.isclass(made) and issubclass(made, AutoGuide):
        return lambda plated, batch: PyroGuide(guide(plated), plate)
    return lambda plated, batch: PyroGuide(PlatedModel(guide, columns, plate), plate)


def materialise(
    model: Callable[..., Any],
    guide: GuideFactory,
    batch: Batch,
    num_obs: float,
    objective: Objective,
    *,
    plate: str = "data",
    global_sites: Iterable[str] = (),
    seed: int = 0,
) -> tuple[Inference, Tensor]:
    """The inference problem and theta [P] at its start, checked on ``batch`` with Pyro's validation on.

    ``global_sites``: observed sites that may stand outside the data plate. Raises UserError for what cannot be right.
    """
    plated = PlatedModel(model, batch.columns, plate)
    torch.manual_seed(seed)
    made: list[Guide] = []
    derived: list[str] = []

    def run() -> tuple[dict[str, Tensor], tuple[Any, ...]]:
        derived.extend(check_model(plated, batch, tuple(global_sites)))
        made.append(guide(plated, batch))
        if isinstance(made[0], PyroGuide):
            made[0].measure(plated, batch)
            inner = made[0].guide
            return {}, (model, inner.fn if isinstance(inner, PlatedModel) else inner)
        return (made[0].init() if isinstance(made[0], MeanField) else {}), (model,)

    with pyro.validation_enabled(True), on_the_first_batch():
        parameters = Parameters.capture(run)
        if not parameters.shapes:
            raise UserError("neither guide nor model has a parameter to train: give the guide a pyro.param.")
        theta = parameters.flatten(parameters.initial).to(batch.dtype)
        fitted = made[0]

        def evaluate(at: Batch) -> Any:
            def terms(values: dict[str, Tensor]) -> Any:
                return elbo_terms(plated, fitted, values, _quiet_noise(fitted, at, theta), at, objective.kl)

            return parameters.call(parameters.unflatten(theta), terms)

        with torch.no_grad():
            first = evaluate(batch)
            check_finite(first)
            check_exchangeable(evaluate, batch)
    kinds = tuple(term.kind for term in first.values())
    return Inference(plated, fitted, parameters, objective, float(num_obs), tuple(first), kinds, tuple(derived)), theta


def _quiet_noise(guide: Guide, batch: Batch, theta: Tensor) -> Noise:
    """Noise of half a standard deviation everywhere: one fixed z for the checks."""
    elements, per_row = guide.noise_size
    rows = theta.new_full((batch.size, per_row), 0.5) if per_row else None
    return Noise(theta.new_full((elements,), 0.5), rows, 0)
