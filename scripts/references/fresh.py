"""Problems that nothing was tuned on, with exact mean-field optima: heavy tails, rare groups, separable rows and more.

Shapes: N rows, D coefficients, G groups.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from scripts.references.case import Answer, Case

_POINTS = 31
Family = Callable[[Tensor], Any]
"""The distribution of y [...] at a linear predictor [...]."""


class Problem(NamedTuple):
    """y ~ family(x w), w ~ Normal(0, prior_sd)."""

    x: np.ndarray
    """[N, D]."""
    y: np.ndarray
    """[N]."""
    prior_sd: np.ndarray
    """[D]."""
    family: Family
    groups: int = 0
    """How many of the last coefficients are effects of groups."""

    @property
    def sizes(self) -> list[int]:
        """Coefficients of each site."""
        return [size for size in (len(self.prior_sd) - self.groups, self.groups) if size]


def bernoulli(u: Tensor) -> Any:
    return dist.Bernoulli(logits=u)


def poisson(u: Tensor) -> Any:
    return dist.Poisson(u.exp())


def normal(u: Tensor) -> Any:
    return dist.Normal(u, 1.0)


def heavy(u: Tensor) -> Any:
    return dist.StudentT(2.0, u, 0.5)


def drawn(x: np.ndarray, truth: np.ndarray, family: Family) -> np.ndarray:
    """y [N] at coefficients ``truth`` [D]."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return np.asarray(family(torch.from_numpy(x @ truth)).sample())


def heavy_tails() -> Problem:
    """Student-t noise of two degrees of freedom, whose variance is infinite."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(20_000, 10))
    return Problem(x, drawn(x, rng.normal(size=10), heavy), np.full(10, 5.0), heavy)


def rare_groups() -> Problem:
    """400 groups, of which a quarter has fewer than five of 20,000 rows."""
    rng = np.random.default_rng(2)
    share = 1 / np.arange(1, 401) ** 1.3
    group = rng.choice(400, size=20_000, p=share / share.sum())
    x = np.concatenate([np.ones((20_000, 1)), np.eye(400)[group]], axis=1)
    sd = np.r_[10.0, np.ones(400)]
    return Problem(x, drawn(x, np.r_[-1.0, rng.normal(size=400)], bernoulli), sd, bernoulli, groups=400)


def separable() -> Problem:
    """A plane divides the ones from the zeros: the prior alone keeps the coefficients finite."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2_000, 8))
    return Problem(x, (x @ rng.normal(size=8) > 0).astype(float), np.full(8, 2.5), bernoulli)


def all_scales() -> Problem:
    """Columns of 0.001 to 1,000, correlated."""
    rng = np.random.default_rng(4)
    scale = 10.0 ** np.linspace(-3, 3, 12)
    x = (rng.normal(size=(50_000, 1)) + rng.normal(size=(50_000, 12))) * scale
    truth = rng.normal(size=12) / scale
    return Problem(x, drawn(x, truth, normal), 10 / scale, normal)


def eight_rows() -> Problem:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(8, 3))
    return Problem(x, drawn(x, rng.normal(size=3), normal), np.full(3, 2.0), normal)


def counts() -> Problem:
    """Mostly zeros, and some of hundreds."""
    rng = np.random.default_rng(6)
    x = np.column_stack([np.ones(30_000), rng.normal(size=(30_000, 6))])
    return Problem(x, drawn(x, np.r_[-2.0, rng.normal(size=6) * 0.8], poisson), np.full(7, 5.0), poisson)


def nearly_collinear() -> Problem:
    """Eight columns with correlations of .999."""
    rng = np.random.default_rng(8)
    x = rng.normal(size=(40_000, 1)) + 0.03 * rng.normal(size=(40_000, 8))
    return Problem(x, drawn(x, rng.normal(size=8), bernoulli), np.full(8, 3.0), bernoulli)


def optimum(problem: Problem) -> Answer:
    """Newton steps, halved until the ELBO grows, on the stationary equations of loc m and scale s.

        x' E l'(u) = m / tau^2,     1 / s_d^2 = 1 / tau_d^2 - sum of x_d^2 E l''(u),

    for the log density l and u ~ Normal(x m, x^2 s^2), E by Gauss-Hermite quadrature (Opper and Archambeau 2009).
    """
    rows, precision = torch.from_numpy(problem.x), torch.from_numpy(problem.prior_sd) ** -2
    mean, variance = torch.zeros_like(precision), (precision + (rows**2).sum(0)).reciprocal()
    best, slope, curve = _expected(problem, mean, variance)
    for _ in range(200):
        gradient = rows.T @ slope - precision * mean
        hessian = rows.T @ (rows * -curve.clamp(max=0.0)[:, None]) + precision.diag()
        move, size = torch.linalg.solve(hessian, gradient), 1.0
        wanted = (precision - (rows**2).T @ curve).clamp(min=0.1 * precision).reciprocal()
        while True:
            ahead = mean + size * move, variance * (wanted / variance) ** size
            found = _expected(problem, *ahead)
            if found[0] >= best - 1e-9 * abs(best) or size < 1e-3:
                break
            size /= 2
        still = max(float((move**2 / wanted).max()) ** 0.5, float((wanted / variance - 1).abs().max()))
        (mean, variance), (best, slope, curve) = ahead, found
        if still < 1e-7:
            top = np.arange(len(mean)) < problem.sizes[0]
            return Answer(mean.numpy(), variance.sqrt().numpy(), float(best), top)
    raise RuntimeError("Newton's method found no optimum")


def _expected(problem: Problem, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ELBO [] in nats, and E l' and E l'' [N]."""
    rows, precision = torch.from_numpy(problem.x), torch.from_numpy(problem.prior_sd) ** -2
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(_POINTS))
    u = (rows @ mean)[:, None] + (rows**2 @ variance).sqrt()[:, None] * nodes
    u.requires_grad_()
    density = problem.family(u).log_prob(torch.from_numpy(problem.y)[:, None])
    (slope,) = torch.autograd.grad(density.sum(), u, create_graph=True)
    (curve,) = torch.autograd.grad(slope.sum(), u)
    kl = 0.5 * (precision * (mean**2 + variance) - 1 - (precision * variance).log()).sum()
    weights = weights / weights.sum()
    return (density.detach() @ weights).sum() - kl, slope.detach() @ weights, curve @ weights


def elbo(problem: Problem, loc: np.ndarray, scale: np.ndarray) -> float:
    """Of a guide with ``loc`` and ``scale`` [D], in nats."""
    return float(_expected(problem, torch.from_numpy(loc), torch.from_numpy(scale) ** 2)[0])


def case(name: str, make: Callable[[], Problem]) -> Case:
    problem = cache(make)

    def model(x: Tensor, y: Tensor) -> None:
        parts = torch.as_tensor(problem().prior_sd, dtype=x.dtype, device=x.device).split(problem().sizes)
        names = ("w", "effect")
        each = [pyro.sample(n, dist.Normal(0 * sd, sd).to_event(1)) for n, sd in zip(names, parts, strict=False)]
        with pyro.plate("data", len(x)):
            pyro.sample("y", problem().family(x @ torch.cat(each)), obs=y)

    return Case(name, model, lambda _: {"x": problem().x, "y": problem().y}, lambda _: optimum(problem()))


CASES = (
    case("heavy tails", heavy_tails),
    case("rare groups", rare_groups),
    case("separable, with a prior", separable),
    case("columns of all scales", all_scales),
    case("eight rows", eight_rows),
    case("counts", counts),
    case("nearly collinear", nearly_collinear),
)
