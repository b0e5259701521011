"""What an evaluation takes of memory."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Written(TorchDispatchMode):
    """Counts the bytes that operations write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False):
            tensors = made if isinstance(made, tuple | list) else (made,)
            self.bytes += sum(each.nbytes for each in tensors if isinstance(each, Tensor))
        return made
