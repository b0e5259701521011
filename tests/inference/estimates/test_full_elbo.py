"""The final ELBO against answers in closed form, and on several ranks against one."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from posterior_problems import F64, alone, at, blocks_of, build, elbo, on_ranks
from torch import Tensor

from trainer.inference.estimates import full_elbo as elbo_module
from trainer.inference.estimates.full_elbo import full_elbo, held_out_elbo_per_row, rough_elbo_per_row
from trainer.inference.estimates.many_draws import Antithetic, terms_together
from trainer.inference.estimates.passes import Pass
from trainer.inference.guides.pyro_guides import PyroGuide
from trainer.inference.model.plates import PlatedModel
from trainer.models.linear import LinearRegression, Statistics, exact_posterior

SIZES = (7, 1, 12, 4)  # rows of the blocks


@pytest.fixture
def table() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(sum(SIZES), 2, dtype=F64, generator=generator)
    noise = torch.randn(sum(SIZES), dtype=F64, generator=generator)
    return {"x": x, "y": x @ torch.tensor([1.0, -2.0], dtype=F64) + noise}


@pytest.fixture
def few_pairs(monkeypatch):
    monkeypatch.setattr(elbo_module, "_PAIRS", 20)
    monkeypatch.setattr(elbo_module, "_KL_DRAWS", 150)


def tilted(x, y=None):
    """A log likelihood that is linear in w, so that every antithetic pair gives its expectation exactly."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.factor("tilt", x @ w)
        pyro.sample("y", dist.Normal(x[:, 0], 1.0), obs=y)


def tilted_exact(table: dict[str, Tensor], loc: Tensor, scale: Tensor) -> tuple[float, float]:
    """(expected log likelihood, KL) of `tilted`."""
    y = dist.Normal(table["x"][:, 0], 1.0).log_prob(table["y"]).sum()
    kl = (3.0 / scale).log() + (scale**2 + loc**2) / 18.0 - 0.5
    return float((table["x"] @ loc).sum() + y), float(kl.sum())


def noisy(x, y=None):
    """Nothing here is exact: a Gamma prior, a scale that depends on it, and a latent of every row."""
    tau = pyro.sample("tau", dist.Gamma(x.new_tensor(2.0), 1.0))
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), tau).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("y", dist.Normal(x @ w + z, 1.0), obs=y)


def noisy_guide(x, y=None):
    options = {"dtype": F64}
    loc = pyro.param("loc", torch.tensor([0.2, 0.5, -0.5], **options))
    tau = pyro.sample("tau", dist.LogNormal(loc[0], 0.3))
    pyro.sample("w", dist.Normal(loc[1:], 0.2 * tau).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.3, **options)) * y, 0.8))


@pytest.mark.parametrize("kl", ["analytic", "monte_carlo", "sticking_the_landing"])
def test_a_closed_form_is_met_without_monte_carlo_error(table, few_pairs, kl):
    """Whichever KL the guide was trained with."""
    inference, _ = build(tilted, table, kl=kl)
    loc, scale = torch.tensor([0.3, -1.0], dtype=F64), torch.tensor([0.5, 2.0], dtype=F64)
    likelihood, divergence = tilted_exact(table, loc, scale)
    found = elbo(inference, at(loc, scale), blocks_of(table, SIZES))
    assert math.isclose(found.expected_log_likelihood, likelihood, rel_tol=1e-12)
    assert math.isclose(found.kl, divergence, rel_tol=1e-12)
    assert math.isclose(found.elbo, likelihood - divergence, rel_tol=1e-12)
    assert found.elbo_se < 1e-12
    assert found.rows == 24
    assert math.isclose(found.elbo_per_row, found.elbo / 24)


def test_a_rough_elbo_is_exact_where_pairs_are_also_over_some_of_the_rows_and_on_ranks(table):
    """Of the rows that are looked at, each with its share of the KL that all training rows pay."""
    inference, _ = build(tilted, table)
    loc, scale = torch.tensor([0.3, -1.0], dtype=F64), torch.tensor([0.5, 2.0], dtype=F64)
    blocks = blocks_of(table, SIZES)
    some = {name: column[: SIZES[0] + SIZES[1]] for name, column in table.items()}
    likelihood, divergence = tilted_exact(some, loc, scale)
    exact = likelihood / len(some["y"]) - divergence / len(table["y"])
    found = rough_elbo_per_row(inference, at(loc, scale), Pass(blocks[:2], 2, 0, alone))
    assert math.isclose(found, exact, rel_tol=1e-12)

    def of_rank(rank, reduce):
        return rough_elbo_per_row(inference, at(loc, scale), Pass(blocks[:2][rank::3], 2, 0, reduce))

    assert all(math.isclose(each, exact, rel_tol=1e-12) for each in on_ranks(3, of_rank))


def test_linear_regression_at_its_mean_field_optimum(table):
    model = LinearRegression(noise_sd=1.0, weight_sd=2.0, intercept_sd=3.0)
    statistics = Statistics.empty(2)
    statistics.add(table["x"], table["y"])
    exact = exact_posterior(statistics, model)
    inference, _ = build(model, table)
    order = [1, 2, 0]  # the model's order: weight, intercept
    found = elbo(inference, at(exact.mean[order], exact.mean_field_sd[order]), blocks_of(table, SIZES))
    assert 0 < found.elbo_se < 0.1
    assert abs(found.elbo - exact.mean_field_elbo) < 4 * found.elbo_se
    assert found.elbo < exact.log_evidence


def test_the_standard_error_is_that_of_repeated_estimates(table, few_pairs):
    """A log likelihood that is a chi-square of 50 degrees in the noise: near normal at few draws already."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(x.new_zeros(50), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.factor("norm", -(w @ w) * x[:, 0] ** 2)
            pyro.sample("y", dist.Normal(x[:, 0], 1.0), obs=y)

    inference, theta = build(model, table)  # loc 0, scale 0.1
    found = [elbo(inference, theta, blocks_of(table, SIZES), seed) for seed in range(30)]
    constant = float(dist.Normal(table["x"][:, 0], 1.0).log_prob(table["y"]).sum())
    exact = constant - 50 * 0.1**2 * float((table["x"][:, 0] ** 2).sum())
    scores = torch.tensor([(f.expected_log_likelihood - exact) / f.elbo_se for f in found])
    assert abs(float(scores.mean())) < 3.5 / math.sqrt(30)
    assert 0.7 < float(scores.std()) < 1.35


def half_normal(x, y=None):
    s = pyro.sample("s", dist.HalfNormal(x.new_tensor(2.0)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x[:, 0], s), obs=y)


@pytest.fixture
def pairs_drawn(monkeypatch) -> list[int]:
    """The block number of every pair that is evaluated."""
    drawn: list[int] = []
    pairs = Antithetic.pairs

    def counted(together, batch, number, first, stop):
        drawn.extend([number] * (stop - first))
        return pairs(together, batch, number, first, stop)

    monkeypatch.setattr(Antithetic, "pairs", counted)
    return drawn


@pytest.mark.parametrize(
    ("scale", "likelihood_se", "pairs"), [(0.01, 0.0, 64), (0.5, 0.0, 800), (0.5, 10.0, 64)], ids=str
)
def test_a_kl_without_a_closed_form_comes_from_draws(table, pairs_drawn, monkeypatch, scale, likelihood_se, pairs):
    """q = LogNormal(m, s) against HalfNormal(2), E z^2 = exp(2 m + 2 s^2): few draws where that is sharp enough."""
    monkeypatch.setattr(elbo_module, "_KL_DRAWS", 1600)
    inference, _ = build(half_normal, table)
    m = 0.4
    log_prior = 0.5 * math.log(2 / math.pi) - math.log(2.0) - math.exp(2 * m + 2 * scale**2) / 8.0 + m
    exact = -math.log(scale) - 0.5 * (1 + math.log(2 * math.pi)) - log_prior
    block = blocks_of(table, SIZES)[0]
    kl, se = elbo_module._global_kl(
        Antithetic(terms_together(inference, "analytic"), at([m], [scale]), 0), block, likelihood_se
    )
    assert 0 < abs(kl - exact) < 4 * se
    assert len(pairs_drawn) == pairs


def test_an_exact_kl_takes_four_pairs(table, few_pairs, pairs_drawn):
    inference, theta = build(tilted, table, kl="sticking_the_landing")
    elbo(inference, theta, blocks_of(table, SIZES))
    assert len(pairs_drawn) == 20 + 4


def test_a_kl_that_is_not_finite_is_not_sampled_for_long(table, few_pairs, pairs_drawn):
    inference, _ = build(half_normal, table)
    assert not math.isfinite(elbo(inference, at([float("nan")], [1.0]), blocks_of(table, SIZES)).elbo)
    assert len(pairs_drawn) < 100


def test_what_is_observed_outside_the_data_plate_counts_once(table, few_pairs):
    def model(x, y=None):
        tilted(x, y)
        pyro.sample("total", dist.Normal(x.new_tensor(0.0), 2.0), obs=x.new_tensor(3.0))

    theta = at([0.3, -1.0], [0.5, 2.0])
    with_total = elbo(build(model, table, global_sites=["total"])[0], theta, blocks_of(table, SIZES))
    without = elbo(build(tilted, table)[0], theta, blocks_of(table, SIZES))
    once = float(dist.Normal(0.0, 2.0).log_prob(torch.tensor(3.0)))
    assert math.isclose(with_total.elbo - without.elbo, once, rel_tol=1e-6)
    assert with_total.expected_log_likelihood == without.expected_log_likelihood


def test_the_models_own_parameters_are_those_of_theta(table, few_pairs):
    def model(x, y=None):
        shift = pyro.param("shift", x.new_tensor(1.0))
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), 3.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.factor("tilt", x @ w + shift)
            pyro.sample("y", dist.Normal(x[:, 0], 1.0), obs=y)

    inference, theta = build(model, table)
    values = inference.parameters.unflatten(theta)
    theta = inference.parameters.flatten({**values, "shift": torch.tensor(5.0, dtype=F64)})
    likelihood, _ = tilted_exact(table, torch.zeros(2, dtype=F64), torch.full((2,), 0.1, dtype=F64))
    found = elbo(inference, theta, blocks_of(table, SIZES))
    assert math.isclose(found.expected_log_likelihood, likelihood + 24 * 5.0, rel_tol=1e-12)


def of_rows(table):
    """`noisy` with its guide."""
    return build(noisy, table, lambda _, batch: PyroGuide(PlatedModel(noisy_guide, batch.columns)), kl="monte_carlo")


PROBLEMS = {"latents of rows, a KL from draws": of_rows, "mean field": lambda table: build(half_normal, table)}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_agree_with_one_rank(table, few_pairs, name, world_size):
    """Also with a rank that has no block."""
    inference, theta = PROBLEMS[name](table)
    blocks = blocks_of(table, SIZES)
    alone_ = elbo(inference, theta, blocks, seed=2)

    def on(rank, reduce):
        return full_elbo(inference, theta, Pass(iter(blocks[rank::world_size]), len(blocks), 2, reduce))

    for found in on_ranks(world_size, on):
        assert found.rows == alone_.rows == 24
        for field in ("elbo", "elbo_se", "expected_log_likelihood", "kl", "elbo_per_row"):
            assert math.isclose(getattr(found, field), getattr(alone_, field), rel_tol=1e-12, abs_tol=1e-12), field


def test_seeds_differ_and_repeat(table, few_pairs):
    inference, theta = of_rows(table)
    one, again, other = (elbo(inference, theta, blocks_of(table, SIZES), seed) for seed in (1, 1, 2))
    assert one == again
    assert one.expected_log_likelihood != other.expected_log_likelihood
    assert one.kl != other.kl


def test_blocks_do_not_share_their_noise(table, few_pairs):
    """The same rows twice: their errors must be independent for the standard error to hold."""
    inference, theta = build(half_normal, table)
    first = blocks_of(table, SIZES)[0]
    together = Antithetic(terms_together(inference, "analytic"), theta, 0)
    one, two = (elbo_module._block_likelihood(together, first._replace(number=n), 4, 0.0) for n in (0, 1))
    assert one != two


@pytest.mark.parametrize(("enough", "expected"), [(1e9, 32), (0.0, 200), (None, 64)])
def test_a_block_is_drawn_until_its_error_is_small_enough(table, pairs_drawn, enough, expected):
    """None: what 64 pairs come to, and 32 do not."""
    inference, theta = build(half_normal, table)
    block = blocks_of(table, SIZES)[0]

    def error(most, enough):
        return elbo_module._block_likelihood(
            Antithetic(terms_together(inference, "analytic"), theta, 0), block, most, enough
        )[1]

    if enough is None:
        enough = error(64, 0.0)
        assert error(32, 0.0) > enough
        pairs_drawn.clear()
    assert error(200, enough) <= max(enough, error(200, 0.0))
    assert len(pairs_drawn) == expected + 200


def test_held_out_rows_pay_the_training_rows_share_of_the_kl(table, few_pairs):
    inference, _ = build(tilted, table)
    loc, scale = torch.tensor([0.3, -1.0], dtype=F64), torch.tensor([0.5, 2.0], dtype=F64)
    theta = at(loc, scale)
    fitted = elbo(inference, theta, blocks_of(table, SIZES))
    held_out = {name: column[:5] + 1.0 for name, column in table.items()}
    blocks = blocks_of(held_out, (3, 2))
    expected = tilted_exact(held_out, loc, scale)[0] / 5 - tilted_exact(table, loc, scale)[1] / 24
    found = held_out_elbo_per_row(inference, theta, Pass(blocks, 2, 0, alone), fitted)
    assert math.isclose(found, expected, rel_tol=1e-12)

    def of_rank(rank, reduce):
        return held_out_elbo_per_row(inference, theta, Pass(blocks[rank::3], 2, 0, reduce), fitted)

    ranks = on_ranks(3, of_rank)
    assert all(math.isclose(each, found, rel_tol=1e-12) for each in ranks)
