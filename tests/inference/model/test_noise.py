"""Philox against its authors' vectors; normals against their moments; draws against where they are used."""

import math

import pytest
import torch

from trainer.inference.model.noise import _normals, element_noise, mixed_seed, philox4x32, row_noise

F64 = torch.float64
ALL = 0xFFFFFFFF
# Random123's kat_vectors, philox 4x32, 10 rounds: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL,) * 4, (ALL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter, key, words):
    out = philox4x32(tuple(torch.tensor(c) for c in counter), key)
    assert tuple(int(word) for word in out) == words


def test_normals_have_the_moments_of_normals():
    n = 400_000
    z = element_noise(7, torch.tensor(3), torch.arange(4), n // 4, F64).flatten()
    moments = [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)]  # order, mean, variance of z**order
    for order, mean, variance in moments:
        assert abs(float((z**order).mean()) - mean) < 4 * math.sqrt(variance / n), order
    assert abs(float((z[1:] * z[:-1]).mean())) < 4 / math.sqrt(n)
    assert torch.isfinite(z).all()


def test_extreme_words_give_finite_normals():
    for word in (0, ALL):
        z = _normals((torch.full((1,), word),) * 4, 4, F64)
        assert torch.isfinite(z).all()
        assert z.abs().max() < 7


def test_a_draw_depends_on_where_it_is_used_and_on_nothing_else():
    def at(seed=1, step=5, draw=2, count=6):
        return element_noise(seed, torch.tensor(step), torch.tensor([draw]), count, F64)[0]

    assert torch.equal(at(), at())
    assert torch.equal(at(count=3), at(count=6)[:3])  # more elements do not move the first ones
    beside = element_noise(1, torch.tensor(5), torch.tensor([9, 2]), 6, F64)
    assert torch.equal(beside[1], at())
    others = [at(seed=2), at(seed=1 + 2**32), at(step=6), at(step=5 + 2**32), at(draw=3), beside[0]]
    for other in others:
        assert (other - at()).abs().min() > 1e-6
    assert at(count=0).shape == (0,)


def test_row_noise_follows_the_row_not_its_place():
    ids = torch.tensor([[11, 2**32 + 11, 5, 2**40, 0]])
    order = torch.tensor([4, 2, 0, 1, 3])
    draws, step = torch.tensor([3]), torch.tensor(8)
    z = row_noise(1, step, draws, ids, 5, F64)
    assert torch.equal(row_noise(1, step, draws, ids[:, order], 5, F64), z[:, order])
    assert len({float(v) for v in z.flatten()}) == z.numel()
    by_element = element_noise(1, step, draws, 25, F64)
    assert not set(z.flatten().tolist()) & set(by_element.flatten().tolist())  # two streams


def test_single_precision_is_the_double_to_its_rounding():
    """A uniform near 1 is rounded to 2^-25, which moves a radius near 0 by at most sqrt(2 * 2^-25); most moves are
    roundings of the angle, 2^-22 of a radius below 6.8."""
    args = (4, torch.tensor(2), torch.arange(3), 100_001)
    single, double = element_noise(*args, torch.float32), element_noise(*args, F64)
    assert single.dtype == torch.float32
    moved = (single - double).abs()
    assert float(moved.max()) <= math.sqrt(2 * 2**-25) + 6.8 * 2**-21
    assert float(moved.median()) <= 2**-22
    assert torch.isfinite(single).all()


def test_mixed_seeds_are_distinct_and_fit_torch():
    grid = [(seed, step, draw) for seed in (-1, 0, 1, 2**40) for step in range(50) for draw in range(20)]
    seeds = {mixed_seed(*at) for at in grid}
    assert len(seeds) == len(grid)
    assert all(0 <= seed < 2**63 for seed in seeds)
    low_bits = torch.tensor([seed & 1 for seed in seeds], dtype=F64)
    assert abs(float(low_bits.mean()) - 0.5) < 4 * 0.5 / math.sqrt(len(grid))
