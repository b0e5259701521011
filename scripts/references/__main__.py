"""The defaults beside outside answers: `python -m scripts.references [--seeds 3] [--cases NAME ...]`.

For every case: errors of the locations in reference scales, ratios of the scales, the gap of the ELBO in nats, seconds
of training and rows used, beside the criterion of the data's README. At most 256 latents: every error at most 0.3,
every ratio within [0.95, 1.05], gap at most 0.1 + 0.005 D. More: rms at most 0.1, 99.9 % at most 0.4, top-level
latents at most 0.3, the ratios' 1-99 % quantiles within [0.9, 1.1], gap at most 0.01 D. Writes demo/references.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from scripts.references.case import Answer, Case
from scripts.references.cases import CASES
from trainer import fit
from trainer.errors import UserError

ROOT = Path(__file__).parent.parent.parent
DATA = ROOT.parent / "shared" / "data"
_FEW = 256


def judge(answer: Answer, loc: np.ndarray, scale: np.ndarray, elbo: float) -> dict[str, Any]:
    """Errors and ratios, and whether they meet the criterion."""
    error, ratio = np.abs(loc - answer.loc) / answer.scale, scale / answer.scale
    size, gap = len(loc), answer.elbo - elbo
    top = float(error[answer.top].max())
    rms, most = float(np.sqrt((error**2).mean())), float(np.quantile(error, 0.999))
    if size <= _FEW:
        low, high = float(ratio.min()), float(ratio.max())
        met = error.max() <= 0.3 and low >= 0.95 and high <= 1.05 and gap <= 0.1 + 0.005 * size
    else:
        low, high = (float(np.quantile(ratio, q)) for q in (0.01, 0.99))
        met = rms <= 0.1 and most <= 0.4 and top <= 0.3 and low >= 0.9 and high <= 1.1 and gap <= 0.01 * size
    found = {"rms": rms, "q999": most, "top": top, "error": float(error.max()), "low": low, "high": high, "gap": gap}
    return {"latents": size, **found, "met": bool(met)}


def compare(case: Case, data: Path, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """One fit with the defaults (and ``options``), beside the answer where there is one."""
    posterior = fit(case.model, case.rows(data), seed=seed, progress=False, options={**case.options, **options})
    answer, metrics = case.answer(data), posterior.metrics
    found = {} if answer is None else judge(answer, *case.judged(posterior.summary()), metrics["elbo"])
    facts = {name: metrics[name] for name in ("elbo", "elbo_se", "seconds", "epochs", "stop_reason")}
    rows = round((metrics["epochs"] + metrics["passes"]) * metrics["rows"])
    return {"case": case.name, "seed": seed, "stress": case.stress, **found, **facts, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--options", type=json.loads, default={}, help="e.g. '{\"objective.pairs\": 4}'")
    parser.add_argument("--out", type=Path, default=ROOT / "demo" / "references.json")
    given = parser.parse_args()
    if not given.data.is_dir():
        print(f"references: {given.data} is absent, there is nothing to compare with.")
        return
    console = Console(width=132)
    found = []
    for case in [case for case in CASES if case.name in given.cases]:
        for seed in range(given.seeds):
            try:
                found.append(compare(case, given.data, seed, given.options))
            except UserError as error:
                found.append({"case": case.name, "seed": seed, "stress": case.stress, "failed": str(error)})
            console.print(" | ".join(_cells(found[-1])))
    table = Table(title="defaults beside outside answers", title_justify="left")
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for result in found:
        table.add_row(*_cells(result))
    console.print(table)
    judged = [result for result in found if "met" in result and not result["stress"]]
    console.print(f"{sum(result['met'] for result in judged)} of {len(judged)} fits meet the criterion")
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1))


_HEADINGS = ("case", "seed", "D", "max error", "rms", "top", "scale ratios", "ELBO gap", "s", "rows", "stop", "met")


def _cells(r: dict[str, Any]) -> list[str]:
    if "failed" in r:
        return [r["case"], str(r["seed"]), *[""] * 8, r["failed"], "NO"]
    ends = [f"{r['seconds']:.1f}", f"{r['rows']:,}", r["stop_reason"]]
    if "met" not in r:
        return [r["case"], str(r["seed"]), *[""] * 4, "no answer given", f"({r['elbo']:,.2f})", *ends, ""]
    numbers = [f"{r['error']:.3f}", f"{r['rms']:.3f}", f"{r['top']:.3f}", f"{r['low']:.3f}-{r['high']:.3f}"]
    verdict = "stress" if r["stress"] else "yes" if r["met"] else "NO"
    return [r["case"], str(r["seed"]), str(r["latents"]), *numbers, f"{r['gap']:.3f}", *ends, verdict]


if __name__ == "__main__":
    main()
