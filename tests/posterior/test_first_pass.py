"""Which rows are checked as they come, and under which number a wrong one is named."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from trainer.errors import UserError
from trainer.inference.estimates.passes import Block
from trainer.inference.model.plates import Batch
from trainer.inference.model.ragged import Ragged
from trainer.posterior.first_pass import FirstPass

SLOTS, GROUPS, SIZE = 2, 3, 4
TRAIN, HELD_OUT = object(), object()
"""Folders are told apart by identity alone."""


class Check:
    """Refuses rows whose x is below 0; notes how many rows it looked at one by one."""

    def __init__(self) -> None:
        self.looked_at: list[int] = []

    def is_right(self, columns: dict) -> bool:
        return bool((columns["x"] >= 0).all())

    def refuse(self, batch: Batch, of_places: Callable[[list[int]], list[int]] | None = None) -> None:
        x = batch.columns["x"]
        self.looked_at.append(len(x))
        places = (x < 0).nonzero()[:, 0].tolist()
        rows = places if of_places is None else of_places(places)
        if rows:
            raise UserError(f"rows {rows}")


@pytest.fixture
def check() -> Check:
    return Check()


def passing(check: Check, until: int = 10) -> FirstPass:
    return FirstPass(check, TRAIN, until)  # type: ignore[arg-type]


def chunk(bad: tuple[int, int, int] | None = None, valid: int = SIZE) -> Batch:
    x = torch.ones(SLOTS, GROUPS, SIZE)
    if bad:
        x[bad] = -1
    return Batch({"x": x}, torch.full((SLOTS, GROUPS), valid), torch.full((SLOTS,), GROUPS * valid))


def row_ids(step: int) -> np.ndarray:
    """Of a step's groups; a number that tells all three."""
    return np.array([[1000 * step + 10 * a + b for b in range(SIZE)] for a in range(GROUPS)])


@pytest.mark.parametrize("bad", [(0, 0, 0), (0, 2, 3), (1, 0, 0), (1, 1, 2)])
def test_a_wrong_row_of_a_chunk_is_named_by_its_own_number(check: Check, bad: tuple[int, int, int]) -> None:
    error = passing(check).of_chunk(chunk(bad), 5, row_ids)
    slot, group, row = bad
    assert str(error) == f"rows [{1000 * (5 + slot) + 10 * group + row}]"
    assert check.looked_at == [SLOTS * GROUPS * SIZE]


def test_rows_that_are_right_are_not_looked_at_one_by_one(check: Check) -> None:
    assert passing(check).of_chunk(chunk(), 0, row_ids) is None
    assert check.looked_at == []


def test_a_row_that_fills_a_group_is_no_row(check: Check) -> None:
    """It is another's copy, and is named where that one is."""
    assert passing(check).of_chunk(chunk((1, 1, 3), valid=3), 0, row_ids) is None
    assert str(passing(check).of_chunk(chunk((1, 1, 2), valid=3), 0, row_ids)) == "rows [1012]"


@pytest.mark.parametrize(("step", "found"), [(9, True), (10, False), (11, False)])
def test_chunks_of_later_epochs_hold_the_same_rows(check: Check, step: int, found: bool) -> None:
    assert (passing(check).of_chunk(chunk((0, 0, 0)), step, row_ids) is not None) == found


def test_a_column_of_lists_is_one_row_after_another(check: Check) -> None:
    lists = Ragged(torch.tensor([0, 1, 1, 3, 3]), torch.tensor([1.0, 2.0, 3.0]))
    stacked = Ragged(lists.offsets.expand(SLOTS, GROUPS, -1).clone(), lists.values.expand(SLOTS, GROUPS, -1).clone())
    seen: list[Batch] = []
    check.refuse = lambda batch, of_places=None: seen.append(batch)  # type: ignore[method-assign, misc, assignment]
    bad = chunk((0, 0, 0))
    assert passing(check).of_chunk(bad._replace(columns={**bad.columns, "r": stacked}), 0, row_ids) is None
    assert seen[0].columns["r"].lengths.tolist() == [1, 0, 2, 0] * SLOTS * GROUPS


def block(wrong: bool) -> Block:
    return Block(0, {"x": torch.tensor([1.0, -1.0 if wrong else 1.0])}, torch.arange(2))


def test_blocks_are_checked_until_their_folder_is_done(check: Check) -> None:
    made = passing(check)
    for folder in (TRAIN, HELD_OUT):
        with pytest.raises(UserError, match="rows"):
            made.of_block(folder, block(True), 3)  # type: ignore[arg-type]
    made.done(HELD_OUT)  # type: ignore[arg-type]
    made.of_block(HELD_OUT, block(True), 3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="rows"):
        made.of_block(TRAIN, block(True), 3)  # type: ignore[arg-type]
    made.of_block(TRAIN, block(True), 10)  # type: ignore[arg-type]  # the first epoch's chunks had them all
    made.done(TRAIN)  # type: ignore[arg-type]
    made.of_block(TRAIN, block(True), 3)  # type: ignore[arg-type]
    assert made.of_chunk(chunk((0, 0, 0)), 3, row_ids) is None


def test_the_bounds_of_one_folder_say_nothing_of_another(check: Check) -> None:
    """So each row of another folder is looked at, also where all lie within them."""
    made = passing(check)
    made.of_block(TRAIN, block(False), 3)  # type: ignore[arg-type]
    assert check.looked_at == []
    made.of_block(HELD_OUT, block(False), 3)  # type: ignore[arg-type]
    assert check.looked_at == [2]
    with pytest.raises(UserError, match="rows"):
        made.of_block(HELD_OUT, block(True), 100)  # type: ignore[arg-type]
