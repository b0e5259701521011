"""Pyro's autoguides and users' own guides, under given noise.

A guide is any callable with reparameterized sample sites: a function, one of `pyro.infer.autoguide` as a class or an
instance, or a function that calls such an instance beside sites of its own. Its random numbers are replaced by the
given noise (:class:`NoiseMode`), so that antithetic pairs, ranks and resumed runs work as with the mean-field guide.

Shapes: B rows.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoCallable, AutoGuide, AutoGuideList
from pyro.nn import PyroModule
from torch import Tensor, nn

from trainer.errors import UserError, first_line, meant
from trainer.inference.guides.discrete import Picked, StateSite, state_sites
from trainer.inference.guides.mean_field import KL, Draw, Noise
from trainer.inference.model.latents import Site, is_discrete, is_latent, refuse_latent, total_log_prob
from trainer.inference.model.lazy_guides import KINDS
from trainer.inference.model.noise_mode import NoiseLayout, NoiseMode, measure_noise
from trainer.inference.model.parameters import modules_read
from trainer.inference.model.plates import Batch, PlatedModel, inside
from trainer.inference.rows.entries import as_given

NO_LATENT = "none (no latent site: maximum likelihood)"


class PyroGuide:
    """``guide``: a callable of a :class:`Batch`."""

    curved = 0

    def __init__(self, guide: Any, plate: str = "data"):
        self.guide, self.plate = guide, plate
        self.layout = NoiseLayout((), 0, 0, False)
        self.noise_size = (0, 0)
        self.kind, self.still = "", False
        self.states: tuple[StateSite, ...] = ()

    @property
    def callables(self) -> tuple[Any, ...]:
        """What the user gave, whose modules are trained."""
        return () if self._given is no_guide else (self._given,)

    @property
    def _given(self) -> Any:
        return as_given(self.guide.fn) if isinstance(self.guide, PlatedModel) else self.guide

    def setup(self, model: PlatedModel, batch: Batch) -> dict[str, Tensor]:
        """Runs guide and model to learn how many normals they take. Raises UserError for sites it cannot hold."""
        lacking = [name for name in self._named() if name in batch.columns and name not in model.own]
        if lacking:
            raise UserError(
                f"the guide takes column {', '.join(lacking)} and the model does not: give the model the same "
                "arguments (with =None where it has no use for one)."
            )
        # An autoguide makes its parameters in its first call, from a run of the model that it hides from handlers.
        with pyro.settings.context(validate_poutine=False):
            with modules_read() as parts:
                q = self._first(batch)
            for part in {id(part): part for part in parts.values()}.values():
                _settle(part, q, self.plate)
            self.states = state_sites(q, self.plate)
            picks = sum(site.size for site in self.states)
            with Picked(self.states, torch.zeros(picks, dtype=batch.dtype, device=batch.valid.device)):
                q, trace = self._traces(model, batch)
                _check_names(q, trace)
                for site in q.nodes.values():
                    self._check(site, trace)
                own = measure_noise(lambda rows: poutine.trace(self.guide).get_trace(rows), batch)
                self.layout = measure_noise(lambda rows: self._traces(model, rows), batch)
        self.noise_size = (self.layout.elements + picks, self.layout.per_row)
        self.still = self.layout.empty and not picks
        self.kind = _kind(self._given, own.empty, any(is_latent(site) for site in q.nodes.values()))
        return {}

    def _named(self) -> tuple[str, ...]:
        """The arguments of a guide of the user's, by name."""
        guide = self._given
        if not isinstance(self.guide, PlatedModel) or is_autoguide(guide):
            return ()
        call = guide.forward if isinstance(guide, nn.Module) else guide
        return tuple(inspect.signature(call).parameters)

    @property
    def log_q_of_a_draw(self) -> Callable[[Batch], Tensor] | None:
        return self._log_q_of_a_draw if self.layout.others else None

    def _log_q_of_a_draw(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            drawn = poutine.trace(self.guide).get_trace(batch)
        return torch.stack(list(self._log_q(batch, drawn).values())).sum()

    def _log_q(self, batch: Batch, drawn: poutine.Trace) -> dict[str, Tensor]:
        """log q [] by site at the values of ``drawn``, as a function of the parameters alone."""
        fixed = drawn.copy()
        fixed.detach_()
        q = poutine.trace(poutine.replay(self.guide, trace=fixed)).get_trace(batch)
        return {name: total_log_prob(site) for name, site in q.nodes.items() if is_latent(site)}

    def ended(self, hessian: Tensor) -> dict[str, Tensor]:
        return {}

    def gaussian(self, places: Mapping[str, slice]) -> None:
        """Whatever it is, its parameters are its own."""

    def _first(self, batch: Batch) -> poutine.Trace:
        with only_models_that_it_holds():
            trace: poutine.Trace = poutine.trace(self.guide).get_trace(batch)
        return trace

    def _check(self, site: Site, trace: poutine.Trace) -> None:
        """Raises UserError for a ``site`` of the guide that no gradient passes; ``trace``: the model's."""
        name, fn, nodes = str(site["name"]), site.get("fn"), cast(dict[str, Site], trace.nodes)
        if is_latent(site) and name not in {each.name for each in self.states}:
            refuse_latent(site, self.plate, can_be_local=True)
            if not fn.has_rsample:
                raise UserError(
                    f'the guide\'s site "{name}" ({type(fn).__name__}) has no reparameterized gradient: use a '
                    "distribution with rsample."
                )
        elif isinstance(fn, dist.Unit):
            if name in nodes and not torch.equal(fn.log_factor, nodes[name]["fn"].log_factor):
                raise UserError(f'pyro.factor "{name}" stands in model and guide: give the guide\'s another name.')
            if name not in nodes and not fn.has_rsample:
                raise UserError(
                    f'the guide\'s pyro.factor "{name}" has no reparameterized gradient: write '
                    f'pyro.factor("{name}", ..., has_rsample=True), if it is a function of draws that have one.'
                )

    def _traces(self, model: PlatedModel, batch: Batch) -> tuple[poutine.Trace, poutine.Trace]:
        """The guide's, and the model's at its draw."""
        q = poutine.trace(self.guide).get_trace(batch)
        return q, poutine.trace(poutine.replay(model, trace=q)).get_trace(batch)

    def draw(self, model: PlatedModel, params: dict[str, Tensor], noise: Noise, batch: Batch, kl: KL) -> Draw:
        picked = Picked(self.states, noise.elements[self.layout.elements :])
        with NoiseMode(self.layout, noise.elements, noise.rows, noise.seed), picked:
            q, trace = self._traces(model, batch)
        entropy, log_prior = {}, {}
        for name, site in q.nodes.items():
            if is_latent(site) or _is_factor_of(site, trace):
                entropy[name] = -total_log_prob(site)
        if kl == "sticking_the_landing":  # only the path through z carries a gradient
            for name, score in self._log_q(batch, q).items():
                if name in {site.name for site in self.states}:
                    continue  # its expectation is taken exactly
                entropy[name] = entropy[name] + (score - score.detach())
        for name, site in trace.nodes.items():
            if is_latent(site):
                if name not in q.nodes:
                    raise _missing(name)
                if inside(site, self.plate) != inside(q.nodes[name], self.plate):
                    raise UserError(
                        f'site "{name}" stands inside plate "{self.plate}" in only one of model and guide: '
                        "declare the plate in both."
                    )
                log_prior[name] = total_log_prob(site)
        local = frozenset(name for name in entropy if inside(q.nodes[name], self.plate))
        return Draw(trace, entropy, log_prior, local)


@contextmanager
def only_models_that_it_holds() -> Iterator[None]:
    """What an autoguide says of a model that it cannot hold as a UserError."""
    try:
        yield
    except NotImplementedError as error:
        told = first_line(error).rstrip(".")
        if "ImproperUniform" in told:
            raise UserError(
                f"the guide starts at a draw from the prior ({told}): give the improper site a proper prior, the guide "
                "a start (init_loc_fn=init_to_value(values=...)), or take guide=mean_field."
            ) from error
        raise UserError(f"the guide cannot hold this model ({told}): take another guide, as mean_field.") from error


def no_guide() -> None:
    """The guide of a model without latents: what is left is maximum likelihood."""


def is_autoguide(guide: Any) -> bool:
    """Whether ``guide`` is an object or a class of `pyro.infer.autoguide`."""
    return issubclass(guide if isinstance(guide, type) else type(guide), KINDS)


def _check_names(q: poutine.Trace, trace: poutine.Trace) -> None:
    """Raises UserError where guide ``q`` and model sample different latents; auxiliary ones are the guide's own."""
    nodes = cast(dict[str, Site], trace.nodes)
    latents = [name for name, site in nodes.items() if is_latent(site)]
    lacking = [name for name in latents if name not in q.nodes]
    for name, site in cast(dict[str, Site], q.nodes).items():
        if is_latent(site) and name not in latents and not site["infer"].get("is_auxiliary"):
            if name in nodes:
                raise UserError(
                    f'the guide samples "{name}", which is not a latent of the model but has its value there: leave it '
                    "out of the guide."
                )
            hint = meant(name, lacking, f"do you mean {lacking[0]}?" if lacking else "leave it out")
            raise UserError(
                f'the guide samples "{name}", which the model does not have ({hint}): give it the name that it has in '
                'the model, or infer={"is_auxiliary": True} where it is the guide\'s own.'
            )
    if lacking:
        raise _missing(lacking[0])


def _missing(name: str) -> UserError:
    return UserError(f'latent site "{name}" of the model is missing from the guide: sample it there too.')


def _settle(part: nn.Module, q: poutine.Trace, plate: str) -> None:
    """Readies an autoguide after its first call. Raises UserError where it holds a value for each row."""
    if not isinstance(part, PyroModule):
        return
    for kept in cast(dict[str, Any], part._pyro_context.param_state).values():
        kept.clear()  # the model's own `pyro.param`s of that call: `Parameters` holds the true ones
    for guide in part.modules():
        if isinstance(guide, AutoGuide) and guide.prototype_trace is not None:
            sites = [q.nodes[name] for name in guide.prototype_trace.nodes if name in q.nodes]
            latents = [site for site in sites if is_latent(site)]
            if not isinstance(guide, (AutoGuideList, AutoCallable)):
                for site in [each for each in latents if not is_discrete(each["fn"])]:
                    refuse_latent(site, plate, can_be_local=False)
            if not any(inside(site, plate) for site in latents):  # it would be declared with that call's rows
                guide._prototype_frames.pop(plate, None)


def _is_factor_of(site: Site, trace: poutine.Trace) -> bool:
    """Whether ``site`` is a `pyro.factor` of the guide, not of the model that a guide runs within itself."""
    return isinstance(site.get("fn"), dist.Unit) and site["name"] not in trace.nodes


def _kind(guide: Any, drawn_nothing: bool, has_latents: bool) -> str:
    """In words, what posterior a guide gives."""
    if not has_latents:
        return NO_LATENT
    name = type(guide).__name__ if is_autoguide(guide) else getattr(guide, "__name__", type(guide).__name__)
    return f"{name} (points, no spread)" if drawn_nothing else name
