"""Noise as an argument: Philox4x32-10 in integer torch operations; a draw is a function of where it is used.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A counter names a draw
(seed, step, draw, element or row); nothing is carried from one draw to the next, so ranks, chunks and resumed runs
agree without passing a generator around.

Shapes: R draws, B rows, n elements.
"""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_ROW_STREAM = 1 << 31  # the top bit of the draw tells noise by row from noise by element


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four words of 32 random bits, as int64, for every ``counter`` (four int64 tensors that broadcast)."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64, which leaves both 32-bit halves right.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _normals(words: tuple[Tensor, ...], count: int, dtype: torch.dtype) -> Tensor:
    """``count`` standard normals [..., count] from words [..., ceil(count / 4)], by Box and Muller (1958)."""
    w0, w1, w2, w3 = ((word.double() + 0.5) * 2.0**-32 for word in words)
    r0, r1 = (-2.0 * w0.log()).sqrt(), (-2.0 * w2.log()).sqrt()
    a0, a1 = 2.0 * math.pi * w1, 2.0 * math.pi * w3
    quads = torch.stack([r0 * a0.cos(), r0 * a0.sin(), r1 * a1.cos(), r1 * a1.sin()], dim=-1)
    return quads.flatten(-2)[..., :count].to(dtype)


def element_noise(seed: int, step: Tensor, draws: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Standard normals [R, count] for the elements of the global latents at ``step`` (0-d) of ``draws`` [R]."""
    quad = torch.arange(-(-count // 4), device=draws.device)
    words = philox4x32((quad, step >> 32, step & _MASK, draws[:, None]), _key(seed))
    return _normals(words, count, dtype)


def row_noise(seed: int, step: Tensor, draws: Tensor, row_id: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Standard normals [R, B, count] for the local latents of rows ``row_id`` [R, B], whatever their place."""
    quad = torch.arange(-(-count // 4), device=draws.device)
    row = row_id[..., None]
    high = ((row >> 32) & 0xFFFF) | (quad << 16)
    words = philox4x32((row & _MASK, high, step & _MASK, (draws | _ROW_STREAM)[:, None, None]), _key(seed))
    return _normals(words, count, dtype)


def _key(seed: int) -> tuple[int, int]:
    return seed & _MASK, (seed >> 32) & _MASK


def mixed_seed(seed: int, step: int, draw: int) -> int:
    """A 63-bit seed for torch's own generator at (seed, step, draw): splitmix64's finaliser (Steele et al. 2014)."""
    z = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + draw * 0x94D049BB133111EB + 1) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) % 2**64
    return (z ^ (z >> 31)) >> 1
