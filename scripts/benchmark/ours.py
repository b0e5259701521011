"""Ours: a program over chunks of views of memory, or over chunks that the reader's thread takes from shards.

Shapes: K steps of a chunk, one lane group, B rows of a batch.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.benchmark.problems import MODELS, Setting, load
from trainer import fit
from trainer.data.lanes import default_lanes
from trainer.data.plan import Plan
from trainer.data.shards.folder import ShardFolder, open_split
from trainer.data.shards.index import Column
from trainer.engine.datamodule import ChunkData, Cuts, Ranks, RowTensors
from trainer.inference.guides.mean_field import MeanField
from trainer.inference.model.plates import Batch
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.optim.optimizers import Adam
from trainer.inference.optim.rounds import State, Update, one_round
from trainer.inference.optim.schedules import Constant
from trainer.inference.programs.program import Eager, Program
from trainer.inference.setup import set_up
from trainer.inference.step import Inference

_FOREVER = 10**9
_EAGER_SLOTS = 16  # nothing is gained by more


@dataclass(frozen=True)
class Way:
    """How we run."""

    fused: bool
    antithetic: bool = False
    shards: bool = False


class Ours:
    def __init__(self, setting: Setting, way: Way):
        torch.set_num_threads(setting.threads)
        self.setting, self.way = setting, way
        self.slots = setting.slots if way.fused else min(setting.slots, _EAGER_SLOTS)
        columns = {name: torch.from_numpy(column[: setting.batch].copy()) for name, column in load(setting).items()}
        here = {name: column.to(setting.device) for name, column in columns.items()}
        self.first = Batch.whole(here, num_obs=setting.num_obs)
        self.chunks: Callable[[], Iterator[Batch]]
        if way.shards:
            self.chunks = self._from_shards
        else:
            held = self._views()
            self.chunks = lambda: itertools.cycle(held)

    def _views(self) -> list[Batch]:
        """The stored rows as chunks, the last rows dropped where they fill none."""
        slots, batch, device = self.slots, self.setting.batch, self.setting.device
        columns = {name: torch.from_numpy(column).to(device) for name, column in load(self.setting).items()}
        rows = slots * batch
        full = torch.full((slots,), batch, device=device)
        return [
            Batch(
                {n: c[i : i + rows].view(slots, 1, batch, *c.shape[1:]) for n, c in columns.items()},
                full.view(slots, 1),
                full,
                None,
            )
            for i in range(0, self.setting.stored_rows - rows + 1, rows)
        ]

    def _from_shards(self) -> Iterator[Batch]:
        """Shuffled by the plan over N rows, checked, gathered and read ahead, as `svi train` does it."""
        setting = self.setting
        stored = open_split(Path(setting.folder) / "shards", "train")
        assert stored is not None
        folder: Any = stored if setting.num_obs == stored.num_rows else Repeated(stored, setting.num_obs)
        lanes = default_lanes(setting.batch, 1, setting.num_obs)
        plan = Plan(folder.block_rows, setting.seed, lanes, setting.batch)
        rows = RowTensors(tuple(self.first.columns), torch.float32)
        data = ChunkData(folder, plan, Ranks(1, 0, lanes, 1), rows, Cuts(self.slots))
        data.last = _FOREVER
        for chunk in data:
            assert isinstance(chunk, Batch)
            yield chunk.map(lambda each: each.to(setting.device))

    def start(self) -> None:
        setting, way = self.setting, self.way
        objective = ELBO(antithetic=way.antithetic)
        self.inference, self.theta = set_up(
            MODELS[setting.model], MeanField, self.first, setting.num_obs, objective, seed=setting.seed
        )
        adam: Any = Adam(lr=setting.rate)
        self.update = one_round(adam, Constant(), _FOREVER, _FOREVER)
        self.program = program(way.fused, self.inference, self.update, setting.seed)
        self.state: State = self.update.init(self.theta)
        self.order = self.chunks()
        self.advance()

    def advance(self) -> tuple[int, int]:
        """One chunk: (steps, rows)."""
        chunk = next(self.order)
        steps = len(chunk.batch_rows)
        self.state = self.program.run(self.state, chunk, steps).state
        if self.setting.device == "cuda":
            torch.cuda.synchronize()
        return steps, int(chunk.batch_rows.sum())

    def gpu_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if self.setting.device == "cuda" else 0


class Recipe:
    """`fit` with the defaults, from shards; it ends when its own rule says so."""

    def __init__(self, setting: Setting):
        torch.set_num_threads(setting.threads)
        self.setting = setting

    def start(self) -> None:
        """What is compiled serves every run."""
        self.fit(self.setting.seed, {"max_steps": 2})

    def fit(self, seed: int, options: dict[str, Any] | None = None) -> tuple[float, np.ndarray]:
        """Seconds from the start's search for a mode to the last pass, and the locations [D] in the order of sites."""
        folder, setting = Path(self.setting.folder) / "shards", self.setting
        posterior = fit(
            MODELS[setting.model], folder, batch_size=setting.batch, dtype="float32", seed=seed, progress=False,
            options={"threads": setting.threads, **(options or {})},
        )  # fmt: skip
        values = posterior.inference.parameters.unflatten(posterior.theta)
        return posterior.metrics["seconds"], values["guide.loc"].double().numpy()

    def gpu_bytes(self) -> int:
        return 0


def program(fused: bool, inference: Inference, update: Update, seed: int) -> Program:
    """The reference program, or the compiled one."""
    if not fused:
        return Eager(inference, update, seed, [0])
    from trainer.inference.programs.fused import Fused

    return Fused(inference, update, seed, [0])


class Repeated:
    """A shard folder whose blocks repeat until there are ``num_rows``: the plan's work at N, the disk's at M."""

    def __init__(self, folder: ShardFolder, num_rows: int):
        self._folder, self.num_rows = folder, num_rows
        self.block_rows, self.shard_of, self.first_ids = map(
            self._tiled, (folder.block_rows, folder.shard_of, folder.first_ids)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._folder, name)

    def _tiled(self, of_blocks: np.ndarray) -> np.ndarray:
        return np.tile(of_blocks, self.num_rows // self._folder.num_rows)

    def values_at(self, column: Column) -> np.ndarray:
        return self._tiled(self._folder.values_at(column))

    def make_ready(self, block: int, name: str) -> None:
        self._folder.make_ready(block % len(self._folder.block_rows), name)

    def read_block(self, block: int, name: str) -> np.ndarray:
        values: np.ndarray = self._folder.read_block(block % len(self._folder.block_rows), name)
        return values
