"""Uses of an index, seen as the model makes them, against a look at each number."""

import itertools

import pytest
import torch
from svi_problems import F64

from trainer.inference.checks.indices import Lookup, WatchIndices, always_fits
from trainer.inference.model.ragged import Csr, Ragged

ROWS = 4
TABLE = torch.arange(10.0, 15.0, dtype=F64)


def lookup(index, size=5, wraps=True, row=None):
    index = torch.as_tensor(index)
    return Lookup(size, index, torch.arange(len(index)) if row is None else row, wraps)


@pytest.mark.parametrize("low", [-5, 0])
@pytest.mark.parametrize("shape", [(6,), (3, 2), (2, 3, 1)])
def test_what_is_outside_is_found_with_its_row(low, shape):
    for seed in range(20):
        index = torch.randint(-7, 8, shape, generator=torch.Generator().manual_seed(seed))
        want = [
            (row, next(int(i) for i in each.flatten() if not low <= i < 5))
            for row, each in enumerate(index)
            if any(not low <= i < 5 for i in each.flatten())
        ]
        rows, at = lookup(index).outside(low)
        assert list(zip(rows.tolist(), at.tolist())) == want


def test_an_entrys_row_is_the_row_of_its_list():
    rows, at = lookup([0, 9, 1, -1], row=torch.tensor([0, 0, 2, 3])).outside(0)
    assert (rows.tolist(), at.tolist()) == ([0, 3], [9, -1])


def test_the_borders_of_int64_are_outside():
    big = 2**63 - 1
    rows, at = lookup([big, 0, -big - 1]).outside(-5)
    assert (rows.tolist(), at.tolist()) == ([0, 2], [big, -big - 1])


def test_minus_one_is_the_last_place_only_where_torch_counts_from_the_end():
    assert (lookup([0]).low, lookup([0], wraps=False).low) == (-5, 0)


def test_rows_that_are_counted_are_no_column_of_indices():
    assert lookup([0, 1, 2]).is_of_rows
    assert not lookup([0, 2, 1]).is_of_rows
    assert not lookup([[0, 1], [2, 3]]).is_of_rows


def test_an_index_that_is_a_column_has_its_name():
    lists = Ragged(torch.tensor([0, 1, 3]), torch.tensor([7, 8, 9]))
    columns = {"x": torch.tensor([1.0, 2.0]), "level": torch.tensor([3, 1]), "lists": lists}
    assert lookup([3, 1]).column(columns) == "level"
    assert lookup([[3], [1]]).column(columns) == "level"
    assert lookup([7, 8, 9]).column(columns) == "lists"
    assert lookup([4, 2]).column(columns) is None


def test_entries_of_sparse_rows_fit_a_table_as_wide():
    sparse = Csr(torch.tensor([0, 1]), torch.ones(1), torch.zeros(1, dtype=torch.int64), 5)
    assert always_fits(lookup([3, 0], size=5), sparse)
    assert not always_fits(lookup([3, 0], size=4), sparse)
    assert not always_fits(lookup([3, 0]), None)
    assert always_fits(lookup([0, 1], size=1), None)  # the rows themselves


WAYS = {
    "place": (lambda i: TABLE[i], True),
    "places of two": (lambda i: torch.stack([TABLE, TABLE])[:, i][0], True),
    "put": (lambda i: torch.zeros(5, dtype=F64).index_put((i,), torch.ones(ROWS, dtype=F64)), True),
    "take a dimension": (lambda i: TABLE.index_select(0, i), False),
    "gather": (lambda i: TABLE.gather(0, i), False),
    "scatter": (lambda i: torch.zeros(5, dtype=F64).scatter(0, i, 1.0), False),
    "scatter and add": (lambda i: torch.zeros(5, dtype=F64).scatter_add(0, i, torch.ones(ROWS, dtype=F64)), False),
    "add": (lambda i: torch.zeros(5, dtype=F64).index_add(0, i, torch.ones(ROWS, dtype=F64)), False),
    "embedding": (lambda i: torch.nn.functional.embedding(i, TABLE[:, None])[:, 0], False),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_use_is_noted_and_its_result_is_that_without_a_watch(way):
    use, wraps = WAYS[way]
    index = torch.tensor([4, 0, 2, 2])
    with WatchIndices({"level": index}) as watch:
        found = use(index)
    assert torch.equal(found, use(index))
    (seen,) = watch.found
    assert (seen.size, seen.wraps, seen.column({"level": index})) == (5, wraps, "level")
    assert seen.row.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrong", [-1, 5, -6])
def test_what_is_out_of_range_counts_as_the_first_place(way, wrong):
    use, wraps = WAYS[way]
    index, taken = torch.tensor([4, wrong, 2, 2]), wrong if wraps and wrong == -1 else 0
    with WatchIndices({"level": index}) as watch:
        found = use(index)
    assert torch.equal(found, use(torch.tensor([4, taken, 2, 2])))
    rows, at = watch.found[0].outside(0)
    assert (rows.tolist(), at.tolist()) == ([1], [wrong])


def test_masks_and_indices_of_other_lengths_are_left_alone():
    """What has no number for each row is no business of the rows; a table without places has no place to take."""
    rows = {"x": torch.zeros(ROWS)}
    with WatchIndices(rows) as watch:
        assert torch.zeros(ROWS)[torch.tensor([True, False, True, True])].shape == (3,)
        assert torch.equal(TABLE[torch.tensor([1, 2])], TABLE[1:3])
        torch.zeros(0).index_select(0, torch.zeros(0, dtype=torch.int64))
        assert watch.found == []
        with pytest.raises(IndexError):
            TABLE[torch.tensor([9])]


def test_an_index_of_each_entry_is_one_of_the_entries_rows():
    lists = Ragged(torch.tensor([0, 1, 1, 3, 6, 6]), torch.tensor([0, 4, 9, 1, 2, 3]))
    with WatchIndices({"lists": lists}) as watch:
        TABLE[lists.values]
    rows, at = watch.found[0].outside(0)
    assert (rows.tolist(), at.tolist()) == ([2], [9])


def test_an_index_of_two_dimensions_is_by_rows_wherever_they_stand():
    index = torch.tensor([[0, 1, 9, 3], [0, 1, 2, -9]])  # [2, ROWS]
    for each, other in itertools.product((index, index.T), repeat=2):
        with WatchIndices({"x": torch.zeros(ROWS)}) as watch:
            TABLE[each].sum() + TABLE[other].sum()
        assert [lookup.outside(-5)[0].tolist() for lookup in watch.found] == [[2, 3]] * 2
