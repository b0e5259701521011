"""The traced step on a GPU: captured once as a graph of kernels, then replayed for each slot by one call.

The slot's number is on the device and the captured step moves it on, so one capture serves every slot of every chunk
(CUDA graphs: Ng et al., "Accelerating PyTorch with CUDA Graphs", 2021). Inputs lie in buffers of the largest chunk.

Shapes: K slots of a chunk; C the most that a buffer holds.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Section = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]
Capture = Callable[[Callable[[], None]], Callable[[], None]]
_WARM_UPS = 3


class Replay:
    """``before(carry, data, fixed)`` gives a chunk's tensors by slot, each [K, ...]; then ``step(carry, slot, fixed)``
    gives (*carry, *outputs) for each slot.

    ``capture(work)`` is a function that does on the device what ``work`` does.
    """

    def __init__(self, before: Section, step: Section, capture: Capture | None = None):
        self._before, self._step, self._capture = before, step, capture or captured
        self._replay: Callable[[], None] | None = None
        self._slots: list[Tensor] = []

    def __call__(self, carry: Sequence[Tensor], data: Sequence[Tensor], fixed: Sequence[Tensor]) -> list[Tensor]:
        """The carry after the chunk, and the outputs [K, ...] of its slots."""
        count, per_slot = len(data[0]), self._before(carry, data, fixed)
        if not self._slots or len(self._slots[0]) < count:
            self._make(carry, per_slot, fixed)
        assert self._replay is not None
        self._fill(carry, per_slot, fixed)
        for _ in range(count):
            self._replay()
        return [*(each.clone() for each in self._carry), *(each[:count].clone() for each in self._outputs)]

    def _make(self, carry: Sequence[Tensor], per_slot: Sequence[Tensor], fixed: Sequence[Tensor]) -> None:
        self._carry, self._fixed = [each.clone() for each in carry], [each.clone() for each in fixed]
        self._slots = [each.clone() for each in per_slot]
        self._at = torch.zeros(1, dtype=torch.int64, device=carry[0].device)
        _, outputs = self._advance()
        self._outputs = [each.new_zeros(len(per_slot[0]), *each.shape) for each in outputs]
        self._replay = self._capture(self._one)

    def _fill(self, carry: Sequence[Tensor], per_slot: Sequence[Tensor], fixed: Sequence[Tensor]) -> None:
        self._at.zero_()
        for held, given in zip([*self._carry, *self._fixed], [*carry, *fixed], strict=True):
            held.copy_(given)
        for held, given in zip(self._slots, per_slot, strict=True):
            held[: len(given)].copy_(given)

    def _advance(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        here = [each.index_select(0, self._at)[0] for each in self._slots]
        made = self._step(self._carry, here, self._fixed)
        return made[: len(self._carry)], made[len(self._carry) :]

    def _one(self) -> None:
        """The step of slot ``_at``, in the buffers."""
        carry, outputs = self._advance()
        for held, new in zip(self._carry, carry, strict=True):
            held.copy_(new)
        for held, new in zip(self._outputs, outputs, strict=True):
            held.index_copy_(0, self._at, new[None])
        self._at.add_(1).remainder_(len(self._slots[0]))


def captured(work: Callable[[], None]) -> Callable[[], None]:
    """``work`` as a CUDA graph. It runs a few times first, as capturing asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
