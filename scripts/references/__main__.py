"""The defaults beside outside answers: `python -m scripts.references [--seeds 3] [--cases NAME ...]`.

For every case: the largest error of a location in reference scales, the range of the scale ratios, the gap of the ELBO
in nats, seconds of training and rows used, beside the criterion of the data's README (at most 256 latents: 0.3 scales,
ratios within [0.95, 1.05], gap at most 0.1 + 0.005 D). Writes demo/references.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from scripts.references.cases import CASES, Case
from trainer import fit

ROOT = Path(__file__).parent.parent.parent
DATA = ROOT.parent / "shared" / "data"


def compare(case: Case, data: Path, seed: int, options: dict[str, Any]) -> dict[str, Any] | None:
    """One fit with the defaults (and ``options``) beside the answer; None where there is no answer to compare with."""
    reference = case.reference(data)
    if reference is None:
        return None
    table = case.table(data)
    posterior = fit(case.model, table, seed=seed, dtype="float64", progress=False, options=options)
    sites = posterior.summary()
    loc = np.concatenate([site.loc.ravel() for site in sites if site.loc is not None])
    scale = np.concatenate([site.scale.ravel() for site in sites if site.scale is not None])
    error = np.abs(loc - reference["loc"]) / reference["scale"]
    ratio = scale / np.asarray(reference["scale"])
    gap = reference["elbo"] + case.elbo_shift - posterior.metrics["elbo"]
    met = error.max() <= 0.3 and ratio.min() >= 0.95 and ratio.max() <= 1.05 and gap <= 0.1 + 0.005 * len(loc)
    return {
        "case": case.name,
        "seed": seed,
        "stress": case.stress,
        "error": float(error.max()),
        "lowest_ratio": float(ratio.min()),
        "highest_ratio": float(ratio.max()),
        "elbo_gap": float(gap),
        "seconds": posterior.metrics["seconds"],
        "rows": posterior.metrics["steps"] * min(4096, posterior.metrics["rows"]),
        "met": bool(met),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--options", type=json.loads, default={}, help="e.g. '{\"objective.pairs\": 4}'")
    given = parser.parse_args()
    if not given.data.is_dir():
        print(f"references: {given.data} is absent, there is nothing to compare with.")
        return
    console = Console(width=120)
    table = Table(title="defaults beside outside answers", title_justify="left")
    for heading in ("case", "seed", "max error / scale", "scale ratios", "ELBO gap", "s", "rows", "met"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    found = []
    for case in [case for case in CASES if case.name in given.cases]:
        for seed in range(given.seeds):
            result = compare(case, given.data, seed, given.options)
            if result is None:
                table.add_row(case.name, "", "no answer given")
                break
            found.append(result)
            table.add_row(
                case.name if seed == 0 else "",
                str(seed),
                f"{result['error']:.3g}",
                f"{result['lowest_ratio']:.3f}-{result['highest_ratio']:.3f}",
                f"{result['elbo_gap']:.3f}",
                f"{result['seconds']:.1f}",
                f"{result['rows']:,}",
                "stress" if case.stress else "yes" if result["met"] else "NO",
            )
    console.print(table)
    judged = [result for result in found if not result["stress"]]
    console.print(f"{sum(result['met'] for result in judged)} of {len(judged)} fits meet the criterion")
    out = ROOT / "demo" / "references.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
