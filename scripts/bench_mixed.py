"""A logistic model with a random intercept: persons x ratings, two slopes. By `fit`, by glmer(nAGQ = 9), by glmmTMB.

    scripts/bench_mixed [--persons 10000 100000] [--ratings 10] [--without glmer glmmTMB] [--step]

`fit` takes rows of fixed width, a person each (x [N, J, 2], y [N, J]), from shards; R a table of observations. Each has
a process of its own, one after the other, on the same rows with one thread. Prints wall and CPU seconds of the call
(imports are not counted, compiling is), the estimates, their distance from the exact optimum in posterior sds and the
peak of memory. `--step`: instead, what a compiled step costs, beside that of the model without its random intercept.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from numpy import ndarray
from rich.console import Console
from rich.table import Table

from scripts.bench_first import processor
from scripts.mixed_optimum import PRIOR_SCALE, PRIOR_SD, Optimum, optimum

TRUTH = np.array([-0.4, 0.5, -0.7, np.log(1.2)])
NAMES = ("intercept", "slope 1", "slope 2", "log sd")
FORMULA = "y ~ x1 + x2 + (1 | person), d, binomial"
R = {
    "glmer": f"m <- lme4::glmer({FORMULA}, nAGQ = 9)",
    "glmmTMB": f"m <- glmmTMB::glmmTMB({FORMULA})",
}
ESTIMATES = {
    "glmer": "c(lme4::fixef(m), log(attr(lme4::VarCorr(m)$person, 'stddev')))",
    "glmmTMB": "c(glmmTMB::fixef(m)$cond, log(attr(glmmTMB::VarCorr(m)$cond$person, 'stddev')))",
}
PACKAGES = {"glmer": "lme4", "glmmTMB": "glmmTMB"}
_MB = 2**20


def made(persons: int, ratings: int) -> tuple[ndarray, ndarray]:
    """x [N, J, 2] and y [N, J], float32."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((persons, ratings, 2), dtype=np.float32)
    x[..., 1] = x[..., 1] > 0.3
    logits = TRUTH[0] + x @ TRUTH[1:3] + np.exp(TRUTH[3]) * generator.standard_normal((persons, 1))
    return x, (generator.random((persons, ratings)) < 1 / (1 + np.exp(-logits))).astype(np.float32)


def store(folder: Path, x: ndarray, y: ndarray, table: bool) -> None:
    """Shards for `fit`, and a table for R."""
    from trainer.data.packing.pack import pack
    from trainer.data.sources.memory import MemorySource

    pack(MemorySource({"x": x, "y": y}), folder / "shards", held_out=0)
    if table:
        person = np.arange(len(y)).repeat(y.shape[1])
        columns = np.column_stack([person, x.reshape(-1, 2), y.reshape(-1)])
        np.savetxt(folder / "d.csv", columns, "%d,%.9g,%d,%d", header="person,x1,x2,y", comments="")


def by_fit(folder: Path) -> dict[str, Any]:
    """In this process."""
    import pyro
    import pyro.distributions as dist
    import torch

    from trainer import fit

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        intercept = pyro.sample("intercept", dist.Normal(0.0, PRIOR_SD))
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2), PRIOR_SD).to_event(1))
        sd = pyro.sample("sd", dist.HalfCauchy(PRIOR_SCALE))
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(0.0, sd))
            pyro.sample("y", dist.Bernoulli(logits=intercept + x @ slope + u[:, None]).to_event(1), obs=y)

    began, before = time.monotonic(), cpu_seconds()
    posterior = fit(model, str(folder / "shards"))
    seconds, cpu = time.monotonic() - began, cpu_seconds() - before
    at = np.concatenate([np.ravel(site.loc) for site in posterior.summary()])
    return {"seconds": seconds, "cpu": cpu, "at": at.tolist()}


def cpu_seconds() -> float:
    """Of this process and the compilers that it has waited for."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in both)


def by_r(name: str, folder: Path) -> dict[str, Any]:
    program = (
        f"d <- read.csv('{folder}/d.csv'); d$person <- factor(d$person); suppressMessages(library({PACKAGES[name]}))\n"
        f"t <- system.time({R[name]})\ncat('\\n', t[['elapsed']], t[[1]] + t[[2]], {ESTIMATES[name]}, '\\n')"
    )
    done = subprocess.run(["Rscript", "-e", program], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed: {done.stderr[-1000:]}")
    seconds, cpu, *at = map(float, done.stdout.split("\n")[-2].split())
    return {"seconds": seconds, "cpu": cpu, "at": at}


def in_a_process(name: str, folder: Path) -> dict[str, Any]:
    """What ``name`` gives, its step compiled anew."""
    command = [sys.executable, "-m", "scripts.bench_mixed", "--one", name, str(folder)]
    with TemporaryDirectory() as cache:
        subprocess.run(command, env={**os.environ, "XDG_CACHE_HOME": cache}, check=True)
    return {"name": name, **json.loads((folder / f"{name}.json").read_text())}


def one(name: str, folder: Path) -> None:
    found = by_fit(folder) if name == "fit" else by_r(name, folder)
    who = resource.RUSAGE_SELF if name == "fit" else resource.RUSAGE_CHILDREN
    found["mb"] = resource.getrusage(who).ru_maxrss * 1024 / _MB
    (folder / f"{name}.json").write_text(json.dumps(found))


def missing(name: str) -> str:
    """Why R's ``name`` cannot run here; empty where it can."""
    if shutil.which("Rscript") is None:
        return "Rscript was not found"
    test = f"quit(status = !requireNamespace('{PACKAGES[name]}', quietly = TRUE))"
    found = subprocess.run(["Rscript", "-e", test], capture_output=True, check=False).returncode == 0
    return "" if found else f"R has no package {PACKAGES[name]}"


def compared(persons: int, ratings: int, names: list[str], console: Console) -> list[dict[str, Any]]:
    with TemporaryDirectory(dir="/var/tmp") as place:
        folder, (x, y) = Path(place), made(persons, ratings)
        store(folder, x, y, len(names) > 1)
        results = [in_a_process(name, folder) for name in names]
    exact = optimum(x, y, np.array(results[0]["at"]))
    console.print(table_of(persons, ratings, results, exact))
    return [{"persons": persons, "ratings": ratings, **each, "exact": exact.at.tolist()} for each in results]


def table_of(persons: int, ratings: int, results: list[dict[str, Any]], exact: Optimum) -> Table:
    table = Table(title=f"{persons:,} persons x {ratings} ratings · {processor()}, load {os.getloadavg()[0]:.1f}")
    for heading in ("", "s", "CPU s", "MB", *NAMES, "farthest, sd"):
        table.add_column(heading, justify="right" if heading else "left")
    for each in results:
        far = np.abs((np.array(each["at"]) - exact.at) / exact.sd).max()
        figures = f"{each['seconds']:.1f}", f"{each['cpu']:.1f}", f"{each['mb']:.0f}"
        table.add_row(each["name"], *figures, *(f"{value:.5f}" for value in each["at"]), f"{far:.3f}")
    table.add_row("exact", "", "", "", *(f"{value:.5f}" for value in exact.at), "")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--persons", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--ratings", type=int, default=10)
    parser.add_argument("--without", nargs="+", choices=list(R), default=[])
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--rounds", type=int, default=21, help="of --step")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("bench/mixed.json"))
    given = parser.parse_args()
    if given.one:
        return one(given.one[0], Path(given.one[1]))
    console = Console(width=160)
    if given.step:
        from scripts.mixed_step import steps

        return console.print(steps(given.rounds))
    names = ["fit"]
    for name in (each for each in R if each not in given.without):
        reason = missing(name)
        if reason:
            console.print(f"{name} is skipped: {reason}.")
        else:
            names.append(name)
    results = [each for persons in given.persons for each in compared(persons, given.ratings, names, console)]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(results, indent=1))
    return None


if __name__ == "__main__":
    main()
