"""How large tensors get, found from their shapes alone: none of them is made."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pyro
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.inference.model.written import Written


def largest(work: Callable[[], Any]) -> int:
    """The numbers of the largest tensor that ``work()`` would make, as far as it runs without values."""
    made = Written()
    unmade, plain = FakeTensorMode(allow_non_fake_inputs=True), pyro.validation_enabled(False)
    with suppress(Exception), torch.no_grad(), plain, unmade, made:  # of what needs values
        work()
    return made.largest
