"""The stop rule beside the best fixed stop: `python -m scripts.references.stop [--seeds 20]`.

For five models with outside answers: in how many runs the answer met its criterion where training stopped, and the rows
used beside those of the best fixed stop: the smallest of some budgets at which all of three seeds meet the criterion.
Writes demo/stop.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from scripts.references.__main__ import DATA, ROOT, compare
from scripts.references.case import Case
from scripts.references.cases import CASES

NAMES = ("kidiq interaction", "wells daae_c", "radon mn centered", "radon mn non-centered", "flights200k")
BUDGETS = (100, 250, 500, 1000, 2000, 4000)


def best_fixed(case: Case, data: Path) -> float | None:
    """Rows of the smallest budget that is enough, None where none is."""
    for steps in BUDGETS:
        options = {"max_steps": steps, "stop": "budget", "rounds": 1}
        runs = [compare(case, data, seed, options) for seed in range(100, 103)]
        if all(run["met"] for run in runs):
            return runs[0]["rows"]
    return None


def study(case: Case, data: Path, seeds: int) -> dict[str, Any]:
    runs = [compare(case, data, seed, {}) for seed in range(seeds)]
    stopped = [run for run in runs if run["stop_reason"] == "converged"]
    rows, fixed = float(np.median([run["rows"] for run in runs])), best_fixed(case, data)
    return {
        "case": case.name,
        "runs": seeds,
        "stopped": len(stopped),
        "right": sum(run["met"] for run in stopped),
        "met": sum(run["met"] for run in runs),
        "rows": rows,
        "fixed": fixed,
        "ratio": rows / fixed if fixed else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--data", type=Path, default=DATA)
    given = parser.parse_args()
    if not given.data.is_dir():
        print(f"stop: {given.data} is absent, there is nothing to compare with.")
        return
    console, table, found = Console(width=120), Table(title="the stop rule", title_justify="left"), []
    for heading in ("case", "runs", "stopped", "of these right", "right at the end", "rows", "best fixed", "ratio"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for case in [case for case in CASES if case.name in NAMES]:
        found.append(study(case, given.data, given.seeds))
        cells = [f"{v:,.3g}" if isinstance(v, float) and v < 100 else f"{v:,.0f}" for v in list(found[-1].values())[1:]
                 if v is not None]  # fmt: skip
        table.add_row(case.name, *cells)
        console.print(found[-1])
    console.print(table)
    out = ROOT / "demo" / "stop.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
