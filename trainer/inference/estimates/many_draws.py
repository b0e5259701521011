"""What is made of many draws of z: all together where the model allows it, one by one where it does not.

Up to some ten thousand rows Pyro's handlers take longer for a draw than its arithmetic does. `torch.vmap` runs the
model once for all draws. A model or guide that draws random numbers of its own is traced first, with the given noise in
their place, and vmap runs the trace. What neither can run (a branch on a value, `.item()`, a Gamma draw) goes one by
one.

Shapes: S draws, B rows, E normals of a draw, n of a row.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from trainer.inference.guides.mean_field import KL, Noise
from trainer.inference.model.noise import chunk_noise, mixed_seed
from trainer.inference.model.plates import Batch
from trainer.inference.model.ragged import maker, parts
from trainer.inference.model.vmapped import silent_vmap
from trainer.inference.model.written import Written
from trainer.inference.objectives.elbo import elbo_terms
from trainer.inference.objectives.objective import Terms
from trainer.inference.programs.sweep import Sweep
from trainer.inference.programs.tracing import trace
from trainer.inference.step import Inference

_BYTES = 64 * 2**20  # that the draws of a slice write, all operations together
_OF_NOISE = 64  # bytes written for a normal
_AGREE = {torch.float32: 1e-4, torch.float64: 1e-9}
_FEWEST = 8  # draws, for fewer of which it is not worth finding out


class Normals(NamedTuple):
    """The noise of S draws."""

    elements: Tensor
    """[S, E]."""
    rows: Tensor | None
    """[S, B, n]."""
    seeds: Sequence[int]
    """[S], for numbers that are no transformation of normals."""

    @classmethod
    def of(cls, elements: Tensor, rows: Tensor | None, seeds: Sequence[int], signs: Sequence[float]) -> "Normals":
        """Each of R draws, [R, E] and [R, B, n], with each of the ``signs``, one after the other: S, as seeds."""

        def signed(drawn: Tensor) -> Tensor:
            return torch.stack([sign * drawn for sign in signs], dim=1).flatten(0, 1)

        return cls(signed(elements), None if rows is None else signed(rows), seeds)

    def part(self, first: int, stop: int) -> "Normals":
        rows = None if self.rows is None else self.rows[first:stop]
        return Normals(self.elements[first:stop], rows, self.seeds[first:stop])

    def of_rows(self, part: int, parts: int) -> "Normals":
        """For part ``part`` of ``parts`` of the rows."""
        if self.rows is None or parts == 1:
            return self
        return self._replace(rows=self.rows[:, part_of(self.rows.shape[1], part, parts)])

    def noise(self, s: int) -> Noise:
        return Noise(self.elements[s], None if self.rows is None else self.rows[s], self.seeds[s])


def part_of(count: int, part: int, parts: int) -> slice:
    """Part ``part`` of ``parts`` of so many rows."""
    return slice(part * count // parts, (part + 1) * count // parts)


class Pairs(NamedTuple):
    """Of S antithetic pairs, nats at the scale of the batch."""

    elements: Tensor
    """[S, E]: the normals of each pair's first draw."""
    inside: Tensor
    """float64 [S]: the terms inside the data plate, the mean of both draws."""
    outside: Tensor
    """float64 [S]: the others."""


Evaluate = Callable[[dict[str, Tensor], Noise, Batch], Tensor]
"""(parameters, the noise of a draw, rows) -> [n]."""


class Together:
    """Evaluates model and guide at many draws, from ``fewest`` on together.

    The first draws decide how: two go one by one, and the first way that agrees with them to rounding is kept. Draws
    that it cannot take go one by one, so that what a draw gives does not depend on those before it.
    """

    def __init__(self, inference: Inference, evaluate: Evaluate, fewest: int = _FEWEST):
        self.inference, self.evaluate, self.fewest = inference, evaluate, fewest
        self.way: Callable[[Tensor, Batch, Normals], Tensor] | None = None
        """(theta [P], rows, S draws) -> [S, n], what ``evaluate`` makes of each; None: not known yet."""
        self._written: dict[Any, int] = {}
        self._graphs: dict[Any, Callable[..., Tensor]] = {}

    def __call__(
        self, theta: Tensor, batch: Batch, normals: Normals, of: Callable[[Tensor], Tensor] = lambda made: made
    ) -> Tensor:
        """``of`` what is made of the draws at ``theta`` [P], [S, n]: that itself, or its derivative."""
        if len(normals.seeds) < self.fewest:
            return of(self.one_by_one(theta, batch, normals))
        with silent_vmap():
            if self.way is None:
                self.way = self._decided(theta, batch, normals.part(0, 2), of)
            try:
                return of(self.way(theta, batch, normals))
            except Exception:  # a branch that the first draws did not take
                return of(self.one_by_one(theta, batch, normals))

    def _decided(
        self, theta: Tensor, batch: Batch, two: Normals, of: Callable[[Tensor], Tensor]
    ) -> Callable[[Tensor, Batch, Normals], Tensor]:
        want = of(self.one_by_one(theta, batch, two))
        tolerance = _AGREE[theta.dtype]
        for way in (self._mapped, self._traced):
            try:
                got = of(way(theta, batch, two))
            except Exception:  # noqa: S112  whatever vmap or the trace say of what they cannot run
                continue
            largest = float(want.nan_to_num().abs().max()) if want.numel() else 0.0
            if torch.allclose(got, want, rtol=tolerance, atol=tolerance * (1 + largest), equal_nan=True):
                return way
        return self.one_by_one

    def fitting(self, theta: Tensor, batch: Batch, normals: Normals) -> int:
        """How many draws fit a slice; ``normals``: any."""
        asked = batch.size, self.inference.model.fineness
        if asked not in self._written:
            with torch.no_grad(), Written() as written:
                self.one_by_one(theta, batch, normals.part(0, 1))
            elements, per_row = self.inference.guide.noise_size
            self._written[asked] = written.bytes + _OF_NOISE * (elements + batch.size * per_row)
        return max(1, _BYTES // self._written[asked])

    def one_by_one(self, theta: Tensor, batch: Batch, normals: Normals) -> Tensor:
        """The reference."""
        return torch.stack([self._made(theta, normals.noise(s), batch) for s in range(len(normals.seeds))])

    def _made(self, theta: Tensor, noise: Noise, batch: Batch) -> Tensor:
        parameters = self.inference.parameters
        with pyro.validation_enabled(False):
            return parameters.call(parameters.unflatten(theta), lambda values: self.evaluate(values, noise, batch))

    def _mapped(self, theta: Tensor, batch: Batch, normals: Normals) -> Tensor:
        def at(flat: Tensor, rows: Tensor | None) -> Tensor:
            return self._made(theta, Noise(flat, rows, 0), batch)

        dims = (0, None if normals.rows is None else 0)
        return torch.vmap(at, in_dims=dims)(normals.elements, normals.rows)

    def _traced(self, theta: Tensor, batch: Batch, normals: Normals) -> Tensor:
        makers = {name: maker(column) for name, column in batch.columns.items()}
        given = [part for column in batch.columns.values() for part in parts(column)]
        num_obs = torch.as_tensor(batch.num_obs, dtype=torch.float64, device=batch.valid.device)
        given += [batch.valid, batch.batch_rows, num_obs, *([] if batch.row_id is None else [batch.row_id])]
        drawn = [each for each in (normals.elements, normals.rows) if each is not None]

        def at(theta: Tensor, *tensors: Tensor) -> tuple[Tensor]:
            left, columns = list(tensors[len(drawn) :]), {}
            for name, (count, make) in makers.items():
                columns[name], left = make(*left[:count]), left[count:]
            noise = Noise(tensors[0], None if normals.rows is None else tensors[1], 0)
            valid, batch_rows, num_obs, *ids = left
            rows = Batch(columns, valid, batch_rows, ids[0] if ids else None, num_obs)
            return (self._made(theta, noise, rows),)

        shapes = self.inference.model.fineness, *((each.shape, each.dtype) for each in (theta, *given))
        if shapes not in self._graphs:
            with torch.no_grad():
                graph, constants = trace(at, *([theta.detach(), *(each[s] for each in drawn), *given] for s in (0, 1)))
            dims = (None, *(0 for _ in drawn), *(None for _ in (*given, *constants)))
            mapped = torch.vmap(torch.func.functionalize(graph), in_dims=dims)
            self._graphs[shapes] = lambda *tensors: mapped(*tensors, *constants)[0]
        return self._graphs[shapes](theta, *drawn, *given)


def terms_together(inference: Inference, kl: KL | None = None) -> Together:
    """The sums of the ELBO's terms inside and outside the data plate, float64 [2] of each draw, nats at the scale of
    the batch; ``kl``: another than the objective's.
    """

    def evaluate(values: dict[str, Tensor], noise: Noise, batch: Batch) -> Tensor:
        terms = elbo_terms(inference.model, inference.guide, values, noise, batch, kl or inference.objective.kl)
        return torch.stack([_sum(terms, scaled, batch) for scaled in (True, False)])

    return Together(inference, evaluate)


class Antithetic(NamedTuple):
    """The ELBO's terms at antithetic pairs of draws at one theta."""

    together: Together
    """From `terms_together`."""
    theta: Tensor
    """[P]."""
    seed: int
    sweep: Sweep | None = None
    """Evaluates what stands inside the data plate, where there is one; what stands outside is then not known."""

    def pairs(self, batch: Batch, number: int, first: int, stop: int) -> Iterator[Pairs]:
        """Pairs [first, stop) of the noise that block ``number`` has, in slices that fit memory."""
        if self.sweep is not None:
            elements = self._normals(batch, number, range(first, stop)).elements[::2]
            assert batch.row_id is not None
            inside = self.sweep(self.theta, batch.columns, batch.row_id, elements).inside
            yield Pairs(elements, inside, torch.full_like(inside, math.nan))
            return
        with torch.no_grad():
            start = first
            while start < stop:
                normals = self._normals(batch, number, range(start, start + 1))
                size = max(1, self.together.fitting(self.theta, batch, normals) // 2)
                if start + 1 < min(start + size, stop):
                    normals = self._normals(batch, number, range(start, min(start + size, stop)))
                found = self.together(self.theta, batch, normals).view(-1, 2, 2).mean(1)
                start += len(found)
                yield Pairs(normals.elements[::2], *found.unbind(1))

    def _normals(self, batch: Batch, number: int, pairs: range) -> Normals:
        elements, rows = normals_of(self.together.inference, self.theta, batch.row_id, self.seed, number, pairs)
        seeds = [mixed_seed(self.seed, number, pair) for pair in pairs for _ in range(2)]
        return Normals.of(elements, rows, seeds, (1.0, -1.0))


def normals_of(
    inference: Inference, theta: Tensor, row_id: Tensor | None, seed: int, step: int, numbers: range
) -> tuple[Tensor, Tensor | None]:
    """The normals of R draws ``numbers`` at a ``step``: elements [R, E] and, of rows ``row_id`` [B], [R, B, n]."""
    when, draws = (torch.tensor(each, device=theta.device) for each in ([step], [list(numbers)]))
    ids = None if row_id is None else row_id[None, None]
    elements, rows = chunk_noise(inference.guide.noise_size, seed, when, draws, ids, theta.dtype)
    return elements[0, 0], None if rows is None else rows[0, 0]


def _sum(terms: Terms, scaled: bool, batch: Batch) -> Tensor:
    zero = torch.zeros((), dtype=torch.float64, device=batch.valid.device)
    return sum((term.value for term in terms.values() if term.scaled == scaled), zero)
