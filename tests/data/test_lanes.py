"""How many lanes a plan gets, against a search through all numbers of lanes."""

import re

import pytest

from trainer.data.lanes import default_lanes
from trainer.errors import UserError


def searched(batch_size: int, world_size: int, num_rows: int) -> int | None:
    """The docstring as a search: the smallest number from 8 on (then 4, 2, 1) that ranks and lanes both divide."""
    batch = min(batch_size, num_rows)
    for least in (8, 4, 2, 1):
        lanes = next(n for n in range(1, 8 * world_size + 1) if n % least == 0 and n % world_size == 0)
        if batch % lanes == 0:
            return lanes
    return world_size if batch == num_rows >= world_size else None


@pytest.mark.parametrize("world", range(1, 13))
def test_every_small_batch_has_the_lanes_that_a_search_finds(world: int) -> None:
    for rows in (world, 40, 1000):
        for batch in range(1, 50):
            want = searched(batch, world, rows)
            if rows < world or want is None:
                with pytest.raises(UserError):
                    default_lanes(batch, world, rows)
            else:
                assert default_lanes(batch, world, rows) == want


def test_a_batch_of_the_whole_table_needs_no_even_share() -> None:
    """Also one that asks for more than there is."""
    assert [default_lanes(batch, 3, 10) for batch in (10, 10_000)] == [3, 3]
    assert default_lanes(7, 1, 7) == 1


@pytest.mark.parametrize(
    ("batch", "world", "rows", "said"),
    [
        (1, 2, 1, "rows(1) < ranks(2): use fewer ranks"),
        (8, 3, 2, "rows(2) < ranks(3)"),
        (10, 4, 100, "batch_size(10) % ranks(4) != 0: use batch_size=12 or 8."),
        (3, 4, 100, "batch_size(3) % ranks(4) != 0: use batch_size=4."),
    ],
)
def test_what_ranks_cannot_share_is_refused_with_batches_that_they_can(
    batch: int, world: int, rows: int, said: str
) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        default_lanes(batch, world, rows)
