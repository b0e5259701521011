"""The side of a row: by the hash of its place, with its group, or by its time."""

from datetime import date, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from trainer.data.packing.columns import Recipe
from trainer.data.packing.shuffle import scramble
from trainer.data.packing.split import Split
from trainer.errors import UserError

PLACES = scramble(np.arange(20_000), 3, 0)
KEY = Recipe("key", ("g",), False, (), "int64")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_by_chance_places_stay_and_a_hash_of_them_draws_the_share(share: float) -> None:
    split = Split(share, 7)
    assert split.parts == ()
    np.testing.assert_array_equal(split.places(PLACES, None, {}), PLACES)
    held = split.is_held_out(PLACES)
    np.testing.assert_array_equal(held, scramble(PLACES, 7, 1).astype(float) / 2.0**64 < share)
    sd = (share * (1 - share) / len(PLACES)) ** 0.5
    assert abs(held.mean() - share) <= 5 * sd
    assert not split.missing({})


def test_seeds_draw_other_rows_and_order_matters_to_none() -> None:
    one, two = (Split(0.5, seed).is_held_out(PLACES) for seed in (1, 2))
    assert 0.45 < (one == two).mean() < 0.55
    np.testing.assert_array_equal(Split(0.5, 1).is_held_out(PLACES[::-1]), one[::-1])


def test_a_group_is_on_one_side_that_its_place_tells() -> None:
    split = Split(0.3, 7, by=KEY)
    assert split.parts == ("g",)
    keys = np.arange(len(PLACES)) % 50 - 25
    marked = split.places(PLACES, keys, {})
    np.testing.assert_array_equal(marked >> np.uint64(1), PLACES >> np.uint64(1))  # all but the lowest bit stays
    held = split.is_held_out(marked)
    np.testing.assert_array_equal(held, (scramble(keys, 7, 1).astype(float) / 2.0**64 < 0.3))
    assert {len(set(held[keys == key])) for key in range(-25, 25)} == {1}
    assert 0 < held.mean() < 1


TEXT = ["2024-01-30", "2024-01-31", None, "2024-02-01"]


@pytest.mark.parametrize(
    ("column", "after"),
    [
        (np.array([1, 2, -(2**63), 2**63 - 1]), 2),
        (np.array([1.0, 2.0, np.nan, np.inf]), 2),
        (np.array([1.0, 2.0, 1.9, 2.1], np.float32), 2.0),
        (pa.array([1, 2, None, 3]), 2),
        (pa.array(TEXT), "2024-01-31"),
        (pa.array(TEXT).dictionary_encode(), date(2024, 1, 31)),
        (pa.array(TEXT, pa.large_string()), "2024-01-31"),
        (pa.array([t and date.fromisoformat(t) for t in TEXT]), "2024-01-31"),
        (pa.array([t and datetime.fromisoformat(t) for t in TEXT], pa.timestamp("ns")), date(2024, 1, 31)),
        (pa.array([t and datetime.fromisoformat(t) for t in TEXT], pa.timestamp("s")), "2024-01-31T00:00:00"),
    ],
    ids=["int", "nan", "float32", "null", "text", "codes", "large text", "date", "ns", "s"],
)
def test_rows_at_a_time_or_later_are_held_out(column: Any, after: Any) -> None:
    split = Split(0.9, 0, time="t", after=after)
    assert split.parts == ("t",)
    marked = split.places(PLACES[:4], None, {"t": column})
    assert split.is_held_out(marked).tolist() == [False, True, False, True]
    np.testing.assert_array_equal(marked >> np.uint64(1), PLACES[:4] >> np.uint64(1))


def test_rows_without_a_time_are_told() -> None:
    split = Split(0.1, 0, time="t", after=2)
    for column in (np.array([1.0, np.nan, 3.0]), pa.array([1.0, None, 3.0]), pa.array([1.0, np.nan, 3.0])):
        ((name, absent),) = split.missing({"t": column}).items()
        assert (name, absent.tolist()) == ("t", [False, True, False])
    assert split.missing({"t": np.arange(3)}) == {}


@pytest.mark.parametrize(
    ("column", "after"),
    [
        (pa.array([1, 2]), "yesterday"),
        (pa.array([date(2024, 1, 1)]), "soon"),
        (pa.array([date(2024, 1, 1)]), 7),
        (np.array([1.0]), "2024-01-31"),
    ],
)
def test_what_does_not_compare_is_named(column: Any, after: Any) -> None:
    with pytest.raises(UserError, match=rf"split\.after={after} cannot be compared with column 't'"):
        Split(0.1, 0, time="t", after=after).places(PLACES[: len(column)], None, {"t": column})
