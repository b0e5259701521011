"""The fused program: the pure step traced to one graph, scanned over a chunk's steps and compiled, noise included.

No Python runs between the steps of a chunk; on a GPU it launches each with one call. The number of slots is an input,
so a chunk ends at any step; seed, draws, N, learning rate, horizon and averaging are inputs too, so one compiled step
serves every rank and a whole sweep.

Shapes: as in `trainer.svi.programs`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from trainer.cache import cache_folder
from trainer.errors import UserError
from trainer.svi import noise as noise_source
from trainer.svi.native import compiled
from trainer.svi.noise import chunk_noise
from trainer.svi.programs import Chunk, ChunkResult, Eager, alone, draw_numbers
from trainer.svi.replay import Replay, Section
from trainer.svi.rows import Column, cat, maker, parts, rolled
from trainer.svi.step import Inference, State, StepBatch, StepNoise, Update, step
from trainer.svi.tracing import Traced, Untraceable, trace
from trainer.svi.variance import Whitening

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


@dataclass
class Fused:
    """The same step as `Eager`, on the same noise, compiled when it is prepared (or first run)."""

    inference: Inference
    update: Update
    seed: int
    groups: Sequence[int]
    world_size: int = 1
    reduce: Callable[[Tensor], Tensor] = alone
    """Sums over the ranks by a functional collective, which a graph can hold."""
    sync_every = 1
    _call: Section | None = field(default=None, init=False, repr=False)
    _constants: tuple[Tensor, ...] = field(default=(), init=False, repr=False)

    @property
    def eager(self) -> Eager:
        """The program that this one must equal."""
        return Eager(self.inference, self.update, self.seed, self.groups, self.world_size, self.reduce)

    def prepare(self, state: State, chunk: Chunk, say: Callable[[str], None] = print) -> None:
        """Compiles for chunks like ``chunk`` and compares with the eager program at its first and last slot.

        Raises Untraceable for what has to run eagerly, UserError for what the traces or the comparison refuse.
        """
        if len(chunk.batch_rows) < 2:
            chunk = _with_a_second_slot(chunk)
        step_of_tensors, (first, second) = self.flat(state, chunk.part(0, 2))
        traced = trace(step_of_tensors, first, second)
        layout, numbers = self._layout(chunk), self._numbers(state)
        rates = trace(self._rates, [state.step, *numbers], [state.step + 1, *numbers])
        self._constants = (*rates.constants, *traced.constants)
        try:
            module = _Scan(traced, rates, layout, state.theta.dtype)
            self._call = self._made(module, _carry(state), layout.data(chunk), self._fixed(state), say)
            for k in (0, len(chunk.batch_rows) - 1):
                self._compare(state, chunk.part(k, k + 1))
        except (UserError, Untraceable):
            raise
        except Exception as error:
            raise Untraceable(f"the compiler: {str(error).strip().splitlines()[0]}") from error

    def _made(
        self,
        module: "_Scan",
        carry: tuple[Tensor, ...],
        data: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        say: Callable[[str], None],
    ) -> Section:
        """The chunk as one compiled function, or on a GPU as a step that is replayed."""
        if carry[0].device.type == "cuda":
            if self.world_size > 1:
                raise Untraceable("a sum over GPUs is not captured yet")
            return Replay(module.before, torch.compile(module.step))
        slots = torch.export.Dim("slots", min=1)
        inputs = (carry, data, fixed)
        dynamic: tuple[Any, ...] = (
            tuple({} for _ in carry),
            tuple({0: slots} for _ in data),
            tuple({} for _ in fixed),
        )
        shapes = [f"{x.dtype}{tuple(x.shape)}" for x in (*carry, *fixed, *(x[0] for x in data))]
        ours = [inspect.getsource(noise_source), inspect.getsource(_Scan)]
        graphs = [module.traced.graph.code, module.rates.graph.code, str(module.layout)]
        shared = compiled(module, inputs, dynamic, "\n".join([*graphs, *shapes, *ours]), cache_folder(), say)
        return lambda carry, data, fixed: shared([*carry, *data, *fixed])

    def run(self, state: State, chunk: Chunk, steps: int) -> ChunkResult:
        if self._call is None:
            self.prepare(state, chunk)
        assert self._call is not None
        data = self._layout(chunk).data(chunk.part(0, steps))
        *carry, terms, norms = self._call(_carry(state), data, self._fixed(state))
        return ChunkResult(_state(carry), self.reduce(terms), norms)

    def flat(self, state: State, chunk: Chunk) -> tuple[Callable[..., tuple[Tensor, ...]], list[list[Tensor]]]:
        """The pure step as a function of tensors in a row (carry, noise, data, rates, numbers), and these for each
        slot."""
        layout, carry, device = self._layout(chunk), _carry(state), state.theta.device
        data, numbers = layout.data(chunk), self._numbers(state)
        rates = torch.stack([self._rates(state.step + k, *numbers) for k in range(len(chunk.batch_rows))])
        each = (*layout.noise(*self._stream(device), state.step, data, state.theta.dtype), *data, rates)
        size = len(carry)

        def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
            before, (rates, num_obs, _, start, _, average_from) = tensors[:size], tensors[-6:]
            noise, batch = layout.slot(tensors[size:-6], before[1])
            inference = dataclasses.replace(self.inference, num_obs=num_obs)  # type: ignore[arg-type]
            frame: dict[str, Any] = {"start": start, "average_from": average_from}
            update = dataclasses.replace(self.update, **frame)
            made, terms, norm = step(
                inference, update, self.reduce, self.world_size, _state(before), noise, batch, rates
            )
            return *_carry(made), terms, norm

        return flat, [[*carry, *(e[k] for e in each), *numbers] for k in range(len(chunk.batch_rows))]

    def _rates(self, step: Tensor, num_obs: Tensor, lr: Tensor, start: Tensor, horizon: Tensor, _: Tensor) -> Tensor:
        """`Update.rates` as a function of tensors."""
        optimizer: Any = dataclasses.replace(self.update.optimizer, lr=lr)  # type: ignore[type-var]
        frame: dict[str, Any] = {"start": start, "horizon": horizon}
        return dataclasses.replace(self.update, optimizer=optimizer, **frame).rates(step, num_obs)  # type: ignore[arg-type]

    def _fixed(self, state: State) -> tuple[Tensor, ...]:
        """What is the same for all steps of a round."""
        return *self._stream(state.theta.device), *self._numbers(state), *self._constants

    def _stream(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Seed and draws [A, R]: which noise is this rank's."""
        return torch.tensor(self.seed, device=device), draw_numbers(self.groups, self.inference.objective.pairs, device)

    def _numbers(self, state: State) -> tuple[Tensor, ...]:
        """N, lr, and the round's start, horizon and first averaged step."""
        device, update = state.theta.device, self.update.at(int(state.step))
        reals = [self.inference.num_obs, update.optimizer.lr]
        whole = [update.start, update.horizon, update.average_from]
        return (
            *(torch.tensor(x, dtype=torch.float64, device=device) for x in reals),
            *(torch.tensor(x, device=device) for x in whole),
        )

    def _layout(self, chunk: Chunk) -> "_Layout":
        makers = tuple((name, *maker(column)) for name, column in chunk.columns.items())
        return _Layout(self.inference.guide.noise_size, makers, chunk.row_id is not None)

    def _compare(self, start: State, slot: Chunk) -> None:
        """One step of both programs, by the optimiser's vectors: in theta Adam makes steps of lr of mere rounding.

        A posterior sd from the start where that is the mode: there the gradient may be nothing but rounding.
        """
        whitening = self.update.split(start.slots)[1]
        for state in (start if whitening is None else _off(start, whitening), start):
            want, got = self.eager.run(state, slot, 1), self.run(state, slot, 1)
            if torch.isfinite(want.terms).all():
                break
        else:
            return  # reported with its site, as after any chunk
        own = self.update.split(want.state.slots)[0]
        pairs = [(want.terms, got.terms), *zip(own, got.state.slots)]
        error = max(float((a - b).norm() / self._size(a, whitening).clamp(min=1e-30)) for a, b in pairs)
        if not error <= _TOLERANCE[start.theta.dtype]:
            raise UserError(
                f"the compiled step differs from the eager one by {error:.1g} of the norm on the same noise: "
                "train with program=eager, and tell us of the model."
            )

    @staticmethod
    def _size(vector: Tensor, whitening: Whitening | None) -> Tensor:
        """The norm that rounding is measured by: along a ridge, a whitened gradient is a small sum of large parts."""
        if whitening is None or vector.dtype == torch.float64 or len(vector) < len(whitening.factor):
            return vector.norm()
        first = vector[: len(whitening.factor)]
        plain = torch.linalg.solve_triangular(whitening.factor.T, first[:, None], upper=True)[:, 0]
        return torch.cat([whitening.factor.abs().T @ plain.abs(), vector[len(first) :]]).norm()


def _off(state: State, whitening: Whitening) -> State:
    """The state a posterior sd away, in each of the whitened coordinates."""
    way = whitening.factor.sum(1)
    return state._replace(theta=state.theta + nn.functional.pad(way, (0, len(state.theta) - len(way))))


class _Scan(nn.Module):
    """A chunk: noise and rates for all its steps at once, then the traced step over the slots."""

    def __init__(self, traced: Traced, rates: Traced, layout: "_Layout", dtype: torch.dtype):
        super().__init__()
        self.traced, self.rates, self.layout, self.dtype = traced, rates, layout, dtype

    def before(self, carry: Sequence[Tensor], data: Sequence[Tensor], fixed: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the steps take besides carry and ``fixed``, each [K, ...]."""
        seed, draws, *numbers = fixed[:7]
        noise = self.layout.noise(seed, draws, carry[0], data, self.dtype)
        steps = carry[0] + torch.arange(data[0].shape[0], device=carry[0].device)
        constants = fixed[7 : 7 + len(self.rates.constants)]
        return *noise, *data, torch.vmap(lambda at: self.rates.graph(at, *numbers, *constants))(steps)

    def step(self, carry: Sequence[Tensor], here: Sequence[Tensor], fixed: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The traced step: carry, terms, norm."""
        return self.traced.graph(*carry, *here, *fixed[2:7], *fixed[7 + len(self.rates.constants) :])

    def forward(
        self, carry: tuple[Tensor, ...], data: tuple[Tensor, ...], fixed: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        def body(carry: tuple[Tensor, ...], here: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            *after, terms, norm = self.step(carry, here, fixed)
            return tuple(each.clone() for each in after), (terms, norm)

        last, (terms, norms) = scan(body, carry, self.before(carry, data, fixed))
        return *last, terms, norms


@dataclass(frozen=True)
class _Layout:
    """The order of a slot's tensors: [elements], [rows], valid, batch_rows, [row_id], columns."""

    noise_size: tuple[int, int]
    columns: tuple[tuple[str, int, Callable[..., Column]], ...]
    """Of each its name, how many tensors it has, and what makes it of them."""
    with_row_id: bool

    def data(self, chunk: Chunk) -> tuple[Tensor, ...]:
        """All of a chunk that comes from outside, each [K, ...]."""
        row_id = () if chunk.row_id is None else (chunk.row_id,)
        return (
            chunk.valid,
            chunk.batch_rows,
            *row_id,
            *(part for name, *_ in self.columns for part in parts(chunk.columns[name])),
        )

    def noise(
        self, seed: Tensor, draws: Tensor, first: Tensor, data: Sequence[Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """The noise of the chunk ``data`` that starts at step ``first``; each [K, ...]."""
        steps = first + torch.arange(data[0].shape[0], device=first.device)
        row_id = data[2] if self.with_row_id else None
        elements, rows = chunk_noise(self.noise_size, seed, steps, draws, row_id, dtype)
        return *((elements,) if self.noise_size[0] else ()), *(() if rows is None else (rows,))

    def slot(self, tensors: Sequence[Tensor], theta: Tensor) -> tuple[StepNoise, StepBatch]:
        """What a step takes, from its tensors in a row."""
        left = list(tensors)
        elements = left.pop(0) if self.noise_size[0] else None
        rows = left.pop(0) if self.noise_size[1] else None
        valid, batch_rows = left.pop(0), left.pop(0)
        row_id = left.pop(0) if self.with_row_id else None
        groups = len(valid)
        if elements is None:
            assert rows is not None or not self.noise_size[1]
            elements = theta.new_zeros(groups, 1 if rows is None else rows.shape[1], 0)
        pairs = elements.shape[1]
        noise = StepNoise(elements, rows, ((0,) * pairs,) * groups)
        columns = {}
        for name, count, make in self.columns:
            columns[name], left = make(*left[:count]), left[count:]
        return noise, StepBatch(columns, valid, batch_rows, row_id)


def _carry(state: State) -> tuple[Tensor, ...]:
    return state.step, state.theta, state.average, state.averaged, *state.slots


def _state(carry: Sequence[Tensor]) -> State:
    at, theta, average, averaged, *slots = carry
    return State(at, theta, tuple(slots), average, averaged)


def _with_a_second_slot(chunk: Chunk) -> Chunk:
    """A chunk of one slot with another after it, of the same rows in another order."""
    columns = {name: cat([each, rolled(each)]) for name, each in chunk.columns.items()}
    row_id = None if chunk.row_id is None else torch.cat([chunk.row_id, chunk.row_id.roll(1, dims=2)])
    return Chunk(columns, chunk.valid.repeat(2, 1), chunk.batch_rows.repeat(2), row_id)
