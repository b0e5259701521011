"""Runs of symmetric models end in one of their optima, by their exact ELBO, and never converge at a saddle."""

import json
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from app_tools import final_state, svi, tensors

from trainer import fit
from trainer.engine import checkpoint
from trainer.training import budget

RNG = np.random.default_rng(0)
N = 100
X = RNG.normal(size=N)
Y = 1.5 * X + RNG.normal(size=N)
PRODUCTS = "model._target_=app_models.products"


def product(x, y=None):
    a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(a * b * x, 1.0), obs=y)


def square(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w**2 * x, 1.0), obs=y)


def quadratic(first, second):
    """E log p(y | f x) for f of these first two moments."""
    return -0.5 * ((Y**2).sum() - 2 * first * (X * Y).sum() + second * (X**2).sum() + N * math.log(2 * math.pi))


def kl(loc, log_sd):
    return 0.5 * (loc**2 + (2 * log_sd).exp() - 1) - log_sd


def best_elbo(of, size):
    """The highest ELBO of Gaussians [size], which has a closed form, by L-BFGS from 1."""
    at = torch.cat([torch.ones(size), torch.full((size,), -2.0)]).double().requires_grad_()
    optimizer = torch.optim.LBFGS([at], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        value = -of(*at.split(size))
        value.backward()
        return value

    optimizer.step(closure)
    return -float(closure().detach())


def of_product(loc, log_sd):
    second = (loc**2 + (2 * log_sd).exp()).prod()
    return quadratic(loc.prod(), second) - kl(loc, log_sd).sum()


def of_square(loc, log_sd):
    sd2 = (2 * log_sd).exp()
    return (quadratic(loc**2 + sd2, loc**4 + 6 * loc**2 * sd2 + 3 * sd2**2) - kl(loc, log_sd)).sum()


def evidence(of, size):
    """log p(y) by a lattice of 0.02 over [-4, 4]^size."""
    grid = np.meshgrid(*[np.arange(-4, 4, 0.02)] * size)
    f, prior = of(*grid), sum(-0.5 * g**2 for g in grid) - 0.5 * size * math.log(2 * math.pi)
    return float(np.logaddexp.reduce((quadratic(f, f**2) + prior).ravel())) + size * math.log(0.02)


@pytest.mark.parametrize(
    ("model", "closed", "f", "size"),
    [(product, of_product, np.multiply, 2), (square, of_square, np.square, 1)],
    ids=["product", "square"],
)
def test_the_elbo_is_that_of_the_best_gaussian_at_one_of_the_modes(model, closed, f, size, capsys):
    """Two modes are alike, so it lies log 2 and what mean field costs below the evidence."""
    found = fit(model, {"x": X, "y": Y}, options={"program": "eager"}).metrics
    assert found["stop_reason"] == "converged"
    want = best_elbo(closed, size)
    assert found["elbo"] == pytest.approx(want, abs=0.01 + 4 * found["elbo_se"])
    short = evidence(f, size) - math.log(2) - want
    assert 0 < short < (0.01 if size == 1 else 2.5)
    assert "the start is a saddle" in capsys.readouterr().out


def test_a_run_does_not_converge_at_a_saddle(capsys):
    """From 0, with too few steps to leave it: the Newton step is short, and the curvature negative."""
    found = fit(product, {"x": X, "y": Y}, max_steps=40, options={"start": "zero", "program": "eager"})
    assert found.metrics["stop_reason"] == "budget"
    said = " ".join(capsys.readouterr().out.split())
    assert "not converged, since the ELBO rises to both sides of a saddle" in said
    assert "converged at step" not in said


@pytest.mark.parametrize("start", ["laplace", "zero"])
def test_a_point_leaves_a_saddle(start, monkeypatch, capsys):
    """At its start, or where its run has come to it: a = b = t at the mode, with X'X t^2 = X'Y - 1."""
    monkeypatch.setattr(budget, "_ROUND_STEPS", 40)
    options = {"start": start, "program": "eager", "rounds": 3}
    found = fit(product, {"x": X, "y": Y}, "point", max_steps=800, options=options)
    a, b = (float(site.mean) for site in found.summary())
    want = (X @ Y - 1) / (X @ X)
    assert found.metrics["stop_reason"] == "converged"
    assert (abs(a), a * b) == pytest.approx((want**0.5, want), rel=1e-4)
    assert "saddle" in capsys.readouterr().out


def test_a_run_leaves_a_saddle_that_it_has_come_to(monkeypatch, capsys):
    monkeypatch.setattr(budget, "_ROUND_STEPS", 40)
    given = {"start": "zero", "program": "eager", "rounds": 3}
    found = fit(product, {"x": X, "y": Y}, max_steps=800, options=given).metrics
    assert "not converged, since the ELBO rises to both sides" in " ".join(capsys.readouterr().out.split())
    assert found["elbo"] == pytest.approx(best_elbo(of_product, 2), abs=0.3)


def test_a_start_off_a_saddle_is_the_checkpoint_s(fit, tmp_path):
    """Cut and continued it is the same run, to the bit; another seed is another run."""
    whole = fit(PRODUCTS, "checkpoint.every_n_steps=20", run_dir=tmp_path / "whole")
    fit(PRODUCTS, "max_steps=60", "checkpoint.every_n_steps=20", run_dir=tmp_path / "cut")
    for path in sorted((tmp_path / "cut" / "checkpoints").glob("*"))[2:]:
        path.unlink()
    again = fit(PRODUCTS, "ckpt_path=last", "checkpoint.every_n_steps=20", run_dir=tmp_path / "cut")
    assert int(checkpoint.load(checkpoint.newest(again / "checkpoints"))[0].step) == 60
    assert all(map(torch.equal, tensors(final_state(whole)[0]), tensors(final_state(again)[0])))
    other = fit(PRODUCTS, "seed=1", run_dir=tmp_path / "other")
    assert not torch.equal(final_state(whole)[0].theta.sign(), final_state(other)[0].theta.sign())


@pytest.mark.slow
def test_two_ranks_leave_a_saddle_as_one_does(shards, tmp_path):
    """By the same draws; where the run has come to it on its way, too."""
    common = ("train", PRODUCTS, f"data.path={shards}", "batch_size=256", "max_steps=70", "threads=1", "draws=2",
              "data.lanes=2", "program=eager", "rounds=1")  # fmt: skip
    for start in ("laplace", "zero"):
        found = []
        for launch in ("cpu", "ddp_sim"):
            run = svi(*common, f"start={start}", f"trainer={launch}", f"run_dir={tmp_path}/{start}-{launch}")
            assert run.returncode == 0, run.stderr
            assert "saddle" in " ".join(run.stdout.split())
            found.append(final_state(tmp_path / f"{start}-{launch}")[0].theta)
        torch.testing.assert_close(*found, rtol=0, atol=1e-6)
        elbos = [json.loads((tmp_path / f"{start}-{each}" / "metrics.json").read_text())["elbo"]
                 for each in ("cpu", "ddp_sim")]  # fmt: skip
        assert elbos[0] == pytest.approx(elbos[1], abs=1e-3)
