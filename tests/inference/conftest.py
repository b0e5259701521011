"""One thread, Pyro's validation as a program leaves it (off outside `set_up`), and a cache of compiled steps."""

from collections.abc import Iterator
from pathlib import Path

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    pyro.clear_param_store()
    with pyro.validation_enabled(False):
        yield


@pytest.fixture(scope="session")
def compiled_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """$XDG_CACHE_HOME of the tests that share the compiled step of one small regression."""
    return tmp_path_factory.mktemp("compiled")
