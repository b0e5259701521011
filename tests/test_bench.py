"""The benchmark runs: every contender that can be imported has figures, a missing one says that it is not installed."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from shard_tools import write_folder
from svi_problems import F64, build

from scripts.benchmark.optima import of_hierarchical, of_logistic
from scripts.benchmark.ours import Repeated
from scripts.benchmark.worker import CONTENDERS
from trainer.data.plan import Plan
from trainer.data.shards.folder import ShardFolder
from trainer.engine.datamodule import ChunkData, Cuts, Ranks, RowTensors
from trainer.inference.estimates.full_gradient import Draws, full_gradient
from trainer.inference.estimates.many_draws import terms_together
from trainer.inference.estimates.passes import Block, Pass
from trainer.inference.objectives.elbo import ELBO
from trainer.models.hierarchical import VaryingSlopes

ROOT = Path(__file__).parent.parent
NAMES = [name for name in CONTENDERS if name not in ("fused-pair", "recipe")]  # the code of fused, and of fit


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_quick_gives_figures_for_every_contender(tmp_path):
    command = [sys.executable, "-m", "scripts.benchmark", "--quick", "--threads", "1", "--out", str(tmp_path)]
    run = subprocess.run([*command, "--contenders", *NAMES], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    content = json.loads((tmp_path / "bench.json").read_text())
    results = {result["contender"]: result for result in content["results"]}
    assert list(results) == NAMES
    for name, result in results.items():
        if name.startswith("numpyro") and not find_spec("numpyro"):
            assert result["error"] == "not installed"
            continue
        for figure in ("rows_per_second", "us_per_step", "compile_seconds", "peak_bytes", "of_a_copy"):
            assert result.get(figure, 0) > 0, f"{name} has no {figure}: {result}\n{(tmp_path / 'log.txt').read_text()}"
        assert len(result["us_per_step_by_round"]) == 3
    ratios = {ratio["ratio"] for ratio in content["ratios"]}
    assert {"fused / Pyro tutorial", "fused / Pyro indices given", "shards / in memory"} <= ratios
    assert "how many times as fast" in run.stdout


def test_blocks_that_repeat_are_read_as_rows_of_their_own(tmp_path):
    write_folder(tmp_path / "train", {"x": np.arange(30)}, [10, 20])
    folder = Repeated(ShardFolder(tmp_path / "train"), 90)
    plan = Plan(folder.block_rows, 0, 2, 10)
    rows = RowTensors(("x",), torch.float32)
    data = ChunkData(cast("ShardFolder", folder), plan, Ranks(1, 0, 2, 1), rows, Cuts(3))
    data.last = plan.steps_per_epoch
    found = [x for chunk in data for x in chunk.columns["x"].ravel().tolist()]
    assert sorted(found) == sorted(3 * list(range(30)))


def test_the_optimum_is_stationary():
    """Half the rows 0 and half 1 at the same x: the means are 0; the sd solves 1 / s^2 = 1 / tau^2 + sum E sigmoid'."""
    rows, tau = 2_000, np.array([1.0, 10.0])
    columns = {"x": np.ones((rows, 1), np.float32), "y": np.repeat([0.0, 1.0], rows // 2).astype(np.float32)}
    mean, sd, _ = of_logistic(columns, tau)
    np.testing.assert_allclose(mean, 0, atol=1e-10)
    u = np.sqrt((sd**2).sum()) * np.random.default_rng(0).normal(size=400_000)
    slope = (1 / (2 + np.exp(u) + np.exp(-u))).mean()
    np.testing.assert_allclose(sd**-2, tau**-2 + rows * slope, rtol=1e-4)


def test_the_optimum_of_a_hierarchy_is_stationary():
    """Two codes of nothing in common, sums over groups in closed form and draws: by these the gradient is noise."""
    zoo = VaryingSlopes(groups=20, slopes=2)
    rows = zoo.rows(zoo.truth(np.random.default_rng(1)), np.random.default_rng(2), 0, 2_000)
    mean, sd, top = of_hierarchical(rows, zoo)
    assert top.tolist() == [True] * 7 + [False] * 60
    columns = {
        name: torch.from_numpy(column).to(F64 if name != "group" else torch.int64) for name, column in rows.items()
    }
    inference, _ = build(zoo, **columns)
    inference = replace(inference, objective=ELBO())
    block, optimum = Block(0, columns, torch.arange(2_000)), torch.from_numpy(np.concatenate([mean, np.log(sd)]))
    draws = Draws(pairs=64, part_rows=1)

    def gradients(theta):
        passes = (Pass([block], 1, seed, lambda each: each) for seed in range(16))
        return torch.stack([full_gradient(terms_together(inference), theta, each, None, draws) for each in passes])

    found = gradients(optimum)
    error = found.std(0) / 4
    assert ((found.mean(0).abs() / error) < 5).all()
    assert (error[:67] * torch.from_numpy(sd)).max() < 0.2
    off = gradients(optimum + 0.5 * torch.cat([torch.from_numpy(sd), torch.zeros(67)])).mean(0)
    assert (off.abs() / error)[top.nonzero()].max() > 20
