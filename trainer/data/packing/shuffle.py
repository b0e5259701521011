"""A global shuffle: a keyed hash gives every row its place, and cells cut the order into ranges.

The place of a row is a 64-bit number, a bijection of its id, so the order is one sort that nothing else changes. Cell c
of side s holds the places in [c, c + 1) · 2**49 of that side, and the cells, each sorted, are the sorted whole.
"""

import numpy as np

PLACE = "#place"  # the uint64 array that goes with rows while they are packed
CELLS = 1 << 15  # of either side
_SHIFT = np.uint64(49)


def scramble(ids: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """64 random bits for each of ``ids`` [B], a bijection for every (seed, stream): SplitMix64 at counter ``ids``.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    start = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)
    bits = ids.astype(np.uint64)
    bits *= np.uint64(0x9E3779B97F4A7C15)
    bits += start
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return bits


def cells_of(places: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """uint16 [B]: the cell of each row; those held out come after the others."""
    cells = (places >> _SHIFT).astype(np.uint16)
    cells += held_out.astype(np.uint16) << np.uint16(15)
    return cells


def in_order(places: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The order of rows by place; those that share one (a group; a place whose lowest bit is the side) by id."""
    order = np.argsort(places)
    ordered = places.take(order)
    return np.lexsort((ids, places)) if (ordered[1:] == ordered[:-1]).any() else order
