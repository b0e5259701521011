"""How large tensors get, found from their shapes alone: none of them is made."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pyro
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


def largest(work: Callable[[], Any]) -> int:
    """The numbers of the largest tensor that ``work()`` would make, as far as it runs without values."""
    made = _Made()
    unmade, plain = FakeTensorMode(allow_non_fake_inputs=True), pyro.validation_enabled(False)
    with suppress(Exception), torch.no_grad(), plain, unmade, made:  # of what needs values
        work()
    return made.largest


class _Made(TorchDispatchMode):
    """Notes how large the tensors are that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, Tensor):
                self.largest = max(self.largest, each.numel())
        return made
