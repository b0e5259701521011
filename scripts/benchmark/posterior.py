"""Time to posterior: seconds until every mean lies within 0.1 sd of the optimum, for logistic regression.

Each contender runs Adam at 0.01 along half a cosine, for ever more epochs, until the run's last iterate meets the
criterion (the largest error over the means, the median over seeds); the seconds are those of that run alone, its
compiling apart. `fused-recipe` runs as `svi train` does by default: antithetic pairs, the last quarter averaged.

The optimum is that of the mean-field ELBO over all rows, exact: Newton steps on its stationary equations in float64,

    x' (y - E sigmoid(u)) - m / tau^2 = 0,     1 / s_d^2 = 1 / tau_d^2 + sum of x_d^2 E sigmoid'(u),

u ~ Normal(x m, x^2 s^2) under the guide, E by Gauss-Hermite quadrature (Opper and Archambeau, "The variational Gaussian
approximation revisited", Neural Computation 21 (2009)). Shapes: x [N, D] with a last column of ones, m and s [D].
"""

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from rich.table import Table

from scripts.benchmark.problems import MODELS, Setting, load
from scripts.benchmark.table import LABELS
from scripts.benchmark.turns import Player, Tick

CONTENDERS = ("pyro-indices", "numpyro-scan", "fused", "fused-recipe")
EPOCHS = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192)
CRITERION = 0.1  # posterior sd
_POINTS = 7
_PIECE = 1 << 16


class Optimum(NamedTuple):
    mean: np.ndarray
    sd: np.ndarray


@dataclass(frozen=True)
class Arrival:
    """The first number of epochs that met the criterion; None where none did."""

    contender: str
    epochs: int | None = None
    seconds: float = 0.0
    error_sd: float = 0.0
    tried: tuple[tuple[int, float, float], ...] = ()
    """(epochs, seconds, error) of every run."""
    error: str = ""


def optimum(columns: dict[str, np.ndarray], prior_sd: np.ndarray) -> Optimum:
    """The exact mean-field optimum, weights first and the intercept last."""
    x, y, precision = torch.from_numpy(columns["x"]), torch.from_numpy(columns["y"]), torch.from_numpy(prior_sd**-2.0)
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(_POINTS))
    weights = weights / weights.sum()
    mean, variance = torch.zeros_like(precision), torch.full_like(precision, 1.0 / len(x))
    for _ in range(50):
        gradient, hessian = -precision * mean, torch.diag(precision)
        for part, target in zip(x.split(_PIECE), y.split(_PIECE)):
            rows = torch.cat([part, torch.ones(len(part), 1)], dim=1).double()
            u = (rows @ mean)[:, None] + (rows**2 @ variance).sqrt()[:, None] * nodes
            p = u.sigmoid()
            gradient = gradient + rows.T @ (target.double() - p @ weights)
            hessian = hessian + rows.T @ (rows * ((p * (1 - p)) @ weights)[:, None])
        move = torch.linalg.solve(hessian, gradient)
        before, mean, variance = variance, mean + move, 1 / hessian.diag()
        if max((move**2 / variance).max() ** 0.5, (variance / before - 1).abs().max()) < 1e-8:
            return Optimum(mean.numpy(), variance.sqrt().numpy())
    raise RuntimeError("Newton's method found no optimum")


def fit_setting(setting: Setting) -> Setting:
    """``setting`` with the largest number of slots that cuts an epoch into whole chunks. The batch must divide N."""
    steps = setting.num_obs // setting.batch
    if steps * setting.batch != setting.num_obs:
        raise SystemExit(
            f"--posterior needs a batch that divides N({setting.num_obs}): --batch {setting.batch} does not."
        )
    return replace(setting, slots=max(k for k in range(1, setting.slots + 1) if steps % k == 0))


def arrive(name: str, setting: Setting, best: Optimum, seeds: int, log: Path, caches: Path, tick: Tick) -> Arrival:
    """Runs of ever more epochs, until one arrives. They share ``caches``: what is compiled may serve any horizon."""
    steps = setting.num_obs // setting.batch
    tried: list[tuple[int, float, float]] = []
    for epochs in EPOCHS:
        tick(f"{name}: {epochs} epochs", 10.0)
        player = Player(name, replace(setting, horizon=epochs * steps), log, caches)
        try:
            player.ask("start")
            runs = [player.ask("fit", seed=seed, steps=epochs * steps) for seed in range(seeds)]
        finally:
            player.close()
        if player.error:
            return Arrival(name, error=player.error)
        error = median(float((np.abs(np.array(run["means"]) - best.mean) / best.sd).max()) for run in runs)
        seconds = median(run["seconds"] for run in runs)
        tried.append((epochs, seconds, error))
        if error <= CRITERION:
            return Arrival(name, epochs, seconds, error, tuple(tried))
    return Arrival(name, tried=tuple(tried))


def race(setting: Setting, names: list[str], seeds: int, log: Path, tick: Tick) -> list[Arrival]:
    """Every contender's arrival at the same optimum."""
    zoo = MODELS["logistic"]
    best = optimum(load(setting), np.array([zoo.weight_sd] * zoo.features + [zoo.intercept_sd]))
    with TemporaryDirectory(prefix="svi-bench-") as caches:
        return [arrive(name, setting, best, seeds, log, Path(caches), tick) for name in names]


def arrivals_table(arrivals: list[Arrival], setting: Setting) -> Table:
    title = f"logistic, B = {setting.batch:,}, N = {setting.num_obs:,}: until every mean is within {CRITERION} sd"
    table = Table(title=title, title_justify="left")
    table.add_column("contender", no_wrap=True)
    for heading in ("seconds", "epochs", "largest error, sd"):
        table.add_column(heading, justify="right")
    for each in arrivals:
        if each.epochs is None:
            closest = min((error for _, _, error in each.tried), default=float("nan"))
            table.add_row(LABELS[each.contender], "–", "–", each.error or f"{closest:.3f} at best")
        else:
            table.add_row(LABELS[each.contender], f"{each.seconds:.2f}", str(each.epochs), f"{each.error_sd:.3f}")
    return table
