"""What an evaluation takes of memory."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Written(TorchDispatchMode):
    """Counts the bytes that operations write, and notes the numbers of the largest tensor among their results."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [each for each in (made if isinstance(made, tuple | list) else (made,)) if isinstance(each, Tensor)]
        self.largest = max([self.largest, *(each.numel() for each in tensors)])
        if not getattr(func, "is_view", False):
            self.bytes += sum(each.nbytes for each in tensors)
        return made
