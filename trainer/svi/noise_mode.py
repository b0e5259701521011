"""Noise for guides that draw for themselves: every random operation takes its normals from the given ones, in order.

A dispatch mode sees `normal_`, `randn`, `rand` and their kin below every library, so Pyro's autoguides and users' own
need no change. What is no transformation of normals (Gamma, Dirichlet) is drawn from torch's generator, seeded
by (run, step, draw).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.svi.plates import Batch

_aten = torch.ops.aten
_IN_PLACE = {_aten.normal_.default: "normal", _aten.uniform_.default: "uniform"}
_LIKE = {_aten.randn_like.default: "normal", _aten.rand_like.default: "uniform"}
_FRESH = {_aten.randn.default: "normal", _aten.rand.default: "uniform"}


class NoiseMode(TorchDispatchMode):
    """Serves normals from ``elements`` [E], and inside the data plate from ``rows`` [B, n]."""

    def __init__(self, elements: Tensor, rows: Tensor | None, seed: int, batch: Batch):
        super().__init__()
        self.elements, self.rows, self.batch, self.seed = elements, rows, batch, seed
        self.used = (0, 0)
        self.endless = False
        self.axis: int | None = None

    @classmethod
    def measuring(cls, batch: Batch) -> "NoiseMode":
        """A mode that serves zeros without end and counts them in ``used``."""
        mode = cls(torch.zeros(0), None, 0, batch)
        mode.endless = True
        return mode

    def __enter__(self) -> "NoiseMode":
        torch.manual_seed(self.seed)
        super().__enter__()
        return self

    @contextmanager
    def sites(self, plate: str) -> Iterator[None]:
        """Tells the mode which sample sites stand in the data plate."""
        with _SiteAxis(self, plate):
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _IN_PLACE:
            target = args[0]
            return target.copy_(self._serve(_IN_PLACE[func], target, args[1:]))
        if func in _LIKE:
            return self._serve(_LIKE[func], args[0], ())
        if func in _FRESH:
            return self._serve(_FRESH[func], torch.empty(*args, **kwargs), ())
        return func(*args, **kwargs)

    def _serve(self, kind: str, like: Tensor, bounds: tuple[float, ...]) -> Tensor:
        low, high = bounds if len(bounds) == 2 else (0.0, 1.0)
        normals = self._take(like)
        if kind == "normal":
            return low + high * normals
        tiny = torch.finfo(like.dtype).eps
        return low + (high - low) * torch.special.ndtr(normals).clamp(tiny, 1 - tiny)

    def _take(self, like: Tensor) -> Tensor:
        rows = self.batch.size
        axis = (
            self.axis if self.axis is not None and like.dim() >= -self.axis and like.shape[self.axis] == rows else None
        )
        elements, per_row = self.used
        if axis is None:
            count = like.numel()
            self.used = (elements + count, per_row)
            if self.endless:
                return torch.zeros_like(like)
            return self.elements[elements : elements + count].view(like.shape).to(like)
        count = like.numel() // rows
        self.used = (elements, per_row + count)
        if self.endless or self.rows is None:
            return torch.zeros_like(like)
        moved = like.movedim(axis, 0).shape
        return self.rows[:, per_row : per_row + count].reshape(moved).movedim(0, axis).to(like)


class _SiteAxis(Messenger):
    """Keeps ``mode.axis`` at the data plate's axis (from the right, event dims included) while a site is drawn."""

    def __init__(self, mode: NoiseMode, plate: str):
        super().__init__()
        self.mode, self.plate = mode, plate

    def _pyro_sample(self, msg: Message) -> None:
        fn: Any = msg["fn"]
        self.mode.axis = None
        if isinstance(fn, _Subsample):  # another plate's indices
            return
        for frame in msg["cond_indep_stack"]:
            if frame.name == self.plate and frame.dim is not None:
                self.mode.axis = frame.dim - fn.event_dim

    def _pyro_post_sample(self, msg: Message) -> None:
        self.mode.axis = None
