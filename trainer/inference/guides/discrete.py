"""Discrete latents outside the data plate: every joint state is evaluated, and weighs as much as the guide gives it.

The expectation over the states is exact, so that its gradient needs neither a reparameterization nor a baseline:

    ELBO = sum over joint states s  q(s) (E_q(z|s) log p(y, z, s) - log q(z|s) - log q(s))

Rows cannot sum these out one by one, since all of them share one state. A guide of the user's says what q(s) is;
`WithStates` gives every latent probabilities of its own, beside a guide of the continuous latents.

Shapes: K states of a site, n the sizes of the plates that it stands in; E normals of the guide beside it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor

from trainer.errors import UserError
from trainer.inference.guides.mean_field import KL, Draw, Guide, Noise
from trainer.inference.model.latents import AtZero, Site, is_discrete, is_latent, total_log_prob
from trainer.inference.model.plates import Batch, PlatedModel, inside
from trainer.inference.rows.sites import AtFirst, every_state

_MOST = 4096


@dataclass(frozen=True)
class StateSite:
    """A discrete latent outside the data plate."""

    name: str
    states: Tensor
    """[K, event]."""
    shape: tuple[int, ...]
    """n."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def value(self, numbers: Tensor) -> Tensor:
        """[n, event]: the states of these ``numbers``, int64 [n]."""
        value: Tensor = self.states[numbers]
        return value

    def number(self, value: Tensor) -> Tensor:
        """int64 [n]: which states ``value`` [n, event] holds."""
        alike = value.unsqueeze(len(self.shape)) == self.states
        return (alike.flatten(len(self.shape) + 1).all(-1) if self.states.dim() > 1 else alike).int().argmax(-1)


def state_sites(trace: poutine.Trace, plate: str) -> tuple[StateSite, ...]:
    """Of a model or guide. Raises UserError for what has no end of states, or more than 4,096 of them jointly."""
    found: list[StateSite] = []
    for site in trace.nodes.values():
        if is_latent(site) and is_discrete(site["fn"]) and not inside(site, plate):
            fn: Any = site["fn"]
            states = every_state(str(site["name"]), fn)
            found.append(StateSite(str(site["name"]), states.reshape(-1, *fn.event_shape), tuple(fn.batch_shape)))
    joint = math.prod(len(site.states) ** site.size for site in found)
    if joint > _MOST:
        names = ", ".join(f'"{site.name}"' for site in found)
        raise UserError(
            f"the discrete latents outside the data plate, {names}, have {joint:,} joint states, and at most {_MOST:,} "
            "are evaluated: sum them out (dist.MixtureSameFamily, or torch.logsumexp of the branches in a "
            "pyro.factor), or give each one rows of its own."
        )
    return tuple(found)


def states_of_model(model: PlatedModel, batch: Batch) -> tuple[tuple[StateSite, ...], bool]:
    """`state_sites` of a model, and whether it has other latents."""
    with AtFirst(model.plate), AtZero(batch.dtype, batch.valid.device) as others:
        trace = poutine.trace(model).get_trace(batch)
    return state_sites(trace, model.plate), bool(others.sites)


def joint_states(sites: Sequence[StateSite]) -> Iterator[dict[str, Tensor]]:
    """Every joint state, by site."""
    numbers = [range(len(site.states)) for site in sites for _ in range(site.size)]
    for each in product(*numbers):
        left, values = list(each), {}
        for site in sites:
            own, left = left[: site.size], left[site.size :]
            values[site.name] = site.value(torch.tensor(own, device=site.states.device).view(site.shape))
        yield values


class AtState(Messenger):
    """Gives discrete latents these values, whatever guide or model draw."""

    def __init__(self, values: Mapping[str, Tensor]):
        super().__init__()
        self.values = values

    def _pyro_post_sample(self, msg: Message[..., Any]) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[str(msg["name"])]


class Picked(Messenger):
    """Draws discrete latents by ``normals`` [sum of n]; ``log_q``: their log-probabilities [n, K] by site, else those
    of the distribution at the site.
    """

    def __init__(self, sites: Sequence[StateSite], normals: Tensor, log_q: Mapping[str, Tensor] | None = None):
        super().__init__()
        self.sites = {site.name: site for site in sites}
        self.normals = dict(zip(self.sites, normals.split([site.size for site in sites]), strict=True)) if sites else {}
        self.log_q = log_q or {}

    def _pyro_sample(self, msg: Message[..., Any]) -> None:
        name, fn = str(msg["name"]), msg["fn"]
        if name not in self.sites or msg["done"] or msg["is_observed"]:
            return
        site = self.sites[name]
        log_q = self.log_q[name] if name in self.log_q else _log_probabilities(site, fn)
        share = torch.special.ndtr(self.normals[name].view(site.shape)).unsqueeze(-1)
        numbers = (log_q.exp().cumsum(-1)[..., :-1] < share).sum(-1)
        msg["value"], msg["done"] = site.value(numbers), True


def _log_probabilities(site: StateSite, fn: Any) -> Tensor:
    """[n, K]."""
    count, *event = site.states.shape
    states = site.states.view(count, *(1 for _ in site.shape), *event)
    log_q: Tensor = fn.log_prob(states.expand(count, *site.shape, *event))
    return log_q.detach().movedim(0, -1)


class WithStates:
    """``inner``, a guide of the continuous latents, if there are any, with a probability for each state of every
    discrete one.
    """

    callables, curved, still, log_q_of_a_draw = (), 0, False, None

    def __init__(self, states: tuple[StateSite, ...], inner: Guide | None):
        self.states, self.inner = states, inner
        self.noise_size = (0, 0)
        shares = f"a probability for each state of {', '.join(site.name for site in states)}"
        self.kind = f"{inner.kind}, with {shares}" if inner else shares

    def setup(self, model: PlatedModel, batch: Batch) -> dict[str, Tensor]:
        options: dict[str, Any] = {"dtype": batch.dtype, "device": batch.valid.device}
        even = {_logits(site): torch.zeros(*site.shape, len(site.states), **options) for site in self.states}
        picks = sum(site.size for site in self.states)
        with Picked(self.states, torch.zeros(picks, **options), self._log_q(even)):
            own = self.inner.setup(model, batch) if self.inner else {}
        if self.inner and self.inner.curved:
            raise UserError(
                f'latent site "{self.states[0].name}" is discrete, so the posterior has no curvature along it: take '
                "guide=mean_field, or another guide that is not Laplace's."
            )
        elements, rows = self.inner.noise_size if self.inner else (0, 0)
        self.noise_size = elements + picks, rows
        return {**own, **even}

    def ended(self, hessian: Tensor) -> dict[str, Tensor]:
        return {}

    def gaussian(self, places: Mapping[str, slice]) -> None:
        """It is none."""

    def draw(self, model: PlatedModel, params: dict[str, Tensor], noise: Noise, batch: Batch, kl: KL) -> Draw:
        elements, log_q = self.inner.noise_size[0] if self.inner else 0, self._log_q(params)
        with Picked(self.states, noise.elements[elements:], log_q):
            if self.inner:
                own = noise._replace(elements=noise.elements[:elements])
                drawn = self.inner.draw(model, params, own, batch, kl)
            else:
                drawn = Draw(poutine.trace(model).get_trace(batch), {}, {}, frozenset())
        entropy, log_prior = dict(drawn.entropy), dict(drawn.log_prior)
        for site in self.states:
            node: Site = drawn.trace.nodes[site.name]
            of_state = log_q[site.name].gather(-1, site.number(node["value"]).unsqueeze(-1))
            entropy[site.name] = -of_state.sum(dtype=torch.float64)
            log_prior[site.name] = total_log_prob(node)
        return Draw(drawn.trace, entropy, log_prior, drawn.local)

    def _log_q(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {site.name: params[_logits(site)].log_softmax(-1) for site in self.states}


def _logits(site: StateSite) -> str:
    return f"guide.logits.{site.name}"
