"""A small table, packed once, and training in this process."""

import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from app_tools import WEIGHTS, config

from trainer.data.packing.pack import pack
from trainer.inference.estimates import full_elbo as elbo
from trainer.posterior import summary
from trainer.verbs import train

_FOLDERS = ("engine", "options", "runs", "sweeps", "training", "verbs")


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """table.npz: y = x @ WEIGHTS + noise, 3,000 rows."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(3000, 3)).astype(np.float32)
    y = (x @ WEIGHTS + 0.5 * generator.normal(size=3000)).astype(np.float32)
    path = tmp_path_factory.mktemp("table") / "table.npz"
    np.savez(path, x=x, y=y)
    return path


@pytest.fixture(scope="session")
def shards(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table as shards, in blocks of 128 rows."""
    out = tmp_path_factory.mktemp("shards") / "linear"
    pack(str(table), out, block_rows=128, shard_bytes=20_000)
    return out


@pytest.fixture
def fit(shards: Path, tmp_path: Path) -> Callable[..., Path]:
    """`fit("max_steps=10", ...)` trains in this process and returns the run folder."""

    def run(*overrides: str, run_dir: Path = tmp_path / "run") -> Path:
        defaults = [
            "model._target_=app_models.linear",
            f"data.path={shards}",
            "batch_size=256",
            "max_steps=60",
            "trainer=cpu",
            "threads=1",
            "program=eager",
            "slots=64",
            f"run_dir={run_dir}",
        ]
        before = torch.get_default_dtype()
        try:
            train.run(config("train", *defaults, *overrides), run_dir)
        finally:
            torch.set_default_dtype(before)
        return run_dir

    return run


@pytest.fixture
def free_port() -> int:
    """A TCP port of loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(autouse=True)
def few_draws(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The final metrics of whole runs from fewer draws than a user gets: tests/inference covers their values."""
    if request.path.parent.name not in _FOLDERS:
        return
    monkeypatch.setattr(elbo, "_PAIRS", 20)
    monkeypatch.setattr(elbo, "_KL_DRAWS", 100)
    monkeypatch.setattr(summary, "_DRAWS", 200)
