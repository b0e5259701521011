"""Time to posterior: seconds until every mean lies within 0.1 sd of the optimum.

NumPyro and Pyro run Adam at a constant rate until an iterate is there, which an oracle tells them at once: NumPyro at
each of five rates, of which its best counts, Pyro at that rate. We run `fit` with the defaults, which ends when its own
rule says so; its seconds count from the search for a mode to the last pass over the rows. Compiling is apart for all.

With many latents: every mean of those that no group has for itself, and 99 % of the others. The network has no one
optimum to be near to.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from rich.table import Table

from scripts.benchmark.optima import of_hierarchical, of_logistic
from scripts.benchmark.problems import MODELS, Setting, load
from scripts.benchmark.table import LABELS
from scripts.benchmark.turns import COMPILING, Player, Tick

OURS = "recipe"
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
LIMIT = 60.0  # seconds that a run may take
CRITERION = 0.1  # posterior sd


@dataclass(frozen=True)
class Arrival:
    """Medians over seeds; ``there``: in how many of them the criterion was met within the limit."""

    contender: str
    rate: float | None
    seconds: float
    error: float
    there: int
    of: int
    failed: str = ""


def arrive(name: str, setting: Setting, target: Path, seeds: int, log: Path, tick: Tick) -> Arrival:
    """The runs of one contender, which is told its rate by ``setting``."""
    rate = None if name == OURS else setting.rate
    player = Player(name, setting, log, target.parent)
    try:
        tick(f"{name}: compiling", COMPILING)
        player.ask("start")
        runs = []
        for seed in range(seeds):
            tick(f"{name}: run {seed + 1} of {seeds}", 10.0)
            given = {} if name == OURS else {"limit": LIMIT, "within": CRITERION}
            runs.append(player.ask("fit" if name == OURS else "chase", seed=seed, target=str(target), **given))
    finally:
        player.close()
    if player.error:
        return Arrival(name, rate, 0.0, 0.0, 0, seeds, player.error)
    errors = [run["off_by"] for run in runs]
    there = sum(error <= CRITERION for error in errors)
    return Arrival(name, rate, median(run["seconds"] for run in runs), median(errors), there, seeds)


def race(setting: Setting, seeds: int, log: Path, tick: Tick) -> list[Arrival]:
    """Everybody's arrival at the same optimum: ours, NumPyro's at each rate, Pyro's at NumPyro's best."""
    zoo, columns = MODELS[setting.model], load(setting)
    if setting.model == "logistic":
        best = of_logistic(columns, np.array([zoo.weight_sd] * zoo.features + [zoo.intercept_sd]))
    else:
        best = of_hierarchical(columns, zoo)
    with TemporaryDirectory(prefix="svi-bench-") as folder:
        target = Path(folder) / "optimum.npz"
        np.savez(target, mean=best.mean, sd=best.sd, top=best.top)

        def run(name: str, rate: float) -> Arrival:
            return arrive(name, replace(setting, rate=rate), target, seeds, log, tick)

        found = [run(OURS, RATES[0]), *(run("numpyro-scan", rate) for rate in RATES)]
        fastest = min(found[1:], key=lambda each: (-each.there, each.seconds))
        return [*found, run("pyro-indices", fastest.rate or RATES[0])]


def arrivals_table(arrivals: list[Arrival], setting: Setting) -> Table:
    title = (
        f"{setting.model}, B = {setting.batch:,}, N = {setting.num_obs:,}: until every mean is within {CRITERION} sd"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("contender", no_wrap=True)
    for heading in ("rate", "seconds", "largest error, sd", "there", "times ours"):
        table.add_column(heading, justify="right")
    for each in arrivals:
        times = each.seconds / max(arrivals[0].seconds, 1e-9)
        figures = [f"{each.seconds:.2f}", f"{each.error:.3f}", f"{each.there} of {each.of}", f"{times:.2f}"]
        if each.failed:
            figures = ["–", each.failed, "–", "–"]
        table.add_row(LABELS[each.contender], "–" if each.rate is None else f"{each.rate:g}", *figures)
    return table
