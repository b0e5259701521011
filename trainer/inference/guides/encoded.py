"""A guide of latents outside the data plate beside an encoder, which holds those of rows.

The encoder gives each row independent Gaussians in unconstrained space (Kingma and Welling, "Auto-encoding variational
Bayes", ICLR 2014). Whatever guide holds the others sees a model without latents of rows: they have their values from
here, and their terms are added.

Shapes: B rows, d continuous numbers of a row; noise.rows [B, n], of which the first d are the encoder's.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from trainer.errors import UserError, shortened
from trainer.inference.guides.encoder import Encoder
from trainer.inference.guides.mean_field import KL, LOG_2PI, Draw, Guide, Noise, expected_normal_log_prob
from trainer.inference.guides.pyro_guides import NO_LATENT, PyroGuide, no_guide
from trainer.inference.model.latents import AtZero, FromUnconstrained, Site, has_latents, total
from trainer.inference.model.plates import Batch, PlatedModel
from trainer.inference.rows.options import RowOptions
from trainer.inference.rows.sites import RowLatent

_WIDTHS = (64, 64)


class Encoded:
    """``make``: makes the guide of the latents outside the data plate."""

    curved, still = 0, False

    def __init__(
        self, make: Callable[[PlatedModel, Batch], Guide], model: PlatedModel, batch: Batch, options: RowOptions
    ):
        self.latents: tuple[RowLatent, ...] = model.encoded
        self.names = [each.name for each in self.latents]
        self.columns = options.facts
        self.size = sum(each.size for each in self.latents)
        """d."""
        self.network = Encoder(options.facts, options.widths or _WIDTHS, self.size)
        self.beside = _Beside(model, batch, self.names)
        nothing = PyroGuide(PlatedModel(no_guide, (), model.plate), model.plate)
        self.inner = make(self.beside, batch) if has_latents(self.beside, batch) else nothing
        self.noise_size, self.kind = (0, 0), ""

    @property
    def states(self) -> tuple[Any, ...]:
        return self.inner.states

    @property
    def callables(self) -> tuple[Any, ...]:
        return self.inner.callables

    @property
    def log_q_of_a_draw(self) -> Callable[[Batch], Tensor] | None:
        return self.inner.log_q_of_a_draw

    def gaussian(self, places: Mapping[str, slice]) -> None:
        """It is none, and neither is its part, which is at its optimum only when the encoder is."""

    def ended(self, hessian: Tensor) -> dict[str, Tensor]:
        return {}

    def setup(self, model: PlatedModel, batch: Batch) -> dict[str, Tensor]:
        own = self.inner.setup(self.beside, batch)
        if self.inner.curved:
            raise UserError(
                "the curvature that guide=laplace takes is not that of an encoder: take guide=mean_field, or "
                "guide.rows=integrate."
            )
        elements, per_row = self.inner.noise_size
        self.noise_size = elements, per_row + self.size
        encoder = f"an encoder for {shortened(self.names)} of each row"
        self.kind = encoder if self.inner.kind == NO_LATENT else f"{self.inner.kind}, with {encoder}"
        like = torch.zeros((), dtype=batch.dtype, device=batch.valid.device)
        return {**own, **self.network.init(batch.columns, like)}

    def draw(self, model: PlatedModel, params: dict[str, Tensor], noise: Noise, batch: Batch, kl: KL) -> Draw:
        assert noise.rows is not None
        if any(batch.columns.get(name) is None for name in self.network.facts):
            return self.inner.draw(
                self._without(model), params, noise._replace(rows=noise.rows[:, self.size :]), batch, kl
            )
        eps, others = noise.rows.split([self.size, noise.rows.shape[1] - self.size], dim=1)
        mean, log_sd = self.network(params, batch.columns)
        u = mean + log_sd.exp() * eps
        given, tracer = FromUnconstrained(self._by_site(u)), poutine.trace()

        def beside(batch: Batch) -> Any:
            with poutine.block(hide=self.names), tracer, given:
                return model(batch)

        drawn = self.inner.draw(beside, params, noise._replace(rows=others), batch, kl)  # type: ignore[arg-type]
        entropy, log_prior = dict(drawn.entropy), dict(drawn.log_prior)
        entropies, locs, sds = map(self._by_site, (_entropy(kl, mean, log_sd, u, eps), mean, log_sd.exp()))
        for name in self.names:
            node: Site = tracer.trace.nodes[name]
            drawn.trace.nodes[name] = node
            entropy[name] = total(node, entropies[name].reshape(*node["fn"].batch_shape, -1).sum(-1))
            exact = expected_normal_log_prob(node, (locs[name], sds[name])) if kl == "analytic" else None
            log_prior[name] = given.log_prior(node) if exact is None else total(node, exact)
        return Draw(drawn.trace, entropy, log_prior, drawn.local | set(self.names))

    def _without(self, model: PlatedModel) -> Any:
        """``model`` with latents of rows from their prior, of which columns are lacking: nobody asks for them."""
        return poutine.block(_Aside(self.names)(model), hide=self.names)

    def _by_site(self, numbers: Tensor) -> dict[str, Tensor]:
        return {each.name: each.of(numbers) for each in self.latents}


def _entropy(kl: KL, mean: Tensor, log_sd: Tensor, u: Tensor, eps: Tensor) -> Tensor:
    """Of each number [B, d], or -log q at its draw."""
    if kl == "analytic":
        return log_sd + 0.5 * (1 + LOG_2PI)
    if kl == "sticking_the_landing":  # only the path through u carries a gradient
        mean, log_sd = mean.detach(), log_sd.detach()
        eps = (u - mean) * (-log_sd).exp()
    return log_sd + 0.5 * eps**2 + 0.5 * LOG_2PI


class _Beside(PlatedModel):
    """``model`` as a guide of its other latents sees it at the start: those of rows are hidden, at u = 0."""

    def __init__(self, model: PlatedModel, batch: Batch, names: list[str]):
        def hidden(**columns: Any) -> Any:
            with poutine.block(hide=names), _AtZero(names, batch):
                return model.fn(**columns)

        super().__init__(hidden, batch.columns, model.plate, like=model.generative.fn)
        self.sites, self._generative = model.sites, model.generative

    @property
    def generative(self) -> PlatedModel:
        return self._generative


class _Aside(Messenger):
    """Draws the latents ``names`` from their priors, beside the noise that was measured without them."""

    def __init__(self, names: list[str]):
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Message[..., Any]) -> None:
        if msg["name"] in self.names:
            with _disable_current_modes():
                msg["value"], msg["done"] = cast(Any, msg["fn"])(), True


class _AtZero(AtZero):
    """Sets the latents ``names`` alone."""

    def __init__(self, names: list[str], batch: Batch):
        super().__init__(batch.dtype, batch.valid.device)
        self.names = names

    def _pyro_sample(self, msg: Message[..., Any]) -> None:
        if msg["name"] in self.names:
            super()._pyro_sample(msg)
