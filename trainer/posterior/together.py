"""The ELBO's terms at many draws of z: all together where the model allows it, one by one where it does not.

Up to some ten thousand rows Pyro's handlers take longer for a draw than its arithmetic does. `torch.vmap` runs the
model once for all draws. A model or guide that draws random numbers of its own is traced first, with the given noise in
their place, and vmap runs the trace. What neither can run (a branch on a value, `.item()`, a Gamma draw) goes one by
one.

Shapes: S draws, B rows, E normals of a draw, n of a row.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.svi.guides import KL, Noise
from trainer.svi.noise import element_noise, mixed_seed, row_noise
from trainer.svi.objective import Term, elbo_terms
from trainer.svi.plates import Batch
from trainer.svi.rows import maker, parts
from trainer.svi.step import Inference
from trainer.svi.tracing import trace

_BYTES = 64 * 2**20  # that the draws of a slice write, all operations together
_OF_NOISE = 64  # bytes written for a normal
_AGREE = {torch.float32: 1e-4, torch.float64: 1e-9}
_FEWEST = 4  # pairs, for fewer of which it is not worth finding out


class Normals(NamedTuple):
    """The noise of S draws."""

    elements: Tensor
    """[S, E]."""
    rows: Tensor | None
    """[S, B, n]."""
    seeds: Sequence[int]
    """[S], for numbers that are no transformation of normals."""

    def first(self, count: int) -> "Normals":
        rows = None if self.rows is None else self.rows[:count]
        return Normals(self.elements[:count], rows, self.seeds[:count])

    def noise(self, s: int) -> Noise:
        return Noise(self.elements[s], None if self.rows is None else self.rows[s], self.seeds[s])


class Pairs(NamedTuple):
    """Of S antithetic pairs, nats at the scale of the batch."""

    elements: Tensor
    """[S, E]: the normals of each pair's first draw."""
    inside: Tensor
    """float64 [S]: the terms inside the data plate, the mean of both draws."""
    outside: Tensor
    """float64 [S]: the others."""


class Together:
    """Evaluates `elbo_terms` with the exact KL, where that is known, at ``theta`` [P].

    The first draws decide how: two go one by one, and the first way that agrees with them to rounding is kept.
    """

    def __init__(self, inference: Inference, theta: Tensor, seed: int, kl: KL = "analytic"):
        self.inference, self.theta, self.seed, self.kl = inference, theta, seed, kl
        self.way: Callable[[Batch, Normals], Tensor] | None = None
        """Gives [S, 2], inside and outside; None: not known yet."""
        self._written: dict[int, int] = {}
        self._graphs: dict[Any, Callable[..., Tensor]] = {}

    def pairs(self, batch: Batch, number: int, first: int, stop: int) -> Iterator[Pairs]:
        """Pairs [first, stop) of the noise that block ``number`` has, in slices that fit memory."""
        with _quiet():
            if self.way is None and stop - first >= _FEWEST:
                self._decide(batch, self._normals(batch, number, range(first, first + 1)))
            size = self._pairs_of_slice(batch, number, first)
        for start in range(first, stop, size):
            here = range(start, min(start + size, stop))
            normals = self._normals(batch, number, here)
            with _quiet():
                found = self._evaluated(batch, normals).view(len(here), 2, 2).mean(1)
            yield Pairs(normals.elements[::2], *found.unbind(1))

    def _decide(self, batch: Batch, two: Normals) -> None:
        want = self.one_by_one(batch, two)
        tolerance = _AGREE[self.theta.dtype]
        for way in (self._mapped, self._traced):
            try:
                got = way(batch, two)
            except Exception:  # whatever vmap or the trace say of what they cannot run
                continue
            if torch.allclose(got, want, rtol=tolerance, atol=tolerance, equal_nan=True):
                self.way = way
                return
        self.way = self.one_by_one

    def _pairs_of_slice(self, batch: Batch, number: int, first: int) -> int:
        if batch.size not in self._written:
            with _Written() as written:
                self.one_by_one(batch, self._normals(batch, number, range(first, first + 1)).first(1))
            elements, per_row = self.inference.guide.noise_size
            self._written[batch.size] = written.bytes + _OF_NOISE * (elements + batch.size * per_row)
        return max(1, _BYTES // (2 * self._written[batch.size]))

    def _evaluated(self, batch: Batch, normals: Normals) -> Tensor:
        if self.way is None or len(normals.seeds) <= 2:
            return self.one_by_one(batch, normals)
        try:
            return self.way(batch, normals)
        except Exception:  # a branch that the first draws did not take
            self.way = self.one_by_one
            return self.one_by_one(batch, normals)

    def one_by_one(self, batch: Batch, normals: Normals) -> Tensor:
        """The reference."""
        return torch.stack([self._terms(normals.noise(s), batch) for s in range(len(normals.seeds))])

    def _terms(self, noise: Noise, batch: Batch) -> Tensor:
        """float64 [2]: the sums of the terms inside and outside the data plate."""
        inference = self.inference

        def evaluate(values: dict[str, Tensor]) -> Tensor:
            terms = elbo_terms(inference.model, inference.guide, values, noise, batch, self.kl)
            return torch.stack([_sum(terms, scaled, batch) for scaled in (True, False)])

        return inference.parameters.call(inference.parameters.unflatten(self.theta), evaluate)

    def _mapped(self, batch: Batch, normals: Normals) -> Tensor:
        def at(flat: Tensor, rows: Tensor | None) -> Tensor:
            return self._terms(Noise(flat, rows, 0), batch)

        dims = (0, None if normals.rows is None else 0)
        return torch.vmap(at, in_dims=dims)(normals.elements, normals.rows)

    def _traced(self, batch: Batch, normals: Normals) -> Tensor:
        makers = {name: maker(column) for name, column in batch.columns.items()}
        given = [part for column in batch.columns.values() for part in parts(column)]
        given += [batch.valid, batch.scale] + [each for each in (batch.row_id,) if each is not None]
        drawn = [each for each in (normals.elements, normals.rows) if each is not None]

        def at(*tensors: Tensor) -> tuple[Tensor]:
            left, columns = list(tensors[len(drawn) :]), {}
            for name, (count, make) in makers.items():
                columns[name], left = make(*left[:count]), left[count:]
            noise = Noise(tensors[0], None if normals.rows is None else tensors[1], 0)
            return (self._terms(noise, Batch(columns, *left)),)

        shapes = tuple((each.shape, each.dtype) for each in given)
        if shapes not in self._graphs:
            graph, constants = trace(at, *([*(each[s] for each in drawn), *given] for s in (0, 1)))
            dims = (*(0 for _ in drawn), *(None for _ in (*given, *constants)))
            mapped = torch.vmap(torch.func.functionalize(graph), in_dims=dims)
            self._graphs[shapes] = lambda *tensors: mapped(*tensors, *constants)[0]
        return self._graphs[shapes](*drawn, *given)

    def _normals(self, batch: Batch, number: int, pairs: range) -> Normals:
        """Each pair's draw and its antithesis, one after the other."""
        device, dtype = self.theta.device, self.theta.dtype
        when, draws = torch.tensor(number, device=device), torch.tensor(list(pairs), device=device)
        elements, per_row = self.inference.guide.noise_size
        flat, rows = _both(element_noise(self.seed, when, draws, elements, dtype)), None
        if per_row:
            assert batch.row_id is not None
            ids = batch.row_id.expand(len(pairs), -1)
            rows = _both(row_noise(self.seed, when, draws, ids, per_row, dtype))
        return Normals(flat, rows, [mixed_seed(self.seed, number, pair) for pair in pairs for _ in range(2)])


def _both(drawn: Tensor) -> Tensor:
    """[2 S, ...]: eps, -eps, of each of [S, ...]."""
    return torch.stack([drawn, -drawn], dim=1).flatten(0, 1)


def _sum(terms: dict[str, Term], scaled: bool, batch: Batch) -> Tensor:
    zero = torch.zeros((), dtype=torch.float64, device=batch.valid.device)
    return sum((term.value for term in terms.values() if term.scaled == scaled), zero)


@contextmanager
def _quiet() -> Iterator[None]:
    """No gradients, no validation, no warnings of operations that vmap takes one by one."""
    warn: Any = vars(torch._C._functorch)["_set_vmap_fallback_warning_enabled"]
    warn(False)
    try:
        with torch.no_grad(), pyro.validation_enabled(False):
            yield
    finally:
        warn(True)


class _Written(TorchDispatchMode):
    """Counts the bytes that operations write."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False):
            tensors = made if isinstance(made, tuple | list) else (made,)
            self.bytes += sum(each.nbytes for each in tensors if isinstance(each, Tensor))
        return made
