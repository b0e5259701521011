"""N = 10^6, D = 20, 20 epochs of which the last 10 are averaged: packs, trains, compares with the exact posterior.

Arguments go to `svi train`. Prints the table and writes demo/million.json; exits 1 where the criterion is missed.
`scripts/local_steps.py` asks the same of two ranks that average their parameters.
"""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from trainer.data.shards.folder import open_split
from trainer.models.linear import LinearRegression, Statistics, exact_posterior

MODEL = LinearRegression(noise_sd=1.5)
CHOICES = ["model=linear", f"model.noise_sd={MODEL.noise_sd}"]
DEMO = Path("demo")
SHARDS, RUN = DEMO / "million", DEMO / "million-run"


def svi(*arguments: str) -> None:
    """Runs the command and shows what it shows."""
    print("== svi", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "trainer", *arguments], check=True)


def exact() -> tuple[np.ndarray, np.ndarray, float]:
    """Means and sds [21] of the mean-field optimum, weights first, and its ELBO, from one pass over the shards."""
    folder = open_split(SHARDS, "train")
    assert folder is not None
    statistics = Statistics.empty(MODEL.features)
    for block in range(len(folder.block_rows)):
        x, y = (torch.from_numpy(folder.read_block(block, name)) for name in ("x", "y"))
        statistics.add(x, y)
    answer = exact_posterior(statistics, MODEL)
    weights_first = [*range(1, MODEL.features + 1), 0]
    return answer.mean[weights_first].numpy(), answer.mean_field_sd[weights_first].numpy(), answer.mean_field_elbo


def fit(*arguments: str) -> dict[str, float]:
    """Trains with more ``arguments`` for `svi train` and compares with the optimum."""
    if not SHARDS.exists():
        svi("shard", "source=synthetic", *CHOICES, "rows=1000000", "split.held_out=0", f"out={SHARDS}")
    shutil.rmtree(RUN, ignore_errors=True)
    svi("train", *CHOICES, f"data.path={SHARDS}", f"run_dir={RUN}", "max_epochs=20", "averaging=0.5", *arguments)
    mean, sd, elbo = exact()
    with (RUN / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    loc, scale = (np.array([float(row[name]) for row in rows]) for name in ("loc", "scale"))
    metrics = json.loads((RUN / "metrics.json").read_text())
    error, log_ratio = np.abs(loc - mean) / sd, np.abs(np.log(scale / sd))
    return {
        "rms_error_sd": float(np.sqrt((error**2).mean())),
        "max_error_sd": float(error.max()),
        "max_log_sd_error": float(log_ratio.max()),
        "elbo_gap": elbo - metrics["elbo"],
        "elbo_se": metrics["elbo_se"],
        "seconds": metrics["seconds"],
        "rows_per_second": metrics["rows_per_second"],
    }


def main() -> None:
    result = fit(*sys.argv[1:])
    limits = {"rms_error_sd": 0.1, "max_error_sd": 0.2, "max_log_sd_error": 0.05}
    for name, value in result.items():
        print(f"{name:>18} {value:12.5g}" + (f"   (at most {limits[name]})" if name in limits else ""))
    (DEMO / "million.json").write_text(json.dumps(result, indent=1))
    sys.exit(any(result[name] > limit for name, limit in limits.items()))


if __name__ == "__main__":
    main()
