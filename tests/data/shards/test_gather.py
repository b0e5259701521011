"""Runs of bytes from many places, compiled and run by run, against numpy's own slices."""

from pathlib import Path

import numpy as np
import pytest

from trainer.data.shards import gather as gathering
from trainer.data.shards.gather import gather

WAYS = ["compiled", "run by run"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "run by run":
        monkeypatch.setattr(gathering, "_compiled", lambda: None)
    elif gathering._compiled() is None:
        pytest.skip("needs a C compiler")
    return str(request.param)


def gathered(source: np.ndarray, runs: list[tuple[int, int, int]], target: np.ndarray) -> None:
    """Of each of ``runs``: from which row of ``source`` how many go to which of ``target``."""
    first, rows, place = np.array(runs, np.int64).reshape(-1, 3).T
    gather(source.ctypes.data + first * source.strides[0], rows, place, target)


@pytest.mark.parametrize("dtype", ["int8", "bool", "int16", "float32", "float64", "int64"])
@pytest.mark.parametrize("shape", [(), (3,), (7, 5)])
@pytest.mark.usefixtures("way")
def test_every_run_goes_to_its_place_and_the_rest_stays(dtype: str, shape: tuple[int, ...]) -> None:
    """Of any length and at any place, so that lines of the cache are met at each of their bytes."""
    generator = np.random.default_rng(0)
    lengths = [*generator.integers(0, 70, 40), 0, 1, 64, 129, 500]
    places = np.cumsum([3, *(length + gap for length, gap in zip(lengths, generator.integers(0, 4, 45)))])
    source = generator.integers(0, 2, (600, *shape)).astype(dtype)
    target = np.full((places[-1] + 5, *shape), 1, dtype)
    want = target.copy()
    runs = [(int(generator.integers(0, 600 - length + 1)), int(length), int(place))
            for length, place in zip(lengths, places)]  # fmt: skip
    for first, length, place in runs:
        want[place : place + length] = source[first : first + length]
    gathered(source, runs, target)
    np.testing.assert_array_equal(target, want)


@pytest.mark.usefixtures("way")
def test_the_bits_are_copied() -> None:
    source = np.array([np.nan, -0.0, np.inf, np.finfo(float).tiny / 2, 2.0**-1074])
    target = np.zeros(5)
    gathered(source, [(3, 2, 0), (0, 3, 2)], target)
    assert target.tobytes() == source[[3, 4, 0, 1, 2]].tobytes()


@pytest.mark.usefixtures("way")
def test_no_runs_copy_nothing() -> None:
    target = np.ones(4)
    gathered(np.zeros(4), [], target)
    gathered(np.zeros(4), [(0, 0, 3)], target)
    assert target.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("compiler", ["false", "/no/such/compiler"])
def test_without_a_compiler_that_works_runs_are_copied_one_by_one(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gathering, "_compiled", gathering._compiled.__wrapped__)
    assert gathering._compiled() is None
    target = np.zeros(2)
    gathered(np.array([1.0, 2.0]), [(1, 1, 0), (0, 1, 1)], target)
    assert target.tolist() == [2.0, 1.0]
    assert not list(tmp_path.rglob("*.so"))
