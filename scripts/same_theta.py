"""Ten reference runs, each with the hash of its theta: what a change of the code must leave as it was, to the bit.

`python -m scripts.same_theta FILE` writes the hashes into FILE, or compares with it where it is there; names of runs
behind it choose some. The bits depend on the processor and on torch: compare on one machine.
"""

import hashlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import scipy.sparse
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor
from torch.distributions import constraints

from trainer import fit
from trainer.data.fields import RaggedRows

ROWS, WIDTH, GROUPS = 4_000, 4, 300


def linear(x: Any, y: Any = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(WIDTH, dtype=x.dtype), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(x.new_tensor(1.0)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, sigma), obs=y)


def grouped(group: Any, y: Any = None) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", GROUPS):
        effect = pyro.sample("effect", dist.Normal(mean, 0.5))
    with pyro.plate("data", len(group)):
        pyro.sample("y", dist.Normal(effect[group], 1.0), obs=y)


def visits(times: Any, y: Any = None) -> None:
    slope = pyro.sample("slope", dist.Normal(times.values.new_zeros(()), 1.0))
    with pyro.plate("data", len(times)):
        mean = times.total(times.values) / times.lengths.clamp(min=1)
        pyro.sample("y", dist.Normal(slope * mean, 0.5), obs=y)


def own_guide(x: Any, y: Any = None) -> None:
    del x, y
    loc = pyro.param("loc", lambda: torch.zeros(WIDTH))
    scale = pyro.param("scale", lambda: torch.full((WIDTH,), 0.1), constraint=constraints.positive)
    pyro.sample("w", dist.Normal(loc, scale).to_event(1))
    pyro.sample("sigma", dist.LogNormal(pyro.param("s", torch.tensor(-0.5)), 0.1))


def table() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, WIDTH))
    return {"x": x, "y": x @ np.linspace(-1, 1, WIDTH) + 0.7 * rng.normal(size=ROWS)}


def groups() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    group = rng.integers(0, GROUPS, ROWS)
    return {"group": group, "y": rng.normal(1.0, 0.5, GROUPS)[group] + rng.normal(size=ROWS)}


def words() -> dict[str, Any]:
    rng = np.random.default_rng(2)
    x = scipy.sparse.random(ROWS, WIDTH, 0.5, "csr", random_state=2, data_rvs=lambda n: rng.integers(1, 6, n))
    return {"x": x, "y": x @ np.linspace(-1, 1, WIDTH) + 0.5 * rng.normal(size=ROWS)}


def lists() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 5, ROWS)
    offsets = np.concatenate([[0], lengths.cumsum()])
    values = rng.normal(1.0, 1.0, lengths.sum())
    means = np.add.reduceat(values, offsets[:-1]) / lengths
    return {"times": RaggedRows(offsets, values), "y": 2.0 * means + 0.5 * rng.normal(size=ROWS)}


def fitted(model: Any, data: dict[str, Any], guide: Any = "mean_field", **options: Any) -> Callable[[Path], Tensor]:
    """A run in this process."""
    given = {"program": "eager", "max_steps": 150, "batch_size": 512, "dtype": "float64", **options}
    steps, batch, dtype = (given.pop(name) for name in ("max_steps", "batch_size", "dtype"))

    def run(folder: Path) -> Tensor:
        del folder
        settings = {"batch_size": batch, "max_steps": steps, "dtype": dtype, "progress": False, "options": given}
        return fit(model, data, guide, **settings).theta

    return run


def commanded(*launches: str) -> Callable[[Path], Tensor]:
    """A run of the command, in one launch after another."""

    def run(folder: Path) -> Tensor:
        np.savez(folder / "t.npz", **table())
        head = f"import pyro, pyro.distributions as dist, torch\nfrom typing import Any\nWIDTH = {WIDTH}\n"
        (folder / "models.py").write_text(head + inspect.getsource(linear))
        svi = [sys.executable, "-m", "trainer"]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}

        def run_svi(*words: str) -> None:
            subprocess.run([*svi, *words], cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)

        run_svi("shard", "source=t.npz", "out=shards", "split.held_out=0")
        common = ["model._target_=models.linear", "data.path=shards", "run_dir=run", "batch_size=512", "threads=1"]
        for words in launches:
            run_svi("train", *common, *words.split())
        return torch.load(folder / "run" / "posterior.pt", weights_only=True)["theta"]

    return run


RUNS: dict[str, Callable[[Path], Tensor]] = {
    "eager": fitted(linear, table()),
    "compiled": fitted(linear, table(), program="fused", dtype="float32"),
    "local steps": commanded("program=local_steps trainer=ddp_sim max_steps=96"),
    "two ranks": commanded("program=eager trainer=ddp_sim max_steps=60"),
    "resumed": commanded("program=eager max_steps=40", "program=eager max_steps=80 ckpt_path=last"),
    "csr": fitted(linear, words()),
    "ragged": fitted(visits, lists()),
    "autoguide": fitted(linear, table(), AutoMultivariateNormal),
    "own guide": fitted(linear, table(), own_guide),
    "newton by products": fitted(grouped, groups(), max_steps=400),
}


def main(file: Path, chosen: list[str]) -> int:
    """Writes or compares the hashes, and returns how many differ."""
    known = json.loads(file.read_text()) if file.exists() else {}
    differ = 0
    for name in chosen or RUNS:
        with TemporaryDirectory() as folder:
            theta = RUNS[name](Path(folder))
        found = hashlib.sha256(theta.detach().contiguous().numpy().tobytes()).hexdigest()[:16]
        same = known.setdefault(name, found) == found
        differ += not same
        print(f"{name:20s} {found} {'' if same else f'was {known[name]}'}", flush=True)
    file.write_text(json.dumps(known, indent=1))
    print(f"{differ} differ")
    return differ


if __name__ == "__main__":
    sys.exit(min(main(Path(sys.argv[1]), sys.argv[2:]), 1))
