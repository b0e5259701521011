"""Latents of rows: of each row their posterior given what is observed of it, averaged over draws of the globals.

Those that are integrated out in training come from `trainer.inference.rows.posterior`, those that a guide of the user's
holds from its draws. Nothing of a row depends on other rows.

Shapes: B rows, N rows in all, R draws, n numbers of a site, K states.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TypeVar, get_args

import numpy as np
import pyro
import torch
from torch import Tensor

from trainer.data.shards.index import Index
from trainer.errors import UserError
from trainer.inference.model.noise import row_noise
from trainer.inference.model.plates import Batch
from trainer.inference.model.promotion import Promoting
from trainer.inference.model.written import Written
from trainer.inference.rows.marginal import Marginal
from trainer.inference.rows.posterior import Moments, RowPosterior, weighted
from trainer.inference.rows.sites import value_by_row
from trainer.inference.step import Inference
from trainer.posterior.draws import dtype_of, held, unobserved
from trainer.posterior.fractions import refusing_fractions
from trainer.posterior.new_rows import NewRows, Progress
from trainer.posterior.predictive import Asked, OfRows, Prediction, joined, table_columns

Made = TypeVar("Made")
DRAWS = 32
"""Of the globals, where nobody gives another number."""
_OF_GUIDE = 256  # draws at the least, of a guide that holds latents of rows
_BYTES = 256 * 2**20  # that the evaluations of a part of the rows write
_WITH_GRADIENT = 3  # times as many, for the probabilities of states
_NODES, _FEWER_NODES, _POINTS = 41, 25, 32
_STREAM = 0x1A7E  # the step of the noise by row, which no other draw has


class Latents(dict[str, Prediction]):
    """Every latent of rows by its name, as `Posterior.predict` gives observed sites."""

    def __init__(self, found: Mapping[str, Prediction], row_id: np.ndarray, levels: Sequence[float]):
        super().__init__(found)
        self.row_id, self.levels = row_id, tuple(levels)
        """The rows' numbers [N], and those of the quantiles."""

    @classmethod
    def of(cls, parts: Sequence[tuple[np.ndarray, dict[str, Prediction]]], levels: Sequence[float]) -> "Latents":
        """From the latents of some rows after those of others."""
        names = parts[0][1] if parts else ()
        row_id = np.concatenate([np.zeros(0, dtype=np.int64), *(each for each, _ in parts)])
        return cls({name: joined([each[name] for _, each in parts]) for name in names}, row_id, levels)

    def table(self) -> dict[str, np.ndarray]:
        """The columns that `svi latents` writes."""
        columns = {"row_id": self.row_id}
        for name, each in self.items():
            columns |= table_columns(name, each, self.levels)
        return columns


class RowLatents:
    """Finds the latents of rows, a batch at a time. Raises UserError where the model has none."""

    def __init__(self, inference: Inference, theta: Tensor, rows: Batch, asked: Asked):
        self.inference, self.theta, self.asked = inference, theta, asked
        _, self.local = held(inference, theta, rows, asked.seed, 0)
        self.marginal = marginal_of(inference)
        if not self.local and self.marginal is None:
            raise UserError(
                f'the model has no latents of rows: all of them stand outside plate "{inference.model.plate}", and '
                "Posterior.summary and svi export have those."
            )
        self.count = max(asked.num_draws, _OF_GUIDE) if self.local else asked.num_draws
        self.globals = None if self.local else self._held(rows)

    def by_part(
        self, rows: NewRows, index: Index, progress: Progress | None
    ) -> Iterator[tuple[np.ndarray, dict[str, Prediction]]]:
        """Those of all ``rows``, packed as ``index`` tells, some rows at a time with their numbers.

        Raises UserError where something is not in them that is observed in training.
        """
        together = 0
        for batch in rows.watched(progress):
            with refusing_fractions(index, batch):
                if not together and unobserved(self.inference, self.theta, batch):
                    raise _unknown(rows.lacks)
                together = self.together(batch)
            for some in torch.arange(batch.size).split(together):
                part = batch.at(some)
                with refusing_fractions(index, part):
                    found = self(part)
                assert part.row_id is not None
                yield part.row_id.numpy(), found

    def together(self, batch: Batch) -> int:
        """How many rows fit a part."""
        if self.marginal is None:
            return batch.size
        rows, times = self._posterior(batch, self._at(batch)), _WITH_GRADIENT if self.marginal.sites.discrete else 1
        return max(
            1, min(batch.size, _BYTES * batch.size // max(1, times * self._in_model(batch, lambda: _written(rows))))
        )

    def __call__(self, batch: Batch) -> dict[str, Prediction]:
        """Those of the rows of ``batch``."""
        at, plate, levels = self._at(batch), self.inference.model.plate, self.asked.quantiles
        found = {}
        for name, site in self.local.items():
            values = torch.stack([value_by_row({**site, "value": each}, plate) for each in at[name]])
            weights = torch.full((len(values), 1, batch.size), 1 / len(values), dtype=torch.float64)
            found[name] = _of_moments(weighted(values[:, None], weights, levels))
        if self.marginal is not None:
            rows = self._posterior(batch, at)
            found |= self._in_model(batch, lambda: _integrated(rows, levels))
        return found

    def _at(self, batch: Batch) -> Mapping[str, Tensor]:
        return self._held(batch) if self.globals is None else self.globals

    def _held(self, batch: Batch) -> dict[str, Tensor]:
        """[R, ...] of every latent that the guide holds, by antithetic pairs of draws."""
        pairs = [(number, sign) for number in range(-(-self.count // 2)) for sign in (1.0, -1.0)]
        some = [held(self.inference, self.theta, batch, self.asked.seed, *each)[0] for each in pairs[: self.count]]
        return {name: torch.stack([each[name] for each in some]) for name in some[0]}

    def _posterior(self, batch: Batch, at: Mapping[str, Tensor]) -> RowPosterior:
        assert self.marginal is not None
        return RowPosterior(self.marginal, _columns(self.inference, batch), dict(at), self.count, _NODES, _POINTS)

    def _in_model(self, batch: Batch, work: Callable[[], Made]) -> Made:
        return in_model(self.inference, self.theta, batch, work)


class GivenRows:
    """Draws of all latents given what is observed of the rows of ``batch``, for `observations`."""

    def __init__(self, inference: Inference, theta: Tensor, batch: Batch, asked: Asked):
        self.inference, self.theta, self.batch, self.asked = inference, theta, batch, asked
        marginal = marginal_of(inference)
        assert marginal is not None
        assert batch.row_id is not None
        self.marginal, self.row_id = marginal, batch.row_id
        self.first, self.rows, self.u = self._prepared(0)

    def __call__(self, number: int) -> dict[str, Tensor]:
        """Those of draw ``number``; the discrete ones of rows by torch's own generator."""
        if not self.first <= number < self.first + self.rows.draws:
            self.first, self.rows, self.u = self._prepared(number)
        at = number - self.first
        u = None if self.u is None else self.u[at]
        of_rows = in_model(self.inference, self.theta, self.batch, lambda: self.rows.sites(at, u))
        return {name: each[at] for name, each in self.rows.at.items()} | of_rows

    def _prepared(self, first: int) -> tuple[int, RowPosterior, Tensor | None]:
        """As many draws from ``first`` as fit, and the numbers of the rows at each [R, B, d]."""
        one = self._posterior(range(first, first + 1))
        written = in_model(self.inference, self.theta, self.batch, lambda: _written(one))
        count = max(1, min(self.asked.num_draws - first, _BYTES // max(1, written)))
        rows = self._posterior(range(first, first + count))
        if not self.marginal.sites.continuous:
            return first, rows, None
        ids, draws = self.row_id.expand(count, -1), torch.arange(first, first + count)
        normal = row_noise(self.asked.seed, torch.tensor(_STREAM), draws, ids, 1, torch.float64)[..., 0]
        nodes = in_model(self.inference, self.theta, self.batch, rows.at_nodes)
        return first, rows, rows.drawn(nodes, torch.special.ndtr(normal))

    def _posterior(self, numbers: range) -> RowPosterior:
        some = [held(self.inference, self.theta, self.batch, self.asked.seed, number)[0] for number in numbers]
        at = {name: torch.stack([each[name] for each in some]) for name in some[0]}
        columns = _columns(self.inference, self.batch)
        return RowPosterior(self.marginal, columns, at, len(numbers), _FEWER_NODES, _POINTS)


def are_given(inference: Inference, theta: Tensor, batch: Batch, latents: OfRows, lacks: str) -> bool:
    """Whether latents of rows are drawn given what is observed of the rows of ``batch``.

    Raises UserError where that is asked for and cannot be.
    """
    if latents not in get_args(OfRows):
        raise UserError(f"latents={latents} is unknown: give {', '.join(get_args(OfRows))}.")
    if latents == "prior" or not follow_from_rows(inference):
        return False
    given = not unobserved(inference, theta, batch)
    if latents == "posterior" and not given:
        raise _unknown(lacks)
    return given


def follow_from_rows(inference: Inference) -> bool:
    """Whether latents of rows are known from what is observed of a row, by an integral or an encoder."""
    return marginal_of(inference) is not None or bool(inference.model.encoded)


def drawn_latents(
    inference: Inference, theta: Tensor, batch: Batch, asked: Asked, given: bool
) -> Callable[[int], Mapping[str, Tensor]] | None:
    """What `observations` takes: latents of the rows ``given`` what is observed of them, or from their prior."""
    encoded = {each.name for each in inference.model.encoded}
    if given and marginal_of(inference) is not None:
        return GivenRows(inference, theta, batch, asked)
    if given or not encoded:
        return None

    def others(number: int) -> dict[str, Tensor]:
        known = held(inference, theta, batch, asked.seed, number)[0]
        return {name: value for name, value in known.items() if name not in encoded}

    return others


def _unknown(lacks: str) -> UserError:
    return UserError(
        f"{lacks}, and what is observed of a row in training has to be given, since its latents follow from that: add "
        "the column."
    )


def marginal_of(inference: Inference) -> Marginal | None:
    """The model with its latents of rows integrated out; None where none are."""
    return inference.model.fn if isinstance(inference.model.fn, Marginal) else None


def in_model(inference: Inference, theta: Tensor, batch: Batch, work: Callable[[], Made]) -> Made:
    """``work()``, within which the model has its fitted parameters, and whole numbers of ``batch`` multiply."""
    whole = any(isinstance(each, Tensor) and not each.is_floating_point() for each in batch.columns.values())
    parameters = inference.parameters
    with dtype_of(theta), pyro.validation_enabled(False), Promoting() if whole else nullcontext():
        return parameters.call(parameters.unflatten(theta.detach()), lambda _: work())


def _columns(inference: Inference, batch: Batch) -> dict[str, Tensor]:
    """What the model takes of the rows."""
    return {name: batch.columns[name] for name in inference.model.generative.own if name in batch.columns}


def _written(rows: RowPosterior) -> int:
    """About how many bytes all evaluations of the rows write."""
    with torch.no_grad(), Written() as written:
        rows.once()
    total: int = written.bytes * rows.evaluations
    return total


def _integrated(rows: RowPosterior, levels: Sequence[float]) -> dict[str, Prediction]:
    nodes, shares = rows.known()
    found = {}
    if nodes is not None:
        found = {name: _of_moments(each) for name, each in rows.moments(nodes, levels).items()}
    found |= {name: _of_states(each.values, shares[name], levels) for name, each in rows.states().items()}
    entries = rows.entries()
    return {name: each.at_entries(entries[name]) for name, each in found.items()}


def _of_moments(found: Moments) -> Prediction:
    mean, sd, quantiles = (each.cpu().numpy() for each in found)
    return Prediction(mean, sd, quantiles)


def _of_states(values: Tensor, shares: Tensor, levels: Sequence[float]) -> Prediction:
    """Of ``shares`` [B, K, n]; where a state is a vector, its number stands for it."""
    codes = torch.arange(len(values)) if values.dim() > 1 else values
    probabilities = shares.movedim(1, -1)
    codes = codes.to(probabilities)
    mean = probabilities @ codes
    sd = (probabilities @ codes**2 - mean**2).clamp(min=0).sqrt()
    below = probabilities.cumsum(-1)
    places = [(below < level * below[..., -1:]).sum(-1).clamp(max=len(codes) - 1) for level in levels]
    quantiles = torch.stack([codes[place] for place in places]) if places else mean.new_zeros(0, *mean.shape)
    made = Moments(mean, sd, quantiles)
    return _of_moments(made)._replace(probabilities=probabilities.cpu().numpy())
