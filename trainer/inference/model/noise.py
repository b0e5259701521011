"""Noise as an argument: Philox4x32-10 in integer torch operations; a draw is a function of where it is used.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A counter names a draw
(seed, step, draw, element or row); nothing is carried from one draw to the next, so ranks, chunks and resumed runs
agree without passing a generator around.

Shapes: K steps, A lane groups, R draws, B rows, E elements, n elements a row.
"""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_ROW_STREAM = 1 << 31  # the top bit of the draw tells noise by row from noise by element


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, ...]:
    """Four words of 32 random bits, as int64, for every ``counter`` (four int64 tensors that broadcast)."""
    # The masks also keep Inductor from treating a range of numbers as an index, whose products it takes in 32 bits.
    c0, c1, c2, c3 = torch.broadcast_tensors(*(word & _MASK for word in counter))
    k0, k1 = key
    for _ in range(_ROUNDS):
        (high0, low0), (high1, low1) = _product(c0, _MULTIPLIERS[0]), _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The upper and lower 32 bits of a product of 32-bit words; ``multiplier`` is odd.

    word * multiplier = 2 * half + word. No number here overflows an int64 (which C++ compilers take for impossible) or
    is negative: in torch 2.13 Inductor gave other bits than eager torch for the plain product and for a signed one.
    """
    half = word * (multiplier >> 1)
    return (half + (word >> 1)) >> 31, (((half & 0x7FFFFFFF) << 1) + word) & _MASK


def _normals(words: tuple[Tensor, ...], count: int, dtype: torch.dtype) -> Tensor:
    """``count`` standard normals [..., count] from words [..., ceil(count / 4)], by Box and Muller (1958).

    In the precision of ``dtype``: float32 arithmetic takes a quarter of float64's time (2.2 and 8.8 ns a normal).
    """
    w0, w1, w2, w3 = ((word.to(dtype) + 0.5) * 2.0**-32 for word in words)
    r0, r1 = (-2.0 * w0.log()).sqrt(), (-2.0 * w2.log()).sqrt()
    a0, a1 = 2.0 * math.pi * w1, 2.0 * math.pi * w3
    quads = torch.stack([r0 * a0.cos(), r0 * a0.sin(), r1 * a1.cos(), r1 * a1.sin()], dim=-1)
    # Contiguous: of a view of a larger tensor Inductor would copy all steps at each step.
    return quads.flatten(-2)[..., :count].contiguous()


def chunk_noise(
    size: tuple[int, int], seed: int | Tensor, steps: Tensor, draws: Tensor, row_id: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The noise of ``steps`` [K] for ``draws`` [A, R]: elements [K, A, R, E] and, where n > 0, rows [K, A, R, B, n].

    ``size``: (E, n) of the guide; ``row_id``: int64 [K, A, B].
    """
    elements, per_row = size
    shape = (steps.shape[0], *draws.shape)
    flat = element_noise(seed, steps.view(-1, 1, 1), draws.flatten(), elements, dtype).view(*shape, elements)
    if not per_row:
        return flat, None
    assert row_id is not None, "a guide with local latents needs row ids"
    ids = row_id[:, :, None].expand(*shape, row_id.shape[-1]).flatten(1, 2)
    rows = row_noise(seed, steps.view(-1, 1, 1, 1), draws.flatten(), ids, per_row, dtype)
    return flat, rows.view(*shape, row_id.shape[-1], per_row)


def element_noise(seed: int | Tensor, step: Tensor, draws: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Standard normals [R, count] for the elements of the global latents at ``step`` (0-d, or [K, 1, 1] for
    [K, R, count]) of ``draws`` [R].
    """
    quad = torch.arange(-(-count // 4), device=draws.device)
    words = philox4x32((quad, step >> 32, step & _MASK, draws[:, None]), _key(seed))
    return _normals(words, count, dtype)


def row_noise(
    seed: int | Tensor, step: Tensor, draws: Tensor, row_id: Tensor, count: int, dtype: torch.dtype
) -> Tensor:
    """Standard normals [R, B, count] for the local latents of rows ``row_id`` [R, B], whatever their place.

    With ``step`` [K, 1, 1, 1] and ``row_id`` [K, R, B]: [K, R, B, count].
    """
    quad = torch.arange(-(-count // 4), device=draws.device)
    row = row_id[..., None]
    high = ((row >> 32) & 0xFFFF) | (quad << 16)
    words = philox4x32((row & _MASK, high, step & _MASK, (draws | _ROW_STREAM)[:, None, None]), _key(seed))
    return _normals(words, count, dtype)


def _key(seed: int | Tensor) -> tuple[int | Tensor, int | Tensor]:
    return seed & _MASK, (seed >> 32) & _MASK


def mixed_seed(seed: int, step: int, draw: int) -> int:
    """A 63-bit seed for torch's own generator at (seed, step, draw): splitmix64's finalizer (Steele et al. 2014)."""
    z = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + draw * 0x94D049BB133111EB + 1) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) % 2**64
    return (z ^ (z >> 31)) >> 1
