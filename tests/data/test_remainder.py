"""What an interrupted epoch has left, against the same rows written out one by one."""

import json

import pytest

from trainer.data.remainder import EpochRemainder, Part, dealt, left_of

PARTS = (Part(1, 4, 0, 3, 8), Part(0, 2, 1, 5, 6), Part(1, 4, 2, 0, 7), Part(0, 2, 0, 2, 2), Part(1, 4, 3, 6, 7))

Row = tuple[int, int, int]


def rows_of(parts: tuple[Part, ...] | list[Part]) -> list[Row]:
    """Epoch, lane and place of each row."""
    return [(part.epoch, part.lane, place) for part in parts for place in range(part.first, part.stop)]


@pytest.mark.parametrize("lanes", range(1, 17))
def test_each_lane_gets_its_cut_of_each_epochs_rows(lanes: int) -> None:
    """Of the n rows of an epoch, one after another, lane k gets those from floor(k n / lanes) to the next lane's."""
    want: list[list[Row]] = [[] for _ in range(lanes)]
    for epoch in (0, 1):
        stream = [row for row in rows_of(PARTS) if row[0] == epoch]
        for lane in range(lanes):
            want[lane] += stream[lane * len(stream) // lanes : (lane + 1) * len(stream) // lanes]
    found = dealt(PARTS, lanes)
    assert [rows_of(each) for each in found] == want
    assert all(part.rows > 0 and part.lanes == (4 if part.epoch else 2) for each in found for part in each)


def test_nothing_is_dealt_as_nothing() -> None:
    assert dealt([], 3) == [(), (), ()]
    assert dealt([Part(0, 1, 0, 4, 4)], 2) == [(), ()]


def test_a_remainder_dealt_to_its_own_lanes_stays_as_it_is() -> None:
    parts = (Part(2, 3, 0, 4, 9), Part(2, 3, 1, 4, 9), Part(2, 3, 2, 4, 9))
    assert dealt(parts, 3) == [(part,) for part in parts]


@pytest.mark.parametrize("taken", range(16))
def test_what_is_left_are_the_rows_after_those_that_were_taken(taken: int) -> None:
    left = left_of(PARTS, taken)
    assert rows_of(left) == rows_of(PARTS)[taken:]
    assert all(part.rows > 0 for part in left)


def test_a_remainder_goes_through_a_checkpoint() -> None:
    rest = EpochRemainder(7, 2, PARTS)
    assert rest.rows == len(rows_of(PARTS)) == 14
    assert EpochRemainder.of(json.loads(json.dumps(rest.plain()))) == rest
    assert EpochRemainder.of(EpochRemainder(0, 1, ()).plain()) == EpochRemainder(0, 1, ())
    assert EpochRemainder.of(None) is None
