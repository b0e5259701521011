"""Draws that a model makes for itself: part of the given noise, by row where they belong to rows."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from svi_problems import F64, batch_of, build, chunk_of, noise_of, one_group, regression_data
from torch import nn

from trainer.errors import UserError
from trainer.inference.model.noise_mode import NoiseMode, measure_noise
from trainer.inference.optim.optimizers import Adam
from trainer.inference.optim.rounds import one_round
from trainer.inference.optim.schedules import Cosine
from trainer.inference.programs.fused import Fused
from trainer.inference.programs.program import Eager
from trainer.inference.programs.tracing import trace

DATA = regression_data()


def measured(run):
    return measure_noise(run, batch_of(**DATA))


def test_the_axis_over_the_rows_is_found_by_what_grows():
    def run(batch):
        x = batch.columns["x"]
        torch.randn(3)  # as many as x has columns
        torch.randn_like(x)
        torch.rand(2, len(x), 4)
        torch.bernoulli(torch.full((12,), 0.5))  # as many as there are rows, but always 12

    layout = measured(run)
    assert layout == ((None, -2, -2, None), 15, 11, False)


def test_what_normals_cannot_make_is_noticed():
    assert measured(lambda batch: torch._standard_gamma(batch.columns["y"].abs())).others
    assert measured(lambda batch: batch.columns["y"].sum()).empty


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda batch: torch.randn(batch.size, batch.size), "one axis over the rows, or none"),
        (lambda batch: torch.randn(2 * batch.size), "one axis over the rows, or none"),
        (lambda batch: [torch.randn(()) for _ in range(batch.size)], "draw the same ones"),
    ],
)
def test_draws_that_fit_no_row_are_refused(run, message):
    with pytest.raises(UserError, match=message):
        measured(run)


def test_uniforms_and_coins_have_their_distribution():
    """From n standard normals: mean and variance within five standard errors."""
    x = torch.zeros(20_000, 3, dtype=F64)

    def draw():
        return [
            torch.rand_like(x),
            torch.empty_like(x).uniform_(2.0, 6.0),
            torch.empty_like(x).bernoulli_(0.3),
            torch.bernoulli(torch.full_like(x, 0.7)),
            nn.functional.dropout(torch.ones_like(x), 0.25),
            torch.native_dropout(torch.ones_like(x), 0.25, True)[0],
            2.0 + 3.0 * torch.randn(20_000, 3, dtype=F64),
        ]

    layout = measure_noise(lambda batch: draw(), batch_of(x=torch.zeros(5, 1)))
    normals = torch.randn(layout.elements, dtype=F64, generator=torch.Generator().manual_seed(0))
    with NoiseMode(layout, normals, None, 0):
        found = draw()
    wanted = [(0.5, 1 / 12), (4.0, 4 / 3), (0.3, 0.21), (0.7, 0.21), (1.0, 1 / 3), (1.0, 1 / 3), (2.0, 9.0)]
    for values, (mean, variance) in zip(found, wanted):
        count, spread = values.numel(), values.var()
        assert abs(values.mean() - mean) < 5 * (variance / count) ** 0.5
        fourth = ((values - mean) ** 4).mean()
        assert abs(spread - variance) < 5 * ((fourth - variance**2).clamp(min=1e-6) / count) ** 0.5


def noisy(x, y):
    """Noise in the covariates by row, and one number for all."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
    shift = 0.3 * torch.randn((), dtype=x.dtype)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x + 0.5 * torch.randn_like(x)) @ w + shift, 0.5), obs=y)


def explicit(x, y, e, shift):
    """`noisy` with its noise given as columns."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x + 0.5 * e) @ w + 0.3 * shift, 0.5), obs=y)


def test_a_models_own_draws_are_the_given_noise():
    """Terms equal those of the model that takes the same noise as columns."""
    inference, theta = build(noisy, **DATA)
    assert inference.guide.noise_size == (4, 3)
    generator = torch.Generator().manual_seed(3)
    elements = torch.randn(1, 1, 4, dtype=F64, generator=generator)
    rows = torch.randn(1, 1, 12, 3, dtype=F64, generator=generator)
    ours = inference.terms(theta, noise_of(elements, rows), one_group(**DATA), 1.0)
    given = {**DATA, "e": rows[0, 0], "shift": elements[0, 0, 3].expand(12)}
    other, _ = build(explicit, **given)
    assert torch.equal(ours, other.terms(theta, noise_of(elements[..., :3]), one_group(**given), 1.0))


def test_noise_by_row_does_not_depend_on_how_rows_are_shared():
    """One group of rows, or two halves of the same rows with the draw of both: the same data terms."""
    inference, theta = build(noisy, **DATA)
    program = Eager(inference, one_round(Adam(lr=0.1), Cosine(), 10, 10), 7, [0])
    whole = one_group(**DATA)
    total = inference.terms(theta, program.noise(3, whole, F64), whole, 1.0)
    parts = 0
    for half in (slice(0, 5), slice(5, 12)):
        columns = {name: column[:, half] for name, column in whole.columns.items()}
        rows = columns["y"].shape[1]
        part = whole._replace(columns=columns, valid=torch.tensor([rows]), row_id=whole.row_id[:, half])
        parts = parts + inference.terms(theta, program.noise(3, part, F64), part, 0.5)
    torch.testing.assert_close(parts, total, rtol=1e-13, atol=0)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.25)

    def forward(self, x, y):
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.drop(x) @ w, 0.5), obs=y)


@pytest.mark.parametrize("model", [noisy, Dropping()], ids=["randn", "dropout"])
def test_a_traced_step_holds_the_models_draws(model):
    inference, theta = build(model, **DATA)
    update = one_round(Adam(lr=0.1), Cosine(), 10, 10)
    chunk, state = chunk_of(3, 1, 12, x=(3,), y=()), update.init(theta)
    flat, slots = Fused(inference, update, 5, [0]).flat(state, chunk)
    graph, constants = trace(flat, slots[0], slots[1])
    one = Eager(inference, update, 5, [0]).run(state, chunk, 1)
    *_, terms, norm = graph(*slots[0], *constants)
    torch.testing.assert_close(terms, one.terms[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(norm, one.grad_norm[0], rtol=1e-12, atol=0)


def test_draws_that_python_decides_are_refused():
    calls = itertools.count()

    def model(x, y):
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
        extra = [torch.randn(()) for _ in range(next(calls) % 2 + 1)]
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w + sum(extra), 0.5), obs=y)

    with pytest.raises(UserError, match="draw the same ones"):
        build(model, **DATA)
