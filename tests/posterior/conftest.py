"""One thread, and Pyro's validation as a program leaves it: off outside `set_up`."""

from collections.abc import Iterator

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    pyro.clear_param_store()
    with pyro.validation_enabled(False):
        yield
