"""The only place that calls Hydra's instantiate: from config nodes to the objects of the layers below."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from trainer.errors import UserError, first_line, meant
from trainer.inference.guides.mean_field import MeanField
from trainer.inference.guides.pyro_guides import is_autoguide
from trainer.inference.objectives.objective import Objective
from trainer.inference.optim.optimizers import Optimizer
from trainer.inference.optim.schedules import Schedule
from trainer.inference.programs.program import ProgramFactory
from trainer.inference.recipe.convergence import Rule
from trainer.inference.rows.options import OPTIONS, RowOptions
from trainer.inference.setup import GuideFactory, guide_factory, is_family
from trainer.options.allowed import imported


def make(node: DictConfig, *, partial: bool = False) -> Any:
    """The object that ``node`` describes, of plain Python values; ``partial``: with its last arguments still to come.

    Raises UserError for a target that cannot be made, and for an option that it does not take.
    """
    _refuse_unknown(node)
    try:
        return instantiate(node, _convert_="all", _partial_=partial)
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(f"{node._target_} cannot be made from the config: {first_line(cause)}") from error


def _refuse_unknown(node: DictConfig) -> None:
    target = node.get("_target_")
    if target is None:
        return
    found = imported(str(target))
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):  # it tells nobody
        return
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return
    for name in map(str, node):
        if name not in parameters and not (name.startswith("_") and name.endswith("_")):
            taken = meant(name, parameters, f"it takes {', '.join(parameters) or 'none'}")
            raise UserError(
                f"option {node._get_full_key(name)} is unknown to {target} ({taken}): leave it out or fix it."
            )


def program(node: DictConfig) -> ProgramFactory:
    """What makes the program once the inference problem is known."""
    made: ProgramFactory = make(node, partial=True)
    return made


def objective(node: DictConfig, pairs: int = 1) -> Objective:
    """The objective, of so many ``pairs`` of draws where the config leaves their number open."""
    options = {"pairs": pairs} if "pairs" in node and node.pairs is None else {}
    made: Objective = make(node, partial=True)(**options)
    return made


def optimizer(node: DictConfig) -> Optimizer:
    made: Optimizer = make(node)
    return made


def schedule(node: DictConfig) -> Schedule:
    made: Schedule = make(node)
    return made


def rule(node: DictConfig | None) -> Rule | None:
    """When a run has converged; None: it runs to the end of its budget."""
    made: Rule | None = make(node) if node else None
    return made


def model(node: DictConfig) -> Any:
    """The user's model: a function as it stands (with its arguments bound), or an instance of a class."""
    if OmegaConf.is_missing(node, "_target_") or node.get("_target_") is None:
        raise UserError(
            "no model was given: choose one with model=NAME (svi train --help lists them) or model._target_=."
        )
    found = imported(str(node._target_))
    made = make(node) if inspect.isclass(found) else make(node, partial=True)
    if isinstance(made, functools.partial):  # of a function that Hydra would check again at each call
        made = functools.partial(found, *made.args, **made.keywords) if made.args or made.keywords else found
    if callable(made) and not _is_pair(made):
        return made
    if hasattr(made, "model"):  # as in Pyro's VAE example: an object with the methods model and guide
        return made.model
    raise UserError(
        f"{node._target_} makes a {type(made).__name__} that cannot be called: give it a __call__ or forward."
    )


def _is_pair(made: Any) -> bool:
    return inspect.ismethod(getattr(made, "model", None)) and inspect.ismethod(getattr(made, "guide", None))


def guide(node: DictConfig, model: Callable[..., Any], columns: tuple[str, ...], plate: str) -> GuideFactory:
    """What makes the guide from the plated model and one batch."""
    found = imported(str(node._target_))
    owner = getattr(model, "__self__", None)
    if found is MeanField and owner is not None and _is_pair(owner):
        return guide_factory(owner.guide, columns, plate)
    made = make(_without_rows(node, found), partial=True)
    if inspect.isclass(found) and not is_autoguide(found) and not is_family(found):
        made = made()
    return guide_factory(made, columns, plate)


def rows(node: DictConfig) -> RowOptions:
    """What the options of a guide say of the latents of rows."""
    given = {name: node[name] for name in OPTIONS if node.get(name) is not None}
    return RowOptions(**{**given, **({"widths": tuple(given["widths"])} if "widths" in given else {})})


def _without_rows(node: DictConfig, target: Any) -> DictConfig:
    """The options of the guide ``target`` itself, which may have some by the same names."""
    own = inspect.signature(target).parameters
    kept = {name: node[name] for name in node if name not in OPTIONS or (name in own and node[name] is not None)}
    return DictConfig(kept, key="guide")
