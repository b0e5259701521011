"""The Lightning module: a training step is a chunk of K optimization steps, run by a program. Thin on purpose.

Our own integer step, in the state, is the only truth about progress.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from trainer.distributed.comm import Comm
from trainer.engine.datamodule import ChunkData
from trainer.errors import UserError
from trainer.inference.checks.model_checks import finite_or_raise
from trainer.inference.model.plates import Batch
from trainer.inference.optim.rounds import State, Update
from trainer.inference.programs.nan_rows import nan_rows
from trainer.inference.programs.program import ChunkResult, Program
from trainer.inference.programs.tracing import Untraceable
from trainer.inference.step import Inference

_CHUNK_SECONDS, _CHUNK_BYTES = 0.1, 128 * 2**20
_TRIAL_SLOTS = 4
_COMPARE_EVERY = 64  # chunks: some seconds


class ChunkModule(pl.LightningModule):
    """Trains ``theta`` of an `Inference` with a `Program`, once `begin` has given them; `last` holds the newest chunk's
    metrics.
    """

    inference: Inference
    update: Update
    program: Program
    state: State

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.last: dict[str, float] = {}
        self.interruptible: Callable[[], AbstractContextManager[None]] = nullcontext
        """In this a signal ends the run at once: for what takes long and changes no state."""
        self._chunks = 0

    def begin(
        self,
        update: Update,
        program: Program,
        state: State,
        data: ChunkData | None,
        seconds: float = 0.0,
        say: Callable[[str], None] = print,
    ) -> None:
        """Gives the module what it trains.

        ``data``: None where whoever trains gives it chunks of one step each; ``seconds``: those of the start, or before
        a resume; ``say``: tells the user a sentence.
        """
        self.inference, self.update, self.program, self.state = program.inference, update, program, state
        self.data, self.say = data, say
        self.seconds_before = seconds
        self._started = self._previous = time.monotonic()

    @property
    def comm(self) -> Comm:
        """The ranks."""
        return self.program.comm

    @property
    def step(self) -> int:
        """Steps taken."""
        return int(self.state.step)

    @property
    def theta(self) -> Tensor:
        """The result [P]: the averaged iterates once averaging has begun, else the last one."""
        return self.state.average

    @property
    def seconds(self) -> float:
        """Wall seconds of training, those of the search for a start and before a resume included."""
        return self.seconds_before + time.monotonic() - self._started

    def configure_optimizers(self) -> Any:
        return None

    def on_fit_start(self) -> None:
        device = self.device
        self.state = self.state.each(lambda tensor: self.comm.from_first(tensor.to(device)))
        data = self.data
        assert data is not None
        if len(set(self.comm.gathered(data.plan.identity))) > 1:
            raise UserError(
                "the ranks plan different batches, since their machines differ in the room for shards: give them the "
                "same data.cache.bytes=."
            )
        try:
            most = data.most_slots(self.program.sync_every)
            chunk = self.transfer_batch_to_device(data.trial_chunk(_TRIAL_SLOTS), device, 0)
            error = self._checked(chunk)
        except UserError as found:
            error = found
        self.comm.raise_together(error, device)
        self._most, self._chosen = most, data.slots
        self._get_ready(chunk)

    def _get_ready(self, chunk: Batch) -> None:
        """Prepares the program for what comes, and chooses the size of chunks by its speed."""
        self._ready_at = self.step
        self._prepare(chunk)
        slots = self._chosen or self._slots(chunk.part(0, min(_TRIAL_SLOTS, len(chunk.batch_rows))))
        assert self.data is not None
        self.data.slots = min(self._most, slots)

    def renew(self) -> None:
        """Prepares the program anew, since the model computes otherwise than before."""
        assert self.data is not None
        self.program.abandon()
        with self.interruptible():
            self._get_ready(self.transfer_batch_to_device(self.data.trial_chunk(_TRIAL_SLOTS), self.device, 0))

    def _prepare(self, chunk: Batch) -> None:
        """Prepares the program, or falls back on the eager one, on all ranks alike."""
        failed = False
        try:
            self.program.prepare(self.state, chunk, self.say)
        except Untraceable as error:
            failed = True
            self.say(f"training with program=eager, since the step cannot be compiled ({error})")
        if self.comm.largest(int(failed), self.device):
            if not failed:
                self.say("training with program=eager, since another rank cannot compile the step")
            self.program.abandon()
            self.program = self.program.reference

    def _slots(self, chunk: Batch) -> int:
        """Steps of a chunk: those of a tenth of a second, in bounded memory. No result depends on them."""
        count = len(chunk.batch_rows)
        began = time.monotonic()
        self.program.run(self.state, chunk, count)
        per_step = (time.monotonic() - began) / count
        held = sum(each.nbytes for each in (*chunk.columns.values(), chunk.valid)) // count
        held += 4 * self.inference.guide.noise_size[0] * chunk.valid.shape[1]
        unit = self.program.sync_every
        slots = int(min(_CHUNK_SECONDS / per_step, _CHUNK_BYTES / held)) // unit * unit
        return self.comm.largest(max(unit, slots), self.device)

    def on_train_start(self) -> None:
        self._started = self._previous = time.monotonic()

    def training_step(self, chunk: Batch | UserError, batch_idx: int) -> None:
        self.comm.raise_together(chunk if isinstance(chunk, UserError) else self._checked(chunk), self.device)
        assert isinstance(chunk, Batch)
        if self.step in self.program.stages and self.step != self._ready_at:
            with self.interruptible():
                self._get_ready(chunk)
        steps = len(chunk.batch_rows)
        result = self.program.run(self.state, chunk, steps)
        self._refuse_not_finite(result, chunk)
        self.state = result.state
        self._record(result, chunk)
        self._chunks += 1
        if self._chunks % _COMPARE_EVERY == 0:
            self.compare_ranks()

    def _checked(self, chunk: Batch) -> UserError | None:
        """What is wrong with rows that come for the first time."""
        if self.data is None or self.data.first_pass is None:
            return None
        return self.data.first_pass.of_chunk(chunk, self.step, self.data.row_ids)

    def compare_ranks(self) -> None:
        """Raises UserError on all ranks where their states, made by the same updates, are not the same to the bit."""
        if not self.comm.agree([*self.state.named().values()]):
            raise UserError(
                f"the ranks hold different parameters at step {self.step}, so memory, a network or a library failed: "
                "resume the run from its last checkpoint, on other machines if it happens again."
            )

    def _record(self, result: ChunkResult, chunk: Batch) -> None:
        now = time.monotonic()
        rows = int(chunk.batch_rows.sum())
        means = result.terms.mean(0).tolist()
        elbo, num_obs = sum(means), self.inference.num_obs
        by_kind = {"expected_log_likelihood": 0.0, "kl_global": 0.0, "kl_local": 0.0}
        for kind, value in zip(self.inference.kinds, means):
            by_kind["expected_log_likelihood" if kind == "likelihood" else kind] += (
                value if kind == "likelihood" else -value
            )
        self.last = {
            "step": self.step,
            "seconds": self.seconds,
            "rows": rows,
            "rows_per_second": rows / max(now - self._previous, 1e-9),
            "elbo": elbo,
            "elbo_per_row": elbo / num_obs,
            **by_kind,
            "learning_rate": self._rate(self.step - 1),
            "grad_norm": float(result.grad_norm[-1]),
            **{f"term/{site}": value for site, value in zip(self.inference.sites, means)},
        }
        self._previous = now

    def _refuse_not_finite(self, result: ChunkResult, chunk: Batch) -> None:
        """Raises FloatingPointError on all ranks alike, with the rows that are the cause, where they can be told."""
        finite = torch.isfinite(result.terms).all(1)
        if finite.all() and torch.isfinite(result.state.theta).all():
            return
        slot, places = nan_rows(self.program.reference, self.state, chunk.part(0, len(result.terms)))
        places = places if self.data is not None else []
        ids = self.data.row_ids(self.step + slot) if self.data is not None and places else np.empty(0)
        rows = sorted(row for some in self.comm.gathered([int(ids[place]) for place in places]) for row in some)
        if not finite.all():
            bad = int((~finite).nonzero()[0])
            finite_or_raise(dict(zip(self.inference.sites, result.terms[bad].tolist())), self.step + bad, rows)
        values = self.inference.parameters.unflatten(result.state.theta)
        finite_or_raise(dict(values), int(result.state.step), rows)

    def _rate(self, step: int) -> float:
        """The scheduled learning rate of a step."""
        return float(self.update.at(step).lr(torch.tensor(step)))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if device.type == "cpu":
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)
