"""1, 2 and 4 real gloo ranks over the same four lane groups: one path, whoever holds the lanes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]
HERE = Path(__file__).parent
PROBLEMS = {
    "mean_field, float64": 1e-12,
    "full_rank, float64": 1e-12,
    "amortized, float64": 1e-12,
    "encoder, float64": 1e-12,
    "mean_field, float32": 1e-5,
    "full_rank, float32": 1e-5,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{rank: {"problem/world/key": array}}, from one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / "ranks.py"), str(folder / "out.npz"), str(folder / "store")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return {rank: dict(np.load(folder / f"out.{rank}.npz")) for rank in range(4)}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_walk_the_path_of_one(results, problem, world):
    tolerance = PROBLEMS[problem]
    for key in ("theta", "average", "terms", "norm"):
        one = results[0][f"{problem}/1/{key}"]
        many = results[0][f"{problem}/{world}/{key}"]
        assert np.isfinite(one).all()
        assert np.linalg.norm(many - one) <= tolerance * max(1.0, np.linalg.norm(one)), key


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_holds_the_same_bits(results, problem, world):
    for rank in range(1, world):
        for key in ("theta", "terms"):
            name = f"{problem}/{world}/{key}"
            assert np.array_equal(results[rank][name], results[0][name])


def test_the_run_went_somewhere(results):
    """The weights (1, -1, 0.5) are well off zero: the equality above is not that of a standstill."""
    loc = results[0]["mean_field, float64/4/theta"][:3]
    assert np.sign(loc).tolist() == [1, -1, 1]
    assert np.abs(loc).min() > 0.2


def test_averaging_after_every_step_of_plain_descent_is_summing_gradients(results):
    for key in ("", " average", " terms"):
        single, together = results[0][f"local/{key.strip() or 'single'}"], results[0][f"local/together{key}"]
        assert np.allclose(single, together, rtol=1e-12, atol=1e-12)


def test_local_steps_are_each_ranks_own_until_the_average(results):
    for rank in (0, 1):
        assert np.array_equal(results[rank]["local/several"], results[0]["local/by hand"])
    assert not np.allclose(results[0]["local/several"], results[0]["local/together"], rtol=1e-3)
