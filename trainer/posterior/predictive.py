"""New observations: moments, quantiles and class probabilities of the observed sites at a few rows.

Moments are averaged over the draws of the latents where a site's distribution has them, which is more exact than those
of its samples. Shapes: B rows, R draws, Q quantiles, K classes.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical, Multinomial, OneHotCategorical

from trainer.errors import UserError, first_line
from trainer.inference.checks.observed import with_lookups_checked
from trainer.inference.model.latents import Site
from trainer.inference.model.plates import Batch
from trainer.inference.model.supports import innermost
from trainer.inference.rows.entries import entries_by_row
from trainer.inference.step import Inference
from trainer.posterior.draws import Latents, observations

MOST_NUMBERS = 2**24
"""Rows times what is held of each: draws times numbers, and classes. Fixed, so that a sample does not depend on memory:
draws are seeded by the first of the rows that are drawn together."""
_SORTED = 2**20  # numbers that are sorted at a time

MOST_CLASSES = 1000
"""Of which each has a column."""
OfRows = Literal["auto", "posterior", "prior"]
DRAWS, LEVELS = 200, (0.05, 0.5, 0.95)
"""Of a prediction for which nobody gives others."""


class Asked(NamedTuple):
    """How rows are predicted."""

    num_draws: int = DRAWS
    quantiles: Sequence[float] = LEVELS
    seed: int = 0
    latents: OfRows = "auto"
    """Latents of rows that are integrated out: "posterior", given what is observed of each row; "prior"; or "auto", the
    former where all of it is given."""


ASKED = Asked()


class Prediction(NamedTuple):
    """An observed site at new rows."""

    mean: np.ndarray
    """[N, ...]; of a Categorical that of its codes; nan where the distribution has none (Cauchy)."""
    sd: np.ndarray
    """[N, ...]: of a new observation, the posterior's uncertainty included."""
    quantiles: np.ndarray
    """[Q, N, ...]."""
    probabilities: np.ndarray | None = None
    """[N, ..., K] of a Categorical, OneHotCategorical, OrderedLogistic or Multinomial; None for others."""
    words: tuple[str, ...] | None = None
    """What the classes are called, where they are those of a categorical column."""
    entries: np.ndarray | None = None
    """[N, ...]: False at places that only fill a row up, where all numbers are nan; None where every place counts."""

    @property
    def most_likely(self) -> np.ndarray | None:
        """[N, ...]: the class of the greatest probability, its word where it has one."""
        if self.probabilities is None:
            return None
        codes: np.ndarray = self.probabilities.argmax(-1)
        if self.words is None:
            return codes
        words: np.ndarray = np.array(self.words)[codes]
        return words

    @property
    def has_no_mean(self) -> bool:
        """Whether there is none somewhere."""
        none = np.isnan(self.mean)
        return bool((none if self.entries is None else none[self.entries]).any())

    def named(self, words: Sequence[str] | None) -> "Prediction":
        """With what the classes are called, where there is a word for each."""
        if self.probabilities is None or words is None or self.probabilities.shape[-1] > len(words):
            return self
        return self._replace(words=tuple(words[: self.probabilities.shape[-1]]))

    def at_entries(self, entries: Tensor | None) -> "Prediction":
        """With nan where ``entries`` [N, ...], the first axes of all numbers, are False; as it is for None."""
        if entries is None:
            return self
        known = entries.cpu().numpy()

        def of(numbers: np.ndarray) -> np.ndarray:
            return np.where(known.reshape(*known.shape, *(1,) * (numbers.ndim - known.ndim)), numbers, np.nan)

        quantiles = np.stack([of(each) for each in self.quantiles]) if len(self.quantiles) else self.quantiles
        classes = None if self.probabilities is None else of(self.probabilities)
        return self._replace(
            mean=of(self.mean), sd=of(self.sd), quantiles=quantiles, probabilities=classes, entries=known
        )


def levels_of(quantiles: Any) -> list[float]:
    """Quantiles, or a single one, as numbers. Raises UserError for what lies outside of 0 to 1."""
    levels = np.asarray(quantiles, float).reshape(-1)
    if not ((levels >= 0) & (levels <= 1)).all():
        raise UserError(f"quantiles={quantiles}: give numbers from 0 to 1, as 0.05 for 5 %.")
    return [float(level) for level in levels]


def joined(parts: Sequence[Prediction]) -> Prediction:
    """The rows of ``parts``, one after another."""
    first, classes = parts[0], [each.probabilities for each in parts if each.probabilities is not None]
    entries = [each.entries for each in parts if each.entries is not None]
    return Prediction(
        np.concatenate([each.mean for each in parts]),
        np.concatenate([each.sd for each in parts]),
        np.concatenate([each.quantiles for each in parts], axis=1),
        np.concatenate(classes) if classes else None,
        first.words,
        np.concatenate(entries) if entries else None,
    )


def rows_together(inference: Inference, theta: Tensor, batch: Batch, num_draws: int, seed: int) -> int:
    """How many rows can be drawn at a time. Raises UserError for rows at which the model cannot be evaluated."""
    try:
        found = with_lookups_checked(lambda rows: observations(inference, theta, rows, seed, 0), batch)
    except (TypeError, AttributeError) as error:
        lacking = [name for name in inference.model.own if name not in batch.columns]
        if not lacking:
            raise
        raise UserError(
            f"model or guide cannot do without column {', '.join(lacking)} ({first_line(error)}): predict at rows that "
            "have it, or make room for None where nothing is observed."
        ) from error
    if not found:
        raise UserError(
            "the model draws no observed site (what it observes enters by pyro.factor alone), so there is nothing to "
            "predict: use Posterior.sample, or observe a column by a distribution."
        )
    held: list[int] = [num_draws * site["value"].numel() for site in found.values()]
    held += [classes.numel() for site in found.values() if (classes := _probabilities(site)) is not None]
    return max(1, min(batch.size, MOST_NUMBERS * batch.size // max(sum(held), 1)))


def predicted(
    inference: Inference, theta: Tensor, batch: Batch, asked: Asked, latents: Latents | None = None
) -> dict[str, Prediction]:
    """Every observed site at the rows of ``batch``, from draws of the latents (``latents``: as `observations`)."""
    gathered: dict[str, _Gathered] = {}
    for number in range(asked.num_draws):
        for name, site in observations(inference, theta, batch, asked.seed, number, latents).items():
            if name not in gathered:
                gathered[name] = _Gathered(site, asked.num_draws, inference.model.plate)
            gathered[name].add(number, site)
    return {name: each.prediction(asked.quantiles) for name, each in gathered.items()}


def table_columns(site: str, found: Prediction, levels: Sequence[float]) -> dict[str, np.ndarray]:
    """Of classes the most likely one and their probabilities, else mean, sd and quantiles."""
    likely, probabilities = found.most_likely, found.probabilities
    if likely is None or probabilities is None:
        quantiles = {f"{site}_q{100 * level:02g}": values for level, values in zip(levels, found.quantiles)}
        return {f"{site}_mean": found.mean, f"{site}_sd": found.sd, **quantiles}
    if found.entries is not None:
        likely = np.where(found.entries, likely.astype(object), np.array(None))
    if probabilities.shape[-1] > MOST_CLASSES:
        return {f"{site}_class": likely, f"{site}_p": probabilities.max(-1)}
    names = [f"p_{word}" for word in found.words] if found.words else [f"p{k}" for k in range(probabilities.shape[-1])]
    return {f"{site}_class": likely, **{f"{site}_{name}": probabilities[..., k] for k, name in enumerate(names)}}


class _Gathered:
    """A site over the draws: sums for its moments and probabilities, samples for its quantiles."""

    def __init__(self, site: Site, num_draws: int, plate: str):
        value = site["value"]
        dims = [frame.dim for frame in site["cond_indep_stack"] if frame.name == plate]
        self.axis = dims[0] - len(site["fn"].event_shape) if dims else -value.dim()
        """That of the rows, which other plates may stand before."""
        self.entries = entries_by_row(site, plate)
        self.samples = value.new_empty(num_draws, *value.shape)
        self.mean, self.within, self.between = (torch.zeros(value.shape, dtype=torch.float64) for _ in range(3))
        self.probabilities: Tensor | None = None

    def add(self, number: int, site: Site) -> None:
        """Draw ``number``. Moments by Welford (1962): the variance is that within the draws and that between."""
        self.samples[number] = site["value"]
        mean, variance = _moments(site)
        step = torch.where(mean == self.mean, 0.0, mean - self.mean)  # two infinite ones differ by nothing
        self.mean = self.mean + step / (number + 1)
        self.between += torch.where(step == 0, 0.0, step * (mean - self.mean))
        self.within += variance
        classes = _probabilities(site)
        if classes is not None:
            self.probabilities = classes if self.probabilities is None else self.probabilities + classes

    def prediction(self, levels: Sequence[float]) -> Prediction:
        count = len(self.samples)
        sd = ((self.within + self.between) / count).sqrt()
        sd = torch.where(self.mean.isinf(), torch.inf, sd)
        mean, spread = (each.movedim(self.axis, 0).numpy() for each in (self.mean, sd))
        quantiles, classes = np.moveaxis(self._quantiles(levels), self.axis, 1), None
        if self.probabilities is not None:
            more = self.probabilities.dim() - self.mean.dim()
            classes = (self.probabilities / count).movedim(self.axis - more, 0).numpy()
        return Prediction(mean, spread, quantiles, classes).at_entries(self.entries)

    def _quantiles(self, levels: Sequence[float]) -> np.ndarray:
        count, shape = len(self.samples), self.samples.shape[1:]
        at = torch.tensor(levels, dtype=torch.float64)
        some = self.samples.reshape(count, -1).split(max(1, _SORTED // count), dim=1)
        return torch.cat([each.double().quantile(at, dim=0) for each in some], dim=1).reshape(-1, *shape).numpy()


def _moments(site: Site) -> tuple[Tensor, Tensor]:
    """Mean and variance of an observed site's distribution; its sample and 0 where it does not tell them."""
    value = site["value"].double()
    fn = innermost(site["fn"])
    if isinstance(fn, Categorical):
        codes = torch.arange(fn.probs.shape[-1], dtype=torch.float64)
        mean = fn.probs.double() @ codes
        variance = fn.probs.double() @ codes**2 - mean**2
    else:
        try:
            mean, variance = site["fn"].mean.double(), site["fn"].variance.double()
        except (NotImplementedError, AttributeError):
            return value, torch.zeros_like(value)
        if getattr(fn.support, "is_discrete", False):  # of classes within a mixture
            mean, variance = torch.where(mean.isnan(), value, mean), torch.where(mean.isnan(), 0.0, variance)
    return mean.expand(value.shape), variance.expand(value.shape)


def _probabilities(site: Site) -> Tensor | None:
    """float64 [B, ..., K] where the site is one of classes."""
    fn: Any = innermost(site["fn"])
    if not isinstance(fn, (Categorical, OneHotCategorical, Multinomial)):
        return None
    shape = site["value"].shape if fn.event_shape else (*site["value"].shape, fn.probs.shape[-1])
    return fn.probs.double().expand(shape)
