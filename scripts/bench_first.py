"""What a new user waits for: `python -m scripts.bench_first [--rounds 3] [NAME ...]`, on a machine that is quiet.

Each figure is the wall time of a process of its own, the median of rounds taken in turns; cold: with an empty cache.
"""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
FLIGHTS = ROOT / "examples" / "flights200k"
VERBS = ("shard", "verify", "inspect", "train", "predict", "latents", "export", "runs", "sync", "doctor")
LIBRARIES = "import torch, pyro, pytorch_lightning"
SCORES = """
import numpy as np, pyro, pyro.distributions as dist
from trainer import fit

def model(high_school, score=None):
    a = pyro.sample("a", dist.Normal(80.0, 20.0))
    b = pyro.sample("b", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("data", len(high_school)):
        pyro.sample("score", dist.Normal(a + b * high_school, sigma), obs=score)

g = np.random.default_rng(0)
x = (g.random(434) < 0.79).astype(float)
fit(model, {"high_school": x, "score": 77.5 + 11.8 * x + 19.8 * g.normal(size=434)})
"""


@dataclass
class Case:
    """A command, and what its time is measured by."""

    name: str
    command: Callable[[Path], list[str]]
    cold: bool = True
    """Whether every round has an empty cache."""
    seconds: list[float] = field(default_factory=list)
    said: str = ""


def python(program: str) -> Callable[[Path], list[str]]:
    return lambda _: [sys.executable, "-c", program]


def svi(*words: str) -> Callable[[Path], list[str]]:
    return lambda folder: [sys.executable, "-m", "trainer", *(word.format(folder=folder) for word in words)]


def train(*words: str) -> Callable[[Path], list[str]]:
    """The demo's fit, of a table packed before."""
    return lambda folder: [
        *svi("train", "model._target_=flights.delay_model", "data.path={folder}/flights")(folder),
        f"run_dir={folder}/run-{time.monotonic_ns()}",
        "max_epochs=200",
        *words,
    ]


CASES = [
    Case("import torch, pyro, pytorch_lightning", python(LIBRARIES), False),
    Case("from trainer import fit", python("from trainer import fit"), False),
    *(Case(f"svi {verb} --help", svi(verb, "--help"), False) for verb in VERBS),
    Case("434 rows, fit, cold", python(SCORES)),
    Case("434 rows, fit, warm", python(SCORES), False),
    Case("demo, svi train, cold", train()),
    Case("demo, svi train, warm", train(), False),
    Case("demo, program=fused, cold", train("program=fused")),
    Case("demo, program=fused, warm", train("program=fused"), False),
    Case("demo, program=eager", train("program=eager"), False),
]


def run(case: Case, folder: Path, warm: Path) -> None:
    """One round."""
    with TemporaryDirectory() as empty:
        env = {**os.environ, "XDG_CACHE_HOME": empty if case.cold else str(warm), "OMP_NUM_THREADS": "1"}
        began = time.monotonic()
        done = subprocess.run(case.command(folder), cwd=FLIGHTS, env=env, capture_output=True, text=True, check=False)
        took = time.monotonic() - began
    if done.returncode:
        sys.exit(f"{case.name} failed: {done.stderr[-2000:]}")
    case.seconds.append(took)
    case.said = "; ".join(re.findall(r"^.*(?:compil|ELBO).*$", done.stdout, re.MULTILINE))


def processor() -> str:
    """The name of this machine's processor."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("names", nargs="*", help="cases whose names hold one of these words; all when left out")
    given = parser.parse_args()
    chosen = [case for case in CASES if not given.names or any(name in case.name for name in given.names)]
    with TemporaryDirectory() as work:
        folder, warm = Path(work), Path(work) / "warm"
        pack = svi("shard", "source=data.parquet", "columns.distance=distance", "columns.time=time")(folder)
        pack += ["columns.delay=delay", "split.held_out=0", f"out={folder}/flights"]
        subprocess.run(pack, cwd=FLIGHTS, check=True, capture_output=True)
        for case in chosen:
            if not case.cold:  # fills the cache, and the system's pages
                run(case, folder, warm)
                case.seconds.clear()
        for number in range(given.rounds):
            for case in chosen:
                run(case, folder, warm)
                round_of = f"round {number + 1} of {given.rounds}"
                print(f"{round_of}: {case.name} {case.seconds[-1]:.1f} s", file=sys.stderr, flush=True)
    table = Table(title=f"{processor()}, {os.cpu_count()} cores, one thread, load {os.getloadavg()[0]:.1f}")
    for heading in ("", "median s", "least", "most", "said"):
        table.add_column(heading, justify="left" if heading in ("", "said") else "right")
    for case in chosen:
        cells = (statistics.median(case.seconds), min(case.seconds), max(case.seconds))
        table.add_row(case.name, *(f"{cell:.1f}" for cell in cells), case.said)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
