"""Gradients against arithmetic: a table over everything that scales a term, Pyro's own values, and in the mean."""

import math
from functools import cache
from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from svi_problems import F64, build, grad, noise_of, one_group, with_objective

from trainer.inference.guides.mean_field import MeanField
from trainer.inference.guides.pyro_guides import PyroGuide
from trainer.inference.model.noise import element_noise
from trainer.inference.model.plates import Batch, PlatedModel
from trainer.inference.step import StepNoise

J, SIGMA, M0, S0 = 3, 0.7, 0.4, 1.5
LAYOUTS = ("alone", "inside, data at -1", "inside, data at -2", "beside")


def model_of(layout: str, scale: float):
    """z_j ~ Normal(M0, S0); y ~ Normal(z, SIGMA) under the user's own poutine.scale."""

    def observe(mean, y):
        with poutine.scale(scale=scale):
            pyro.sample("y", dist.Normal(mean, SIGMA), obs=y)

    def model(y):
        prior = dist.Normal(y.new_tensor(M0), S0)
        if layout == "alone":
            z = pyro.sample("z", prior)
            with pyro.plate("data", len(y)):
                observe(z, y)
        elif layout == "inside, data at -1":  # y [B, J], transposed to [J, B]
            j = pyro.plate("j", J, dim=-2)
            with j:
                z = pyro.sample("z", prior)
            with pyro.plate("data", len(y), dim=-1), j:
                observe(z, y.T)
        elif layout == "inside, data at -2":
            j = pyro.plate("j", J, dim=-1)
            with j:
                z = pyro.sample("z", prior)
            with pyro.plate("data", len(y), dim=-2), j:
                observe(z, y)
        else:
            with pyro.plate("j", J):
                z = pyro.sample("z", prior)
            with pyro.plate("data", len(y)):
                observe(z.sum(), y)

    return model


def likelihood_gradient(layout: str, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """d/dz [J or 1] of sum over rows of log Normal(y | z, SIGMA), by hand."""
    if layout == "beside":
        return ((y - z.sum()) / SIGMA**2).sum().expand(J)
    return ((y.view(len(y), len(z)) - z) / SIGMA**2).sum(0)


def by_hand(layout, kl, user_scale, num_obs, y, valid, eps, signs, theta):
    """The ELBO's gradient [2 D] of all groups, written out: y [A, B, ...], eps [A, R, D]."""
    loc, log_scale = theta.chunk(2)
    s = log_scale.exp()
    n_over_b = num_obs / int(valid.sum())
    d_loc, d_log_scale = torch.zeros_like(loc), torch.zeros_like(loc)
    draws = eps.shape[1] * len(signs)
    for a, r, sign in product(range(len(y)), range(eps.shape[1]), signs):
        e = sign * eps[a, r]
        z = loc + s * e
        data = user_scale * n_over_b * likelihood_gradient(layout, z, y[a, : valid[a]])
        if kl == "analytic":  # -KL = -((loc - M0)^2 + s^2) / 2 S0^2 + log s
            once_loc, once_log_scale = -(loc - M0) / S0**2, 1 - s**2 / S0**2
        else:
            prior = -(z - M0) / S0**2
            path = e / s if kl == "sticking_the_landing" else torch.zeros_like(e)  # -d log q / dz
            constant = 0.0 if kl == "sticking_the_landing" else 1.0  # log s, where q's parameters are not held fixed
            once_loc, once_log_scale = prior + path, (prior + path) * s * e + constant
        d_loc += (data + once_loc / len(y)) / draws
        d_log_scale += (data * s * e + once_log_scale / len(y)) / draws
    return torch.cat([d_loc, d_log_scale])


@cache
def inference_of(layout: str, kl: str, user_scale: float):
    y = torch.randn(6, *(() if layout in ("alone", "beside") else (J,)), dtype=F64)
    return build(model_of(layout, user_scale), kl=kl, y=y)[0]


@pytest.mark.parametrize("kl", ["analytic", "monte_carlo", "sticking_the_landing"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("valid", [(3, 3), (3, 1), (2, 0)], ids=["even", "uneven, padded", "one empty"])
def test_table(layout, kl, valid):
    """... x N x pairs x antithetic x the user's scale; in one call, and as two ranks' calls summed."""
    generator = torch.Generator().manual_seed(5)
    width = 1 if layout == "alone" else J
    y = torch.randn(2, 3, *(() if layout in ("alone", "beside") else (J,)), dtype=F64, generator=generator)
    theta = torch.randn(2 * width, dtype=F64, generator=generator) * 0.5
    counts = torch.tensor(valid)
    for num_obs, pairs, antithetic, user_scale in product((6.0, 1000.0), (1, 2), (False, True), (1.0, 2.5)):
        inference = with_objective(inference_of(layout, kl, user_scale), num_obs, pairs=pairs, antithetic=antithetic)
        eps = torch.randn(2, pairs, width, dtype=F64, generator=generator)
        expected = by_hand(layout, kl, user_scale, num_obs, y, counts, eps, (1, -1) if antithetic else (1,), theta)
        batch = Batch({"y": y}, counts, counts.sum(), None)
        together = grad(inference, theta, noise_of(eps), batch, share=1 / 2)
        ranks = sum(
            grad(
                inference,
                theta,
                noise_of(eps[a : a + 1]),
                Batch({"y": y[a : a + 1]}, counts[a : a + 1], counts.sum(), None),
                share=1 / 2,
            )
            for a in range(2)
        )
        tight = {"rtol": 1e-11, "atol": 1e-9}
        torch.testing.assert_close(together, expected, **tight)
        torch.testing.assert_close(ranks, expected, **tight)


# Pyro's tests/infer/test_gradient.py, test_subsample_gradient: z_i ~ Normal(0, 1), x_i ~ Normal(z_i, 1), q(z_i) =
# Normal(loc_i, scale), at loc = 0, scale = 1: d loss / d loc = -x, d loss / d scale = sum of (1 + 1 - 1) over two rows.
PYRO_DATA, PYRO_LOC, PYRO_SCALE = (-0.5, 2.0), (0.5, -2.0), 2.0


def pyros_inference(scale: float):
    def model(x, i):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, i):
        loc = pyro.param("loc", lambda: torch.zeros(2, dtype=F64))
        spread = pyro.param("scale", lambda: torch.ones(1, dtype=F64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc[i], spread))

    data = {"x": torch.tensor(PYRO_DATA, dtype=F64), "i": torch.arange(2)}
    scaled = poutine.scale(guide, scale=scale)
    wrapped = lambda _, batch: PyroGuide(PlatedModel(scaled, batch.columns))  # noqa: E731
    return build(poutine.scale(model, scale=scale), wrapped, **data), data


@pytest.mark.parametrize("scale", [1.0, 2.0], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("way", ["full", "subsample", "two ranks"])
def test_pyros_subsample_gradient(way, scale):
    """eps = +1 and -1 is Gauss-Hermite quadrature, exact for these quadratics: Pyro's values without its 0.06."""
    (inference, theta), data = pyros_inference(scale)
    inference = with_objective(inference, antithetic=True)

    def loss_gradient(rows, batch_rows, share):
        batch = one_group(**{name: column[rows] for name, column in data.items()})._replace(batch_rows=batch_rows)
        ones = torch.ones(1, 1, len(rows), 1, dtype=F64)
        return -grad(inference, theta, noise_of(torch.zeros(1, 1, 0, dtype=F64), ones), batch, share)

    if way == "full":
        total = loss_gradient([0, 1], torch.tensor(2), 1.0)
    else:  # one row at a time: the mean over the two batches; or both at once on two ranks: their sum
        batch_rows = torch.tensor(1 if way == "subsample" else 2)
        total = sum(loss_gradient([row], batch_rows, 0.5) for row in range(2)) / (2 if way == "subsample" else 1)
    named = inference.parameters.unflatten(total)
    assert named["loc"].tolist() == pytest.approx([scale * g for g in PYRO_LOC], abs=1e-12)
    assert named["scale"].tolist() == pytest.approx([scale * PYRO_SCALE], abs=1e-12)


@pytest.mark.parametrize(("antithetic", "pairs"), [(False, 1), (False, 4), (True, 1)])
def test_stochastic_gradients_are_unbiased_with_the_variance_of_theory(antithetic, pairs):
    """10^4 steps at fixed theta: replicates side by side in one evaluation, each with its own 2 of N = 10 rows and its
    own element of Philox's noise."""
    replicates, n, b = 10_000, 10, 2
    loc, s = 0.9, 0.5

    def model(y):
        side = pyro.plate("replicates", replicates, dim=-1)
        with side:
            z = pyro.sample("z", dist.Normal(y.new_tensor(M0), S0))
        with pyro.plate("data", len(y), dim=-2), side:
            pyro.sample("y", dist.Normal(z, SIGMA), obs=y)

    generator = torch.Generator().manual_seed(11)
    rows = torch.randn(n, dtype=F64, generator=generator) + 1
    chosen = torch.rand(n, replicates, dtype=F64, generator=generator).argsort(0)[:b]
    y = rows[chosen]
    inference = with_objective(build(model, y=y)[0], n, antithetic=antithetic, pairs=pairs)
    theta = torch.cat([torch.full((replicates,), loc, dtype=F64), torch.full((replicates,), math.log(s), dtype=F64)])
    eps = element_noise(3, torch.tensor(0), torch.arange(pairs), replicates, F64)[None]
    d_loc, d_log_scale = grad(inference, theta, noise_of(eps), one_group(y=y)).chunk(2)

    curvature = n / SIGMA**2 + 1 / S0**2
    full_loc = float((rows - loc).sum()) / SIGMA**2 - (loc - M0) / S0**2
    full_log_scale = 1 - s**2 * curvature
    of_rows = n**2 / SIGMA**4 * float(rows.var()) / b * (1 - b / n)
    of_noise = 0.0 if antithetic else curvature**2 * s**2 / pairs
    for values, mean in ((d_loc, full_loc), (d_log_scale, full_log_scale)):
        error = float(values.std()) / math.sqrt(replicates)
        assert abs(float(values.mean()) - mean) < 4 * error
    assert float(d_loc.var()) == pytest.approx(of_rows + of_noise, rel=4 * math.sqrt(2 / replicates))


def test_sticking_the_landing_has_no_variance_at_the_posterior():
    """Roeder et al.: at q = p the gradient vanishes draw by draw; the plain estimator's does not."""
    y = torch.randn(6, dtype=F64, generator=torch.Generator().manual_seed(2))
    variance = 1 / (6 / SIGMA**2 + 1 / S0**2)
    mean = variance * (y.sum() / SIGMA**2 + M0 / S0**2)
    theta = torch.stack([mean, torch.tensor(variance, dtype=F64).sqrt().log()])
    eps = torch.full((1, 1, 1), 1.7, dtype=F64)
    sizes = {
        kl: float(grad(inference_of("alone", kl, 1.0), theta, noise_of(eps), one_group(y=y)).norm())
        for kl in ("sticking_the_landing", "monte_carlo")
    }
    assert sizes["sticking_the_landing"] < 1e-10
    assert sizes["monte_carlo"] > 1


@pytest.mark.parametrize("guide", ["mean_field", "amortized"])
def test_padded_rows_have_no_gradient_and_make_no_nan(guide):
    """Padding repeats a real row; whatever it repeats, nothing changes, and its own gradient is exactly zero."""

    def model(x, y=None):
        a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(a, 1.0)) if guide == "amortized" else a
            pyro.sample("y", dist.LogNormal(z * x, 1.0), obs=y)

    def amortized(x, y=None):
        pyro.sample("a", dist.Normal(pyro.param("a_loc", torch.zeros((), dtype=F64)), 0.3))
        slope = pyro.param("slope", torch.tensor(0.2, dtype=F64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * y, 0.3))

    make = MeanField if guide == "mean_field" else lambda _, batch: PyroGuide(PlatedModel(amortized, batch.columns))
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(4, dtype=F64, generator=generator), torch.rand(4, dtype=F64, generator=generator) + 0.1
    inference, theta = build(model, make, num_obs=100, x=x, y=y)
    eps = torch.full((1, 1, 1), 0.6, dtype=F64)

    def at(repeated):
        index = torch.tensor([0, 1, 2, 3, *repeated])
        column = x[index].requires_grad_()
        rows = torch.linspace(-1, 1, len(index), dtype=F64).view(1, 1, -1, 1)
        batch = Batch({"x": column[None], "y": y[index][None]}, torch.tensor([4]), torch.tensor(4), None)
        noise = StepNoise(eps, torch.cat([rows[:, :, :4] * 0 + 0.4, rows[:, :, 4:]], 2), ((0,),))
        leaf = theta.clone().requires_grad_()
        return torch.autograd.grad(inference.terms(leaf, noise, batch, 1.0).sum(), (leaf, column))

    bare, of_rows = at([])
    for repeated in ([0], [3, 3, 1]):
        padded, of_padded = at(repeated)
        torch.testing.assert_close(padded, bare, rtol=1e-14, atol=1e-13)
        torch.testing.assert_close(of_padded[:4], of_rows, rtol=1e-14, atol=1e-13)
        assert of_padded[4:].tolist() == [0.0] * len(repeated)
