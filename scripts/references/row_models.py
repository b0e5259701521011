"""Models with an effect of each row, as their users write them, and their rows' log-likelihoods by hand.

Covariates are multiples of a half or a tenth, so that many rows are equal.

Shapes: N rows, e [S, U, d], columns [1, U, ...].
"""

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from scripts.references.case import Rows
from scripts.references.marginals import Global, RowProblem, Values
from trainer.data.fields import RaggedRows
from trainer.inference.model.ragged import Ragged

TIMES = torch.arange(5) - 2.0
"""Of a row's answers."""
ITEMS = torch.arange(4) - 1.5


def halves(rng: np.random.Generator, rows: int) -> np.ndarray:
    return np.round(2 * rng.normal(size=rows)) / 2


# Poisson-lognormal


def counts(x: Tensor, count: Tensor | None = None) -> None:
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        effect = pyro.sample("effect", dist.Normal(0.0, spread))
        pyro.sample("count", dist.Poisson((b[0] + b[1] * x + effect).exp()), obs=count)


def counts_rows(rng: np.random.Generator, rows: int) -> Rows:
    x = np.round(rng.normal(size=rows), 1)
    return {"x": x, "count": rng.poisson(np.exp(0.2 + 0.5 * x + 0.9 * rng.normal(size=rows))).astype(float)}


def counts_row(values: Values, e: Tensor, columns: Values) -> Tensor:
    eta = values["b"][0] + values["b"][1] * columns["x"] + values["spread"] * e[..., 0]
    return columns["count"] * eta - eta.exp() - torch.lgamma(columns["count"] + 1)


# logistic, with a random intercept; with intercept and slope


def intercept(x: Tensor, answer: Tensor | None = None) -> None:
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    spread = pyro.sample("spread", dist.HalfNormal(2.0))
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, spread))
        logits = (b[0] + b[1] * x + u).unsqueeze(-1) + b[2] * TIMES
        pyro.sample("answer", dist.Bernoulli(logits=logits).to_event(1), obs=answer)


def slopes(x: Tensor, answer: Tensor | None = None) -> None:
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    spread = pyro.sample("spread", dist.HalfNormal(2.0))
    tilt = pyro.sample("tilt", dist.HalfNormal(2.0))
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, spread))
        v = pyro.sample("v", dist.Normal(0.0, tilt))
        logits = (b[0] + b[1] * x + u).unsqueeze(-1) + (b[2] + v).unsqueeze(-1) * TIMES
        pyro.sample("answer", dist.Bernoulli(logits=logits).to_event(1), obs=answer)


def correlated(x: Tensor, answer: Tensor | None = None) -> None:
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    spread = pyro.sample("spread", dist.HalfNormal(torch.full((2,), 2.0)).to_event(1))
    root = pyro.sample("root", dist.LKJCholesky(2, 2.0))
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.MultivariateNormal(torch.zeros(2), scale_tril=spread.unsqueeze(-1) * root))
        logits = (b[0] + b[1] * x + u[..., 0]).unsqueeze(-1) + (b[2] + u[..., 1]).unsqueeze(-1) * TIMES
        pyro.sample("answer", dist.Bernoulli(logits=logits).to_event(1), obs=answer)


def answers(root: np.ndarray) -> Callable[[np.random.Generator, int], Rows]:
    """Rows whose effects of intercept and slope are ``root`` [2, 2] times normals."""

    def rows(rng: np.random.Generator, count: int) -> Rows:
        x, effect = halves(rng, count), rng.normal(size=(count, 2)) @ root.T
        logits = (-0.3 + 0.8 * x + effect[:, 0])[:, None] + (0.4 + effect[:, 1])[:, None] * TIMES.numpy()
        return {"x": x, "answer": (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(float)}

    return rows


def answers_row(values: Values, columns: Values, level: Tensor, tilt: Tensor | float) -> Tensor:
    """At the effects of intercept and slope, [S, U] each."""
    b, sign = values["b"], 2 * columns["answer"] - 1
    eta = b[0] + b[1] * columns["x"] + level
    slope = torch.as_tensor(b[2] + tilt).expand_as(eta)
    return sum(logsigmoid(sign[..., t] * (eta + slope * at)) for t, at in enumerate(TIMES.double()))


def intercept_row(values: Values, e: Tensor, columns: Values) -> Tensor:
    return answers_row(values, columns, values["spread"] * e[..., 0], 0.0)


def slopes_row(values: Values, e: Tensor, columns: Values) -> Tensor:
    return answers_row(values, columns, values["spread"] * e[..., 0], values["tilt"] * e[..., 1])


def correlated_row(values: Values, e: Tensor, columns: Values) -> Tensor:
    effect = e @ (values["spread"][:, None] * values["root"]).T
    return answers_row(values, columns, effect[..., 0], effect[..., 1])


# ordinal


def ordinal(x: Tensor, rating: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    base = dist.Normal(torch.zeros(3), 3.0).to_event(1)
    cut = pyro.sample("cut", dist.TransformedDistribution(base, dist.transforms.OrderedTransform()))
    spread = pyro.sample("spread", dist.HalfNormal(2.0))
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, spread))
        predictor = (slope[0] * x + u).unsqueeze(-1) + slope[1] * ITEMS
        pyro.sample("rating", dist.OrderedLogistic(predictor, cut).to_event(1), obs=rating)


def ordinal_rows(rng: np.random.Generator, rows: int) -> Rows:
    x = halves(rng, rows)
    place = (0.9 * x + 1.1 * rng.normal(size=rows))[:, None] - 0.5 * ITEMS.numpy() + rng.logistic(size=(rows, 4))
    return {"x": x, "rating": np.digitize(place, [-1.5, 0.2, 1.4])}


def ordinal_row(values: Values, e: Tensor, columns: Values) -> Tensor:
    """log of sigmoid(c_k - eta) - sigmoid(c_(k-1) - eta), as a product of what lies above and below and a factor."""
    eta = values["slope"][0] * columns["x"] + values["spread"] * e[..., 0]
    ends = torch.cat([torch.tensor([-40.0]), values["cut"], torch.tensor([40.0])])
    found = 0.0
    for item, at in enumerate(ITEMS.double()):
        kind, place = columns["rating"][..., item].long(), eta + values["slope"][1] * at
        low, high = ends[kind], ends[kind + 1]
        found = found + logsigmoid(high - place) + logsigmoid(place - low) + (-torch.expm1(low - high)).log()
    return found


# negative binomial, lists of counts


def overdispersed(x: Tensor, count: Ragged) -> None:
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    size = pyro.sample("size", dist.LogNormal(0.0, 1.0))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, spread))
        log_odds = count.spread(b[0] + b[1] * x + u) - size.log()
        entries = dist.NegativeBinomial(size, logits=log_odds)
        pyro.factor("count", count.total(entries.log_prob(count.values)))


def overdispersed_rows(rng: np.random.Generator, rows: int) -> Rows:
    """1 to 3 counts a row, in order; -1 where there is none."""
    x = halves(rng, rows)
    mean = np.exp(0.1 + 0.4 * x + 0.6 * rng.normal(size=rows))[:, None]
    drawn = rng.poisson(mean * rng.gamma(2.0, 0.5, size=(rows, 3)))
    count = np.where(np.arange(3) < rng.integers(1, 4, (rows, 1)), drawn, -1)
    return {"x": x, "count": -np.sort(-count, axis=1).astype(float)}


def as_lists(rows: Rows) -> dict[str, np.ndarray | RaggedRows]:
    there = rows["count"] >= 0
    offsets = np.concatenate([[0], there.sum(1).cumsum()])
    return {"x": rows["x"], "count": RaggedRows(offsets, rows["count"][there])}


def overdispersed_row(values: Values, e: Tensor, columns: Values) -> Tensor:
    size, there = values["size"], columns["count"] >= 0
    y = columns["count"].clamp(min=0)
    of_entries = torch.lgamma(y + size) - torch.lgamma(size) - torch.lgamma(y + 1)
    eta = values["b"][0] + values["b"][1] * columns["x"] + values["spread"] * e[..., 0] - size.log()
    number, total = there.sum(-1), (y * there).sum(-1)
    return (of_entries * there).sum(-1) + number * size * logsigmoid(-eta) + total * logsigmoid(eta)


# all


INDEPENDENT = np.diag([1.2, 0.6])
DEPENDENT = np.array([[1.2, 0.0], [-0.36, 0.48]])  # a correlation of -0.6
ORDERED = dist.TransformedDistribution(
    dist.Normal(torch.zeros(3, dtype=torch.float64), 3.0).to_event(1), dist.transforms.OrderedTransform()
)

PROBLEMS = (
    RowProblem(
        "Poisson-lognormal", counts, counts_rows, counts_row,
        {"b": Global(dist.Normal(0.0, 2.0), [0.2, 0.5]), "spread": Global(dist.HalfNormal(1.0), 0.9)},
    ),
    RowProblem(
        "logistic, intercept", intercept, answers(np.diag([1.2, 0.0])), intercept_row,
        {"b": Global(dist.Normal(0.0, 2.0), [-0.3, 0.8, 0.4]), "spread": Global(dist.HalfNormal(2.0), 1.2)},
    ),
    RowProblem(
        "logistic, slope", slopes, answers(INDEPENDENT), slopes_row,
        {
            "b": Global(dist.Normal(0.0, 2.0), [-0.3, 0.8, 0.4]),
            "spread": Global(dist.HalfNormal(2.0), 1.2),
            "tilt": Global(dist.HalfNormal(2.0), 0.6),
        },
        size=2,
    ),
    RowProblem(
        "logistic, correlated", correlated, answers(DEPENDENT), correlated_row,
        {
            "b": Global(dist.Normal(0.0, 2.0), [-0.3, 0.8, 0.4]),
            "spread": Global(dist.HalfNormal(2.0), [1.2, 0.6]),
            "root": Global(dist.LKJCholesky(2, torch.tensor(2.0, dtype=torch.float64)), [[1.0, 0.0], [-0.6, 0.8]]),
        },
        size=2,
    ),
    RowProblem(
        "ordinal", ordinal, ordinal_rows, ordinal_row,
        {
            "slope": Global(dist.Normal(0.0, 2.0), [0.9, -0.5]),
            "cut": Global(ORDERED, [-1.5, 0.2, 1.4]),
            "spread": Global(dist.HalfNormal(2.0), 1.1),
        },
    ),
    RowProblem(
        "negative binomial", overdispersed, overdispersed_rows, overdispersed_row,
        {
            "b": Global(dist.Normal(0.0, 2.0), [0.1, 0.4]),
            "size": Global(dist.LogNormal(0.0, 1.0), 2.0),
            "spread": Global(dist.HalfNormal(1.0), 0.6),
        },
        given=as_lists,
    ),
)  # fmt: skip
