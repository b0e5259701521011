"""torch.vmap without its warnings."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

CANNOT_BE_BATCHED = (RuntimeError, ValueError, NotImplementedError, IndexError)
"""What an operation of a model says that vmap cannot take."""


@contextmanager
def silent_vmap() -> Iterator[None]:
    """No warnings of operations that vmap takes one by one."""
    warn: Any = vars(torch._C._functorch)["_set_vmap_fallback_warning_enabled"]
    warn(False)
    try:
        yield
    finally:
        warn(True)
