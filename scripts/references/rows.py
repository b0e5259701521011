"""Latents of rows beside quadrature: `python -m scripts.references.rows [--rows 10000 1000000] [--problems NAME ...]`.

For every model with effects of rows: the fit with the defaults beside the mean-field optimum of its exact marginal
density, by 60 nodes in float64. Locations have to be within 0.05 of its scales, scales within 5 %, the ELBO within
0.1 + 0.005 D nats. Prints a line a fit; exits 1 where one is outside.
"""

import argparse
import json
import sys
import time
from typing import Any

import numpy as np

from scripts.references.case import guide_of
from scripts.references.marginals import Marginal, RowProblem, optimum
from scripts.references.row_models import PROBLEMS
from trainer import fit

_LOCATION, _SCALE = 0.05, 0.05


def compare(problem: RowProblem, rows: int, seed: int = 0, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """One fit with the defaults (and ``options``) of ``rows`` generated rows, beside the optimum."""
    data = problem.rows(np.random.default_rng(seed + 1), rows)
    began = time.monotonic()
    answer = optimum(Marginal(problem, data))
    exact = time.monotonic() - began
    posterior = fit(problem.model, problem.given(data), seed=seed, progress=False, options=options)
    loc, scale = guide_of(posterior.summary())
    error = float((np.abs(loc - answer.loc) / answer.scale).max())
    ratio, gap = scale / answer.scale, answer.elbo - posterior.metrics["elbo"]
    met = error <= _LOCATION and abs(ratio - 1).max() <= _SCALE and abs(gap) <= 0.1 + 0.005 * len(loc)
    found = {"latents": len(loc), "error": error, "low": float(ratio.min()), "high": float(ratio.max()), "gap": gap}
    facts = {name: posterior.metrics[name] for name in ("elbo", "elbo_se", "seconds", "steps", "epochs", "stop_reason")}
    return {"problem": problem.name, "rows": rows, **found, "met": bool(met), "exact_s": exact, **facts}


def line(r: dict[str, Any]) -> str:
    errors = f"error {r['error']:.3f} sd  scales {r['low']:.3f}-{r['high']:.3f}"
    nats = f"gap {r['gap']:+.3f} ± {r['elbo_se']:.3f}"
    ends = f"{r['stop_reason']}  {r['epochs']:.1f} epochs  {r['seconds']:.1f} s (quadrature {r['exact_s']:.1f} s)"
    verdict = "yes" if r["met"] else "NO"
    return f"{r['problem']:22s} N {r['rows']:9,d}  D {r['latents']}  {errors}  {nats}  {ends}  {verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [problem.name for problem in PROBLEMS]
    parser.add_argument("--problems", nargs="+", default=names, choices=names)
    parser.add_argument("--rows", nargs="+", type=int, default=[10_000, 1_000_000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", type=json.loads, default={})
    given = parser.parse_args()
    met = True
    for rows in given.rows:
        for problem in [each for each in PROBLEMS if each.name in given.problems]:
            found = compare(problem, rows, given.seed, given.options)
            print(line(found), flush=True)
            met = met and found["met"]
    sys.exit(not met)


if __name__ == "__main__":
    main()
