"""What `program=local_steps` does to the estimate: the regression of scripts/million on two ranks.

They sum the gradient at every step, or average their parameters every 4, 16, 64 or 256 steps, beside the exact
mean-field optimum; two seeds each. Prints a table and writes demo/local_steps.json.
"""

import json
from statistics import mean

from rich.console import Console
from rich.table import Table

from scripts.million import DEMO, fit

WAYS = {"summed at every step": ["program=fused"]} | {
    f"averaged every {n} steps": ["program=local_steps", f"program.sync_every={n}"] for n in (4, 16, 64, 256)
}
COLUMNS = ("rms_error_sd", "max_error_sd", "max_log_sd_error", "elbo_gap", "seconds")


def main() -> None:
    results = {name: [fit("trainer=ddp_sim", f"seed={seed}", *way) for seed in (0, 1)] for name, way in WAYS.items()}
    table = Table(title="two ranks, 10^6 rows, 20 epochs: mean of two seeds", title_justify="left")
    for heading in ("parameters", *COLUMNS):
        table.add_column(heading, justify="left" if heading == "parameters" else "right")
    for name, runs in results.items():
        table.add_row(name, *(f"{mean(run[column] for run in runs):.3g}" for column in COLUMNS))
    Console(width=120).print(table)
    (DEMO / "local_steps.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
