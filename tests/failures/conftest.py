"""A small table in shards."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # failure_tools

from trainer.data.packing.pack import pack


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """3,000 rows in blocks of 128, and their column x [3000, 3]."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(3000, 3))
    y = x @ np.array([1.0, -2.0, 0.5]) + 0.5 * generator.normal(size=3000)
    folder = tmp_path_factory.mktemp("failures")
    np.savez(folder / "table.npz", x=x.astype(np.float32), y=y.astype(np.float32))
    pack(str(folder / "table.npz"), folder / "shards", block_rows=128, shard_bytes=20_000)
    return folder / "shards", x.astype(np.float32)


@pytest.fixture(scope="session")
def shards(table: tuple[Path, np.ndarray]) -> Path:
    return table[0]
