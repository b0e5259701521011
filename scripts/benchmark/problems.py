"""What is inferred: the models, their rows on disk, and one setting of the benchmark.

Shapes: N rows of the problem, of which M are stored; where N > M the stored rows repeat, so memory stays bounded.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from trainer.data.packing.pack import pack
from trainer.data.sources.synthetic import SyntheticSource
from trainer.models.hierarchical import VaryingSlopes
from trainer.models.logistic import LogisticRegression

_PIECE = 1 << 16  # rows that are made at a time


@dataclass(frozen=True)
class Setting:
    """One line of the benchmark, as a worker process is told of it."""

    model: str
    batch: int
    num_obs: int
    stored_rows: int
    slots: int
    """K: steps of a chunk, for those that take several a call."""
    threads: int
    device: str
    folder: str
    """Where `make_data` has put the rows."""
    rate: float = 0.01
    """Adam's, constant."""
    seed: int = 0


@dataclass(frozen=True)
class Network:
    """Two hidden layers of tanh units; weight_1 [D, H], weight_2 [H, H], weight_3 [H], y ~ Bernoulli(logit)."""

    features: int = 32
    width: int = 128

    def __call__(self, x: Tensor, y: Tensor | None = None) -> None:
        d, h = self.features, self.width
        weight_1 = pyro.sample("weight_1", dist.Normal(x.new_zeros(d, h), d**-0.5).to_event(2))
        bias_1 = pyro.sample("bias_1", dist.Normal(x.new_zeros(h), 1.0).to_event(1))
        weight_2 = pyro.sample("weight_2", dist.Normal(x.new_zeros(h, h), h**-0.5).to_event(2))
        bias_2 = pyro.sample("bias_2", dist.Normal(x.new_zeros(h), 1.0).to_event(1))
        weight_3 = pyro.sample("weight_3", dist.Normal(x.new_zeros(h), h**-0.5).to_event(1))
        with pyro.plate("data", len(x)):
            logits = torch.tanh(torch.tanh(x @ weight_1 + bias_1) @ weight_2 + bias_2) @ weight_3
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    def truth(self, generator: np.random.Generator) -> dict[str, np.ndarray]:
        """Directions whose sine is the logit."""
        return {"direction": generator.normal(size=self.features) / self.features**0.5}

    def rows(
        self, truth: dict[str, np.ndarray], generator: np.random.Generator, first_row: int, rows: int
    ) -> dict[str, np.ndarray]:
        """Columns x [rows, features] and y [rows], float32."""
        x = generator.standard_normal((rows, self.features), dtype=np.float32)
        probability = 1 / (1 + np.exp(-3 * np.sin(2 * x @ truth["direction"])))
        return {"x": x, "y": (generator.random(rows) < probability).astype(np.float32)}


MODELS: dict[str, Any] = {
    "logistic": LogisticRegression(),
    "hierarchical-10k": VaryingSlopes(groups=10_000, slopes=2),
    "hierarchical-100k": VaryingSlopes(groups=100_000, slopes=2),
    "network": Network(),
}


def make_data(model: str, rows: int, folder: Path, shards: bool) -> None:
    """Writes ``folder``/COLUMN.npy and, with ``shards``, ``folder``/shards with the same rows; what is there stays."""
    zoo = MODELS[model]
    truth = zoo.truth(np.random.default_rng(1))
    source = SyntheticSource(lambda generator, first, count: zoo.rows(truth, generator, first, count), rows)
    if not (folder / "columns").is_dir():
        partial = folder / "partial"
        partial.mkdir(parents=True, exist_ok=True)
        first = 0
        files: dict[str, Any] = {}
        for batch in source.batches(_PIECE):
            for name, raw in batch.items():
                values = np.asarray(raw)
                if name not in files:
                    shape = (rows, *values.shape[1:])
                    files[name] = np.lib.format.open_memmap(partial / f"{name}.npy", "w+", values.dtype, shape)
                files[name][first : first + len(values)] = values
            first += len(values)
        files.clear()
        partial.rename(folder / "columns")
    if shards and not (folder / "shards").is_dir():
        pack(source, folder / "shards", held_out=0.0)


def load(setting: Setting, mapped: bool = False) -> dict[str, np.ndarray]:
    """The stored columns, each [M, ...], in the order of a model's arguments; ``mapped``: not read into memory."""
    names = ("x", "group", "y")
    paths = {name: Path(setting.folder) / "columns" / f"{name}.npy" for name in names}
    return {name: np.load(path, mmap_mode="r" if mapped else None) for name, path in paths.items() if path.exists()}


def row_bytes(columns: dict[str, np.ndarray]) -> int:
    """Bytes of one row."""
    return sum(column.nbytes // len(column) for column in columns.values())
