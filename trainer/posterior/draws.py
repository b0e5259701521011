"""Draws from the fitted guide, and of new observations given them.

Shapes: B rows of a batch.
"""

import operator
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from trainer.errors import UserError
from trainer.inference.estimates.many_draws import Normals, Together, normals_of
from trainer.inference.guides.mean_field import Draw, Noise
from trainer.inference.model.latents import Site, is_latent, log_prob
from trainer.inference.model.noise import mixed_seed
from trainer.inference.model.noise_mode import seed_generators
from trainer.inference.model.plates import Batch, PlatedModel, inside
from trainer.inference.step import Inference, in_dtype

_FEWEST = 64  # draws, for fewer of which a trace of the model would not pay


def dtype_of(theta: Tensor) -> AbstractContextManager[None]:
    """torch's default dtype as while training, for models that make tensors of their own."""
    return in_dtype(theta.dtype)


def counted_draws(number: Any) -> int:
    """A number of draws. Raises UserError for what is none."""
    try:
        count = operator.index(number)
    except TypeError:
        count = 0
    if count < 1:
        raise UserError(f"num_draws={number}: give a whole number from 1 up.")
    return count


def draw(inference: Inference, theta: Tensor, batch: Batch, seed: int, number: int, sign: float = 1.0) -> Draw:
    """Draw ``number`` of z ~ q and the model's trace at it; ``sign`` -1: the antithetic one.

    Latents outside the data plate do not depend on ``batch``, those of a row on its row id and values alone.
    """
    noise = _normals(inference, theta, batch, seed, range(number, number + 1), (sign,)).noise(0)
    with dtype_of(theta), torch.no_grad(), pyro.validation_enabled(False):
        return inference.parameters.call(
            inference.parameters.unflatten(theta),
            lambda values: inference.guide.draw(inference.model, values, noise, batch, "monte_carlo"),
        )


def latent_draws(
    inference: Inference, theta: Tensor, batch: Batch, seed: int, numbers: range, signs: Sequence[float] = (1.0,)
) -> dict[str, Tensor]:
    """[S, ...] of every latent outside the data plate, and of what the model derives from these alone: at the draws
    ``numbers``, each with each of the ``signs``, one after the other.
    """
    inference = replace(inference, model=inference.model.of_globals)
    first = _values(inference, draw(inference, theta, batch, seed, numbers[0], signs[0]))
    sizes = [value.numel() for value in first.values()]

    def evaluate(values: dict[str, Tensor], noise: Noise, batch: Batch) -> Tensor:
        drawn = _values(inference, inference.guide.draw(inference.model, values, noise, batch, "monte_carlo"))
        return torch.cat([drawn[name].double().flatten() for name in first])

    if not first:
        return {}
    together, parts = Together(inference, evaluate, _FEWEST), []
    with dtype_of(theta), torch.no_grad():
        size = together.fitting(theta, batch, _normals(inference, theta, batch, seed, numbers[:1], signs))
        for some in _batched(numbers, max(1, size // len(signs))):
            made = together(theta, batch, _normals(inference, theta, batch, seed, some, signs)).split(sizes, dim=1)
            parts.append([part.to(value.dtype) for part, value in zip(made, first.values())])
    every = (torch.cat(each) for each in zip(*parts))
    return {name: each.view(-1, *value.shape) for (name, value), each in zip(first.items(), every)}


def _batched(numbers: range, size: int) -> Iterator[range]:
    """The ``numbers``, at most ``size`` at a time."""
    return (numbers[first : first + size] for first in range(0, len(numbers), size))


def _values(inference: Inference, drawn: Draw) -> dict[str, Tensor]:
    nodes: dict[str, Any] = drawn.trace.nodes
    names = [*latents_of(drawn, inference.model.plate), *inference.derived]
    return {name: cast(Tensor, nodes[name]["value"]) for name in names}


def _normals(
    inference: Inference, theta: Tensor, batch: Batch, seed: int, numbers: range, signs: Sequence[float]
) -> Normals:
    elements, rows = normals_of(inference, theta, batch.row_id, seed, 0, numbers)
    seeds = [mixed_seed(seed, 0, 2 * number + (sign < 0)) for number in numbers for sign in signs]
    return Normals.of(elements, rows, seeds, signs)


def latents_of(drawn: Draw, plate: str) -> dict[str, Site]:
    """The latents outside the data plate, as nodes of the model's trace."""
    return {n: node for n, node in drawn.trace.nodes.items() if is_latent(node) and not inside(node, plate)}


def parameters_of(inference: Inference, theta: Tensor, batch: Batch) -> dict[str, Tensor]:
    """The model's own trained parameters, as the model sees them; of a guide of the user's, none."""
    parameters, guide = inference.parameters, inference.guide
    values = parameters.constrain(parameters.unflatten(theta.detach()))
    own = {name: value for name, value in values.items() if name[:6] != "guide."}
    if guide.callables:
        nodes = draw(inference, theta, batch, 0, 0).trace.nodes.items()
        touched = {str(name): cast(Tensor, node["value"]) for name, node in nodes if node["type"] == "param"}
        return {_with_module(name.replace("$$$", "."), own): value for name, value in touched.items()}
    return own


def _with_module(name: str, names: Iterable[str]) -> str:
    """That one of ``names``, which begin with a module's, that a model calls ``name``."""
    return next((each for each in names if each == name or each.endswith(f".{name}")), name)


def predicts_by(inference: Inference, theta: Tensor, batch: Batch, name: str) -> bool:
    """Whether a likelihood depends on the column ``name``, other than by observing it."""
    rolled = batch._replace(columns={**batch.columns, name: batch.columns[name].roll(1, 0)})
    nodes: list[Any] = [draw(inference, theta, each, 0, 0).trace.nodes for each in (batch, rolled)]
    for site, kind in zip(inference.sites, inference.kinds):
        if kind == "likelihood":
            with dtype_of(theta), pyro.validation_enabled(False):
                one, two = (log_prob({**each[site], "value": nodes[0][site]["value"]}) for each in nodes)
            if not torch.equal(one, two):
                return True
    return False


def observed_and_latent(inference: Inference) -> tuple[list[str], list[str]]:
    """The observed sites of the rows, and the latents of rows that are integrated out."""
    sites = inference.model.sites
    if sites is None:
        return [name for name, kind in zip(inference.sites, inference.kinds) if kind == "likelihood"], []
    return list(sites.observed), [*(each.name for each in sites.continuous), *sites.discrete]


Latents = Callable[[int], Mapping[str, Tensor]]
"""The values of latents at a draw, by its number: those that the guide holds, perhaps those of rows too."""


def held(
    inference: Inference, theta: Tensor, batch: Batch, seed: int, number: int, sign: float = 1.0
) -> tuple[dict[str, Tensor], dict[str, Site]]:
    """What the guide samples at a draw (as `draw`), and those of its latents that are of rows as nodes of the trace.

    Latents of rows that are integrated out are not, and ``batch`` need not have the observed columns.
    """
    generative, (observed, of_rows) = inference.model.generative, observed_and_latent(inference)
    aside = _Aside({*observed, *of_rows})
    model = cast(PlatedModel, aside(PlatedModel(generative.fn, batch.columns, generative.plate)))
    with _in_guides(aside):
        drawn = draw(replace(inference, model=model), theta, batch, seed, number, sign)
    nodes: dict[str, Any] = drawn.trace.nodes
    values = {name: nodes[name]["value"] for name in nodes if name in drawn.entropy}
    return values, {name: nodes[name] for name in nodes if name in drawn.local and is_latent(nodes[name])}


def observations(
    inference: Inference, theta: Tensor, batch: Batch, seed: int, number: int, latents: Latents | None = None
) -> dict[str, Site]:
    """The observed sites, as nodes of a trace in which they are drawn given draw ``number`` of the latents.

    ``batch`` need not have the observed columns where the model gives them a default. ``latents``: their values; None:
    those that the guide holds, and the others from their prior.
    """
    observed, _ = observed_and_latent(inference)
    with _drawing(theta, batch, seed, number):
        known = held(inference, theta, batch, seed, number)[0] if latents is None else latents(number)
    with _drawing(theta, batch, seed, number):
        trace = _given(inference, theta, batch, known, observed)
    nodes = {name: trace.nodes[name] for name in observed}
    return {name: node for name, node in nodes.items() if not isinstance(node["fn"], dist.Unit)}


def unobserved(inference: Inference, theta: Tensor, batch: Batch) -> list[str]:
    """The observed sites of the rows for which ``batch`` lacks a column."""
    observed, _ = observed_and_latent(inference)
    with _drawing(theta, batch, 0, 0):
        trace = _given(inference, theta, batch, held(inference, theta, batch, 0, 0)[0], ())
    return [name for name in observed if name not in trace.nodes or not trace.nodes[name]["is_observed"]]


@contextmanager
def _drawing(theta: Tensor, batch: Batch, seed: int, number: int) -> Iterator[None]:
    """Where sites are drawn by torch's own generator, from a seed of its own for each draw and place."""
    first_row = 0 if batch.row_id is None else int(batch.row_id[0])
    with dtype_of(theta), torch.no_grad(), torch.random.fork_rng(), pyro.validation_enabled(False):
        seed_generators(mixed_seed(seed, number, first_row))
        yield


def _given(
    inference: Inference, theta: Tensor, batch: Batch, known: Mapping[str, Tensor], anew: Container[str]
) -> poutine.Trace:
    """A trace of the model at ``known`` values, the observed sites ``anew`` drawn."""
    generative, parameters = inference.model.generative, inference.parameters
    model = _Unobserved(anew)(PlatedModel(generative.fn, batch.columns, generative.plate))
    free = poutine.condition(model, data=dict(known))
    trace: poutine.Trace = parameters.call(parameters.unflatten(theta), lambda _: poutine.trace(free).get_trace(batch))
    return trace


class _Aside(Messenger):
    """Draws the sites ``names`` that have no value beside the noise that was measured without them."""

    def __init__(self, names: Container[str]):
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Message[..., Any]) -> None:
        if msg["name"] in self.names and msg["value"] is None:
            with _disable_current_modes():
                msg["value"] = cast(Any, msg["fn"])()
            msg["is_observed"] = msg["done"] = True  # no latent that a guide would have to hold


@contextmanager
def _in_guides(aside: _Aside) -> Iterator[None]:
    """``aside`` comes first too where a guide runs the model within itself, which no handler around it does."""
    original = GuideMessenger._pyro_sample

    def after_aside(guide: GuideMessenger, msg: Message[..., Any]) -> None:
        aside._pyro_sample(msg)
        original(guide, msg)

    GuideMessenger._pyro_sample = after_aside  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        GuideMessenger._pyro_sample = original  # type: ignore[method-assign]


class _Unobserved(Messenger):
    """Draws the observed sites ``names`` anew."""

    def __init__(self, names: Container[str]):
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Message[..., Any]) -> None:
        if msg["name"] in self.names:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
