"""Prints a run's posterior beside ordinary least squares and the known mean-field optimum: compare.py RUN_DIR."""

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
NAMES = ["intercept", "distance", "sin 24 h", "cos 24 h", "sin 12 h", "cos 12 h", "sin 8 h", "cos 8 h"]


def least_squares() -> np.ndarray:
    """The OLS coefficients [8], computed here from the table."""
    table = pq.read_table(HERE / "data.parquet").to_pydict()
    distance, time, delay = (np.asarray(table[name], float) for name in ("distance", "time", "delay"))
    waves = [wave(2 * math.pi * k * time / 24) for k in (1, 2, 3) for wave in (np.sin, np.cos)]
    x = np.stack([np.ones_like(time), distance / 1000 - 0.7, *waves], axis=1)
    return np.linalg.lstsq(x, delay / 10, rcond=None)[0]


def main(run_dir: Path) -> None:
    reference = json.loads((HERE / "reference.json").read_text())
    with (run_dir / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    loc = np.array([float(row["loc"]) for row in rows])
    scale = np.array([float(row["scale"]) for row in rows])
    best_loc = np.array([*reference["mf_loc"], reference["mf_log_sigma_loc"]])
    best_scale = np.array([*reference["mf_scale"], reference["mf_log_sigma_scale"]])
    table = Table(title="Delay (in 10 minutes), 200,000 flights")
    for heading in ("", "our mean", "optimum", "least squares", "our sd", "optimum"):
        table.add_column(heading, justify="right" if heading else "left")
    for i, (name, ols) in enumerate(zip([*NAMES, "log sigma"], [*least_squares(), math.nan])):
        cells = (loc[i], best_loc[i], ols, scale[i], best_scale[i])
        table.add_row(name, *("" if math.isnan(cell) else f"{cell:.5f}" for cell in cells))
    console = Console(highlight=False)
    console.print(table)
    error, ratio = np.abs(loc - best_loc) / best_scale, scale / best_scale
    elbo = json.loads((run_dir / "metrics.json").read_text())["elbo"]
    console.print(f"largest error of a mean: {error.max():.3f} sd (criterion: at most 0.3)")
    console.print(f"sds over the optimum's: {ratio.min():.3f} to {ratio.max():.3f} (criterion: 0.95 to 1.05)")
    console.print(f"ELBO: {elbo:,.3f} nats, the optimum's {reference['mf_elbo']:,.3f}")
    if error.max() > 0.3 or ratio.min() < 0.95 or ratio.max() > 1.05:
        sys.exit("the posterior misses the criterion.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
