"""The compiled step: equal to the eager one on the same noise, on one rank and two, wherever its chunks end."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from svi_problems import build, chunk_of, regression

from trainer.errors import UserError
from trainer.inference.optim.optimizers import Adam
from trainer.inference.optim.rounds import one_round
from trainer.inference.optim.schedules import Constant
from trainer.inference.programs.fused import Fused
from trainer.inference.step import in_dtype

pytestmark = [pytest.mark.xdist_group("fused"), pytest.mark.timeout(1800)]  # one worker compiles, the other goes on
HERE = Path(__file__).parents[1]
MODELS = ["linear", "logistic", "poisson", "hierarchical", "full rank", "low rank", "arrow", "amortized"]


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def results(request, tmp_path_factory):
    return on_ranks(request.param, MODELS, tmp_path_factory.mktemp("fused"))


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def words(request, tmp_path_factory):
    """Of a model on csr and ragged columns, and of the same one on dense columns."""
    return on_ranks(request.param, ["words", "dense words"], tmp_path_factory.mktemp("words"))


def on_ranks(ranks, models, folder):
    """[{"model/program/key": array}] by rank."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / "fused_ranks.py"), str(folder / "out"), str(folder / "store"),
               str(ranks), *models]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1790)
    assert done.returncode == 0, done.stderr[-3000:]
    return [dict(np.load(folder / f"out.{rank}.npz")) for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_two_hundred_steps_are_the_eager_ones(results, model):
    for key in ("theta", "average", "terms", "norm"):
        eager, fused = (results[0][f"{model}/{program}/{key}"] for program in ("eager", "fused"))
        assert np.isfinite(eager).all()
        assert np.linalg.norm(fused - eager) <= 1e-5 * np.linalg.norm(eager), key
    assert np.linalg.norm(results[0][f"{model}/eager/theta"][:3]) > 0.1  # it went somewhere


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_run_cut_anywhere_is_bit_equal(results, model):
    """77 steps of a chunk of 82, then the rest."""
    for key in ("theta", "average", "square", "terms"):
        assert np.array_equal(results[0][f"{model}/fused/{key}"], results[0][f"{model}/fused/{key} cut"]), key


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_ranks_hold_the_same_bits(results, model):
    for other in results[1:]:
        for key in ("theta", "average", "terms"):
            assert np.array_equal(other[f"{model}/fused/{key}"], results[0][f"{model}/fused/{key}"]), key


@pytest.mark.slow
def test_sparse_and_ragged_columns_train_as_their_dense_ones(words):
    """200 steps in float64: to rounding in both programs; a run cut anywhere and other ranks have the same bits."""
    for key in ("theta", "average", "terms", "norm"):
        dense, eager, fused = (
            words[0][f"{name}/{key}"] for name in ("dense words/eager", "words/eager", "words/fused")
        )
        assert np.linalg.norm(dense) > 0.1, key
        for ours in (eager, fused):
            assert np.linalg.norm(ours - dense) <= 1e-12 * np.linalg.norm(dense), key
    for key in ("theta", "average", "square", "terms"):
        assert np.array_equal(words[0][f"words/fused/{key}"], words[0][f"words/fused/{key} cut"]), key
        assert all(np.array_equal(other[f"words/fused/{key}"], words[0][f"words/fused/{key}"]) for other in words), key


@pytest.fixture
def program(compiled_folder, monkeypatch):
    """`program(seed, update)`: the small one of fused_process.py, whose compiled step is shared."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(compiled_folder))
    chunk = chunk_of(6, 1, 8, torch.float32, x=(2,), y=())
    columns = {name: column[0, 0] for name, column in chunk.columns.items()}

    def make(seed=0, update=None, num_obs=1000):
        inference, theta = build(regression, num_obs=num_obs, **columns)
        update = update or one_round(Adam(lr=0.01), Constant(), 10, 5)
        return Fused(inference, update, seed, [0]), update.init(theta), chunk

    return make


@pytest.mark.slow
def test_one_compiled_step_serves_seeds_rates_horizons_and_sizes(program):
    """What a sweep changes is an input: nothing is compiled again, and the numbers are those of the eager program."""
    first, start, chunk = program()
    said: list[str] = []
    first.prepare(start, chunk, said.append)
    other, start, chunk = program(seed=5, update=one_round(Adam(lr=0.3), Constant(), 7, 2), num_obs=77)
    other.prepare(start, chunk, said.append)
    assert said[-1] == "compiled step found in the cache"
    want, got = other.reference.run(start, chunk, 6), other.run(start, chunk, 6)
    assert torch.allclose(got.state.theta, want.state.theta, rtol=1e-5, atol=1e-6)
    assert torch.allclose(got.state.average, want.state.average, rtol=1e-5, atol=1e-6)
    assert int(got.state.averaged) == 4
    assert not torch.allclose(first.run(start, chunk, 6).state.theta, want.state.theta, rtol=1e-3)
    wrong, start, chunk = program()
    wrong.prepare(start, chunk)
    drawn = wrong._noise(start, chunk.part(0, 1))
    wrong.seed, wrong._noise = 1, lambda state, chunk: drawn  # the eager program's noise is now another
    with pytest.raises(UserError, match="differs from the eager one by 0"):
        wrong._compare(start, chunk.part(0, 1))
    again, start, _ = program()
    again.prepare(start, chunk.part(0, 1), said.append)  # a chunk of one slot will do
    assert said[1:] == ["compiled step found in the cache"] * 2
    assert torch.equal(again.run(start, chunk, 1).terms, again.run(start, chunk, 6).terms[:1])


def numbers_of_its_own(x, y):
    """Constants and quotients of whole numbers, to which no column gives a type."""
    thirds = (torch.arange(2) + 1) / 3
    w = pyro.sample("w", dist.HalfCauchy(torch.ones(2)).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ (w * thirds) + torch.full((1,), 0.1), 1.0), obs=y)


@pytest.mark.slow
def test_numbers_that_a_model_makes_have_the_type_of_the_others(compiled_folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(compiled_folder))
    with in_dtype(torch.float64):
        chunk = chunk_of(6, 1, 8, torch.float64, x=(2,), y=())
        columns = {name: column[0, 0] for name, column in chunk.columns.items()}
        inference, theta = build(numbers_of_its_own, num_obs=1000, **columns)
        update = one_round(Adam(lr=0.01), Constant(), 10, 5)
        fused, start = Fused(inference, update, 0, [0]), update.init(theta)
        fused.prepare(start, chunk)
        got, want = fused.run(start, chunk, 6), fused.reference.run(start, chunk, 6)
    torch.testing.assert_close(got.terms, want.terms, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(got.state.theta, want.state.theta, rtol=1e-12, atol=0.0)
