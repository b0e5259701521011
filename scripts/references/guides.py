"""Guides beside draws of the posterior: `python -m scripts.references.guides [--guides NAME ...] [--cases NAME ...]`.

For every case of posteriordb whose draws are known: the largest error of a mean, in sds of the draws, the range of the
sds beside theirs, that of the top-level latents, and the ELBO beside that of the mean-field optimum and the log
evidence, in nats.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from scripts.references.__main__ import DATA
from scripts.references.case import Case
from scripts.references.cases import CASES
from trainer import fit
from trainer.errors import UserError


def compare(case: Case, data: Path, guide: str, seed: int) -> str:
    """One fit with the defaults, in a line."""
    draws, answer = case.draws(data), case.answer(data)
    assert draws is not None
    assert answer is not None
    posterior = fit(case.model, case.rows(data), guide, seed=seed, progress=False, options=case.options)
    loc, scale = case.judged(posterior.summary())
    error, ratio, metrics = np.abs(loc - draws.mean) / draws.sd, scale / draws.sd, posterior.metrics
    top: Any = ratio[answer.top]
    errors = f"mean {error.max():6.3f} sd  sds {ratio.min():.3f}-{ratio.max():.3f}  top {top.min():.3f}-{top.max():.3f}"
    elbo, gap = metrics["elbo"] - answer.elbo, draws.log_evidence - metrics["elbo"]
    nats = (
        f"ELBO {metrics['elbo']:11.3f} ± {metrics['elbo_se']:.3f}  over mean-field {elbo:+8.3f}  to evidence {gap:.3f}"
    )
    ends = f"{metrics['stop_reason']}  {metrics['steps']} steps  {metrics['seconds']:.1f} s"
    return f"{case.name:24s} {guide:12s} D {len(loc):4d}  {errors}  {nats}  {ends}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guides", nargs="+", default=["full_rank"])
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for case in [case for case in CASES if case.name in given.cases]:
        for guide in given.guides if case.draws(given.data) is not None else ():
            try:
                print(compare(case, given.data, guide, given.seed), flush=True)
            except UserError as error:
                print(f"{case.name:24s} {guide:12s} {error}", flush=True)


if __name__ == "__main__":
    main()
