"""Streamed moments equal those of the whole."""

import numpy as np

from trainer.data.packing.running_moments import RunningMoments


def test_moments_survive_an_offset() -> None:
    values, moments = np.random.default_rng(0).normal(1e9, 1, size=(10_000, 2)), RunningMoments()
    for part in np.array_split(values, 7):
        moments.add(part)
    moments.add(values[:0])
    small = values - 1e9  # exact
    np.testing.assert_allclose(moments.sd, small.std(0), rtol=1e-12)
    np.testing.assert_allclose(moments.mean, 1e9 + small.mean(0), rtol=1e-15)


def test_a_constant_is_left_as_it_is() -> None:
    moments = RunningMoments()
    for _ in range(3):
        moments.add(np.tile([0.1, 0.0], (7, 1)))
    assert moments.sd.tolist() == [0.0, 0.0]
    assert moments.mean.tolist() == [0.1, 0.0]
    assert [shift.tolist() for shift in moments.shift()] == [[0.0, 0.0], [1.0, 1.0]]
