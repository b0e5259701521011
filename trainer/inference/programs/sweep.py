"""Rows evaluated at one theta by the compiled step, whose learning rate is an input, and is 0.

A step of a model whose latents of rows are integrated out takes some twenty evaluations of the model, which run ten
times as fast without Python and without their intermediate results in memory. Passes over all rows are then worth it
too, and take no program of their own.

Shapes: K slots of B rows, R antithetic pairs, E normals of a draw, S sites, P parameters.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.distributed.comm import Comm
from trainer.inference.model.plates import Batch
from trainer.inference.optim.rounds import State
from trainer.inference.optim.variance_reduction import Preconditioner
from trainer.inference.step import Inference

Still = Callable[[State, Batch, Tensor], tuple[Tensor, Tensor]]
"""(state, chunk, elements [K, 1, 1, E]) -> terms [K, S] and gradients of loss / N [K, P] at the state's theta."""
_SLOTS = 32  # of a call


def gives_gradients(inference: Inference, comm: Comm) -> bool:
    """Whether compiled steps of this problem give their gradients too, for a `Sweep`."""
    objective = inference.objective
    one_pair = objective.is_elbo and not objective.warmup and objective.pairs == 1 and len(objective.signs) == 2
    of_globals = inference.guide.noise_size[0] > 0 and not inference.guide.noise_size[1]
    worth = inference.model.evaluations > 1 and not inference.model.weighted
    return worth and of_globals and one_pair and comm.size == 1


class Swept(NamedTuple):
    """Of R pairs on the same rows."""

    inside: Tensor
    """float64 [R]: the terms inside the data plate, nats at scale 1, the mean of both draws."""
    gradient: Tensor
    """float64 [P] of minus the ELBO (nats), the mean over the pairs, with the rows' share of what counts once."""


@dataclass(frozen=True)
class Sweep:
    """``still`` on any rows, in slots like those of ``chunk``; ``state``: like those that it takes."""

    still: Still
    inference: Inference
    state: State
    chunk: Batch

    @classmethod
    def of(cls, still: Still, inference: Inference, state: State, chunk: Batch) -> "Sweep | None":
        """None for slots of several groups, columns that are more than a tensor, an anchor, and on a GPU."""
        plain = all(isinstance(column, Tensor) for column in chunk.columns.values())
        alone = chunk.valid.shape[1] == 1 and state.snapshot is None and state.theta.device.type == "cpu"
        return cls(still, inference, state, chunk.part(0, 1)) if plain and alone else None

    def __call__(
        self,
        theta: Tensor,
        columns: Mapping[str, Any],
        row_id: Tensor,
        elements: Tensor,
        preconditioner: Preconditioner | None = None,
    ) -> Swept:
        """At ``theta`` [P], of all rows of the ``columns`` [n, ...] at each of ``elements`` [R, E].

        ``preconditioner``: gives the gradient a control variate.
        """
        state = self._at(theta, preconditioner)
        inside = torch.zeros(len(elements), dtype=torch.float64)
        gradient = torch.zeros(len(theta), dtype=torch.float64)
        counted = [n for n, kind in enumerate(self.inference.kinds) if kind == "likelihood"]
        for rows in torch.arange(len(row_id)).split(_SLOTS * self._size):
            chunk = self._chunk(rows, columns, row_id)
            count = chunk.batch_rows.double()
            for number, normals in enumerate(elements.to(state.theta.dtype)):
                terms, gradients = self.still(state, chunk, normals.expand(len(count), 1, 1, -1))
                inside[number] += count @ terms[:, counted].sum(1) / self.inference.num_obs
                gradient += count @ gradients.double() / len(elements)
        return Swept(inside, gradient)

    @property
    def _size(self) -> int:
        """B."""
        return self.chunk.slot(0).slot(0).size

    def _at(self, theta: Tensor, preconditioner: Preconditioner | None) -> State:
        zero = self.state.each(torch.zeros_like)
        known = zero.preconditioner
        if known is not None and preconditioner is not None:
            known = preconditioner.each(lambda part: part.to(theta.dtype))
        return zero._replace(theta=theta.to(self.state.theta.dtype), preconditioner=known)

    def _chunk(self, rows: Tensor, columns: Mapping[str, Any], row_id: Tensor) -> Batch:
        """Slots of the ``rows``, of which the last one is repeated where they fill none."""
        size = self._size
        slots = -(-len(rows) // size)
        index = rows[torch.arange(slots * size).clamp(max=len(rows) - 1)].view(slots, 1, size)
        count = (len(rows) - size * torch.arange(slots)).clamp(max=size)
        made = {name: columns[name][index] for name in self.chunk.columns}
        return Batch(made, count[:, None], count, None if self.chunk.row_id is None else row_id[index])
