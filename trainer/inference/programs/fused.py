"""The fused program: the pure step traced to one graph, scanned over a chunk's steps and compiled.

No Python runs between the steps of a chunk; on a GPU it launches each with one call. The number of slots is an input,
so a chunk ends at any step; seed, draws, N, learning rate, horizon and averaging are inputs too, so one compiled step
serves every rank and a whole sweep.

Shapes: as in `trainer.inference.programs.program`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trainer.distributed.comm import ALONE, Comm
from trainer.errors import UserError, first_line
from trainer.inference.model.noise import chunk_noise
from trainer.inference.model.plates import Batch
from trainer.inference.optim.rounds import State, Update
from trainer.inference.optim.variance_reduction import Preconditioner
from trainer.inference.programs.compiling import Compilation
from trainer.inference.programs.layout import Layout, with_a_second_slot
from trainer.inference.programs.program import ChunkResult, Eager, draw_numbers
from trainer.inference.programs.replay import Replay, Section
from trainer.inference.programs.row_strides import stored_by_number
from trainer.inference.programs.scan import Recipe, Scan, shapes_of
from trainer.inference.programs.sweep import Sweep, gives_gradients
from trainer.inference.programs.tracing import Traced, Untraceable, trace
from trainer.inference.step import Inference, StepInput, step_and_gradient

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def _drawn(
    size: tuple[int, int], seed: int, steps: range, draws: Tensor, row_id: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The noise of ``steps`` by torch."""
    when = torch.arange(steps.start, steps.stop, device=draws.device)
    return chunk_noise(size, seed, when, draws, row_id, dtype)


@dataclass
class Fused:
    """The same step as `Eager`, on the same noise, compiled when it is prepared (or first run)."""

    inference: Inference
    update: Update
    seed: int
    groups: Sequence[int]
    comm: Comm = ALONE
    sync_every: ClassVar[int] = 1
    stages: ClassVar[tuple[int, ...]] = ()
    _call: Section | None = field(default=None, init=False, repr=False)
    _constants: tuple[Tensor, ...] = field(default=(), init=False, repr=False)
    _noise_source: Callable[..., tuple[Tensor, Tensor | None]] = field(
        default_factory=lambda: _drawn, init=False, repr=False
    )
    _coming: Callable[[], Section] | None = field(default=None, init=False, repr=False)
    _compilation: Compilation | None = field(default=None, init=False, repr=False)
    _sweep: Sweep | None = field(default=None, init=False, repr=False)

    @property
    def reference(self) -> Eager:
        """The program that this one must equal."""
        return Eager(self.inference, self.update, self.seed, self.groups, self.comm)

    def begin(self, state: State, chunk: Batch, say: Callable[[str], None] = print) -> None:
        """Traces the step for chunks like ``chunk``, and has another process compile it unless that was done before.

        Returns at once; `prepare` waits for it. Raises Untraceable for what has to run eagerly, UserError for what the
        traces refuse.
        """
        self.abandon()
        if len(chunk.batch_rows) < 2:
            chunk = with_a_second_slot(chunk)
        step_of_tensors, (first, second) = self.flat(state, chunk.part(0, 2))
        traced = trace(step_of_tensors, first, second)
        numbers = self._numbers(state)
        rates = trace(self._rates, [state.step, *numbers], [state.step + 1, *numbers])
        self._constants = (*rates.constants, *traced.constants)
        with _compiler_errors():
            self._coming = self._made(traced, rates, state, chunk, say)

    def prepare(self, state: State, chunk: Batch, say: Callable[[str], None] = print) -> None:
        """Compiles for chunks like ``chunk`` and compares with the eager program at its first and last slot.

        Raises as `begin`, and UserError for what the comparison refuses.
        """
        if self._coming is None:
            self.begin(state, chunk, say)
        coming, self._coming = self._coming, None
        assert coming is not None
        if len(chunk.batch_rows) < 2:
            chunk = with_a_second_slot(chunk)
        with _compiler_errors():
            self._call = coming()
            for k in (0, len(chunk.batch_rows) - 1):
                self._compare(state, chunk.part(k, k + 1))
        if gives_gradients(self.inference, self.comm):
            self._sweep = Sweep.of(self._still, self.inference, state, chunk)

    def abandon(self) -> None:
        """Ends a compilation that `begin` began and nobody needs."""
        if self._compilation is not None:
            self._compilation.abandon()
        self._coming = self._compilation = None

    def _made(
        self, traced: Traced, rates: Traced, state: State, chunk: Batch, say: Callable[[str], None]
    ) -> Callable[[], Section]:
        """What gives the chunk as one compiled function, or on a GPU a step that is replayed."""
        if state.theta.device.type == "cuda":
            if self.comm.size > 1:
                raise Untraceable("a sum over GPUs is not captured yet")
            module = Scan(traced.graph, rates.graph, len(rates.constants))
            return lambda: Replay(module.before, torch.compile(module.step))
        if self.inference.model.evaluations > 1:
            stored_by_number(traced.graph, chunk.slot(0).slot(0).size)
        recipe = Recipe(
            traced.graph.code,
            rates.graph.code,
            len(rates.constants),
            shapes_of([*state.named().values()]),
            shapes_of([each[0] for each in (*self._noise(state, chunk.part(0, 1)), *self._layout(chunk).data(chunk))]),
            shapes_of(self._fixed(state)),
            str(torch.get_default_dtype()).removeprefix("torch."),
        )
        compilation = self._compilation = Compilation(recipe, say)

        def loaded() -> Section:
            shared = compilation.wait()
            self._noise_source = shared.noise
            return lambda carry, data, fixed: shared([*carry, *data, *fixed])

        return loaded

    def run(self, state: State, chunk: Batch, steps: int) -> ChunkResult:
        if self._call is None:
            self.prepare(state, chunk)
        assert self._call is not None
        chunk = chunk.part(0, steps)
        data = (*self._noise(state, chunk), *self._layout(chunk).data(chunk))
        carry = state.named()
        made = self._call([*carry.values()], data, self._fixed(state))
        after, (terms, norms, *_) = made[: len(carry)], made[len(carry) :]
        return ChunkResult(State.of_named(dict(zip(carry, after))), self.comm.sum(terms), norms)

    def sweep(self) -> Sweep | None:
        return self._sweep

    def _still(self, state: State, chunk: Batch, elements: Tensor) -> tuple[Tensor, Tensor]:
        """What `Sweep` takes: a chunk without a rate, by noise that is given."""
        assert self._call is not None
        num_obs, rate, *frame = self._numbers(state)
        fixed, carry = (num_obs, 0.0 * rate, *frame, *self._constants), [*state.named().values()]
        terms, _, gradients = self._call(carry, (elements, *self._layout(chunk).data(chunk)), fixed)[len(carry) :]
        return terms, gradients

    def flat(self, state: State, chunk: Batch) -> tuple[Callable[..., tuple[Tensor, ...]], list[list[Tensor]]]:
        """The pure step as a function of tensors in a row (carry, noise, data, rates, numbers), and these for each
        slot.
        """
        layout, names, carry = self._layout(chunk), tuple(state.named()), [*state.named().values()]
        data, numbers = layout.data(chunk), self._numbers(state)
        rates = torch.stack([self._rates(state.step + k, *numbers) for k in range(len(chunk.batch_rows))])
        each = (*self._noise(state, chunk), *data, rates)
        size = len(carry)

        def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
            before, (rates, num_obs, _, start, _, average_from) = tensors[:size], tensors[-6:]
            noise, batch = layout.slot(tensors[size:-6], before[1])
            inference = dataclasses.replace(self.inference, num_obs=num_obs)  # type: ignore[arg-type]
            frame: dict[str, Any] = {"start": start, "average_from": average_from}
            round_ = dataclasses.replace(self.update.rounds[-1], **frame)
            here = State.of_named(dict(zip(names, before)))
            made, terms, grad = step_and_gradient(inference, round_, self.comm, here, StepInput(noise, batch, rates))
            kept = (grad,) if gives_gradients(self.inference, self.comm) else ()
            return *made.named().values(), terms, grad.double().norm(), *kept

        return flat, [[*carry, *(e[k] for e in each), *numbers] for k in range(len(chunk.batch_rows))]

    def _rates(self, step: Tensor, num_obs: Tensor, lr: Tensor, start: Tensor, horizon: Tensor, _: Tensor) -> Tensor:
        """`Inference.rates` as a function of tensors."""
        last = self.update.rounds[-1]
        optimizer: Any = dataclasses.replace(last.optimizer, lr=lr)  # type: ignore[type-var]
        frame: dict[str, Any] = {"optimizer": optimizer, "start": start, "horizon": horizon}
        inference = dataclasses.replace(self.inference, num_obs=num_obs)  # type: ignore[arg-type]
        return inference.rates(dataclasses.replace(last, **frame), step)

    def _noise(self, state: State, chunk: Batch) -> tuple[Tensor, ...]:
        """The noise of the chunk's steps: [elements], [rows], each [K, ...]."""
        size, first, device = self.inference.guide.noise_size, int(state.step), state.theta.device
        draws = draw_numbers(self.groups, self.inference.objective.pairs, device)
        steps = range(first, first + len(chunk.batch_rows))
        elements, rows = self._noise_source(size, self.seed, steps, draws, chunk.row_id, state.theta.dtype)
        return *((elements,) if size[0] else ()), *(() if rows is None else (rows,))

    def _fixed(self, state: State) -> tuple[Tensor, ...]:
        """What is the same for all steps of a round."""
        return *self._numbers(state), *self._constants

    def _numbers(self, state: State) -> tuple[Tensor, ...]:
        """N, lr, and the round's start, horizon and first averaged step."""
        device, here = state.theta.device, self.update.at(int(state.step))
        reals = [self.inference.num_obs, here.optimizer.lr]
        whole = [here.start, here.horizon, here.average_from]
        return (
            *(torch.tensor(x, dtype=torch.float64, device=device) for x in reals),
            *(torch.tensor(x, device=device) for x in whole),
        )

    def _layout(self, chunk: Batch) -> Layout:
        return Layout.of(self.inference.guide.noise_size, chunk)

    def _compare(self, start: State, slot: Batch) -> None:
        """One step of both programs, by the optimizer's vectors: in theta Adam makes steps of lr of mere rounding.

        A posterior sd from the start where that is the mode: there the gradient may be nothing but rounding.
        """
        preconditioner = start.preconditioner
        for state in (start if preconditioner is None else _off(start, preconditioner), start):
            want, got = self.reference.run(state, slot, 1), self.run(state, slot, 1)
            if torch.isfinite(want.terms).all():
                break
        else:
            return  # reported with its site, as after any chunk
        pairs = [(want.terms, got.terms), *zip(want.state.moments.values(), got.state.moments.values())]
        error = max(float((a - b).norm() / self._size(a, preconditioner).clamp(min=1e-30)) for a, b in pairs)
        if not error <= _TOLERANCE[start.theta.dtype]:
            raise UserError(
                f"the compiled step differs from the eager one by {error:.1g} of the norm on the same noise: "
                "train with program=eager, and report the model."
            )

    @staticmethod
    def _size(vector: Tensor, preconditioner: Preconditioner | None) -> Tensor:
        """The norm that rounding is measured by: along a ridge, a whitened gradient is a small sum of large parts."""
        if preconditioner is None or vector.dtype == torch.float64 or len(vector) < len(preconditioner.factor):
            parts = vector
        else:
            first = vector[: len(preconditioner.factor)]
            plain = torch.linalg.solve_triangular(preconditioner.factor.T, first[:, None], upper=True)[:, 0]
            parts = torch.cat([preconditioner.factor.abs().T @ plain.abs(), vector[len(first) :]])
        size: Tensor = parts.norm()
        return size


def _off(state: State, preconditioner: Preconditioner) -> State:
    """The state a posterior sd away, in each of the whitened coordinates."""
    way = preconditioner.factor.sum(1)
    return state._replace(theta=state.theta + nn.functional.pad(way, (0, len(state.theta) - len(way))))


@contextmanager
def _compiler_errors() -> Iterator[None]:
    """Whatever the compiler stumbles over makes the step one that cannot be compiled."""
    try:
        yield
    except (UserError, Untraceable):
        raise
    except Exception as error:
        raise Untraceable(f"the compiler: {first_line(error)}") from error
