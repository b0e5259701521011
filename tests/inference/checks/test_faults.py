"""What is wrong with rows, from traces made by hand, against a look at each row."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from svi_problems import F64

from trainer.inference.checks.faults import (
    Fault,
    by_row,
    counted,
    observed,
    of_lookup,
    of_weight,
    outside,
    row_dim,
    without_density,
)
from trainer.inference.checks.indices import Lookup
from trainer.inference.model.ragged import Ragged
from trainer.inference.model.supports import supported

ROWS = 4
Y = torch.tensor([1.0, -2.0, 3.0, -4.0], dtype=F64)
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("rows", "where"),
    [
        ([7], "in row 7 (row_id), w"),
        ([7, 9], "in row 7 (row_id), w, and so in row 9"),
        ([7, 9, 12], "in row 7 (row_id), w, and so in rows 9, 12"),
        ([7, 7, 9], "in row 7 (row_id), w, and so in row 9"),
    ],
)
def test_a_sentence_names_its_rows_once(rows, where):
    assert Fault(list(range(len(rows))), "it is 5", ", w", "mend it").sentence(rows) == f"it is 5 {where}: mend it."


def sites_of(model):
    with pyro.validation_enabled(False):
        trace = poutine.trace(model).get_trace()
    return {site["name"]: site for site in observed(trace, "data")}


def site_of(fn, value, scale=1.0, mask=True, dim=-1, name="y"):
    """The one observed site of a model; ``mask`` and ``scale`` around it."""

    def model():
        with pyro.plate("data", ROWS, dim=dim), poutine.mask(mask=mask), poutine.scale(scale=scale):
            pyro.sample(name, fn, obs=value)

    return sites_of(model)[name]


def test_data_are_what_is_observed_inside_the_plate():
    def model():
        pyro.sample("latent", dist.Normal(0, 1))
        pyro.sample("beside", dist.Normal(0, 1), obs=torch.tensor(1.0))
        pyro.deterministic("derived_outside", torch.tensor(1.0))
        with pyro.plate("other", 3, dim=-2):
            pyro.sample("of_other", dist.Normal(torch.zeros(3, 1), 1), obs=torch.zeros(3, 1))
        with pyro.plate("data", ROWS):
            pyro.sample("inside", dist.Normal(0, 1).expand([ROWS]))
            pyro.deterministic("derived", torch.zeros(ROWS))
            pyro.factor("factor", torch.zeros(ROWS))
            pyro.sample("y", dist.Normal(torch.zeros(ROWS), 1), obs=Y.float())

    assert list(sites_of(model)) == ["y"]


@pytest.mark.parametrize(
    ("scale", "mask", "counts"),
    [
        (1.0, True, [1, 1, 1, 1]),
        (1.0, torch.tensor([True, False, True, False]), [1, 0, 1, 0]),
        (torch.tensor([0.0, 1.0, 2.0, 0.5]), True, [0, 1, 1, 1]),
        (torch.tensor([0.0, 1.0, 2.0, 0.5]), torch.tensor([True, False, True, True]), [0, 0, 1, 1]),
        (1.0, False, [0, 0, 0, 0]),
    ],
)
def test_what_counts_is_neither_masked_nor_of_weight_zero(scale, mask, counts):
    found = counted(site_of(dist.Normal(torch.zeros(ROWS, dtype=F64), 1.0), Y, scale, mask))
    assert found.int().tolist() == counts
    assert found.dtype == torch.bool


@pytest.mark.parametrize("dim", [-1, -2, -3])
def test_the_dimension_of_the_rows_is_that_of_their_plate(dim):
    shape = (ROWS, *(1,) * (-dim - 1))
    assert row_dim(site_of(dist.Normal(torch.zeros(shape), 1.0), Y.float().view(shape), dim=dim), "data") == dim


@pytest.mark.parametrize(
    ("shape", "dim", "inner", "index"),
    [
        ((4,), -1, 0, lambda v, i: v[i : i + 1]),
        ((4, 3), -2, 0, lambda v, i: v[i]),
        ((3, 4), -1, 0, lambda v, i: v[:, i]),
        ((2, 4, 3), -2, 0, lambda v, i: v[:, i]),
        ((2, 4, 3), -1, 1, lambda v, i: v[:, i]),
        ((), -1, 0, lambda v, i: v),
        ((1, 3), -2, 0, lambda v, i: v[0]),
    ],
)
def test_values_by_row(shape, dim, inner, index):
    """Whatever the batch shape; those that all rows share are each row's."""
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    found = by_row(values, dim, ROWS, inner)
    assert len(found) == ROWS
    for row in range(ROWS):
        assert found[row].tolist() == index(values, row).flatten().tolist()


@pytest.mark.parametrize(
    ("weight", "rows", "what"),
    [
        ([0.0, 1.5, 3.0], [], None),
        ([1.0, -0.5, 2.0], [1], "-0.5"),
        ([NAN, 1.0, INF], [0, 2], "nan"),
        ([-1.0] * 9, [0, 1, 2, 3, 4], "-1"),
    ],
)
def test_weights(weight, rows, what):
    faults = list(of_weight(torch.tensor(weight)))
    assert [fault.rows for fault in faults] == ([rows] if rows else [])
    assert all(fault.what == f'column "weight" is {what}' for fault in faults)


def found_outside(site, dim=-1, counts=None):
    counts = counted(site) if counts is None else counts
    with pyro.validation_enabled(False):
        return list(outside(site, counts, supported(site["fn"], site["value"]), dim, ROWS))


def test_a_value_outside_the_support_is_told_with_its_rows():
    site = site_of(dist.Poisson(torch.ones(ROWS, dtype=F64)), Y)
    (fault,) = found_outside(site)
    assert (fault.rows, fault.what) == ([1, 3], 'site "y" observes -2')
    assert "outside the support of Poisson (whole numbers from 0" in fault.why
    assert found_outside(site_of(dist.Normal(torch.zeros(ROWS, dtype=F64), 1.0), Y)) == []
    kept = torch.tensor([True, False, True, True])
    assert found_outside(site, counts=kept)[0].rows == [3]


def test_the_first_wrong_value_of_a_row_of_several_is_shown():
    values = torch.tensor([[1.0, 2.0]] * ROWS, dtype=F64)
    values[2] = torch.tensor([3.0, -7.0])
    site = site_of(dist.Poisson(torch.ones(ROWS, 2, dtype=F64)), values, dim=-2)
    (fault,) = found_outside(site, dim=-2)
    assert (fault.rows, fault.what) == ([2], 'site "y" observes -7')


def test_a_vector_is_shown_whole_or_by_its_first_numbers():
    shares = torch.full((ROWS, 6), 1 / 6, dtype=F64)
    shares[3] = 0.5
    (fault,) = found_outside(site_of(dist.Dirichlet(torch.ones(ROWS, 6, dtype=F64)), shares))
    assert (fault.rows, fault.what) == ([3], 'site "y" observes [0.5, 0.5, 0.5, 0.5, …]')


LEVELS = torch.tensor([0, 7, -1, 4])


def test_an_index_beyond_its_table_is_told_before_one_that_wraps_around():
    lookup, every = Lookup(5, LEVELS, torch.arange(ROWS), True), torch.ones(ROWS, dtype=torch.bool)
    (fault,) = of_lookup(lookup, every, {"level": LEVELS})
    assert (fault.rows, fault.what) == ([1], 'column "level" is 7')
    assert "a table of 5 (0 to 4)" in fault.why
    wrapping = Lookup(8, LEVELS, torch.arange(ROWS), True)
    (fault,) = of_lookup(wrapping, every, {"level": LEVELS})
    assert (fault.rows, fault.what) == ([2], 'column "level" is -1')
    assert not list(of_lookup(wrapping, torch.tensor([True, True, False, True]), {"level": LEVELS}))
    (fault,) = of_lookup(wrapping, every, {})
    assert fault.what == "an index made from the columns is -1"


def test_an_index_of_no_row_is_no_fault_and_rows_are_told_once():
    """Entries that are not used have the number of rows for a row."""
    lists = Ragged(torch.tensor([0, 2, 2, 3, 3]), torch.tensor([-1, -2, -3, -4]))
    lookup = Lookup(5, lists.values, lists.row_of_entry, True)
    (fault,) = of_lookup(lookup, torch.ones(ROWS, dtype=torch.bool), {"lists": lists})
    assert (fault.rows, fault.what) == ([0, 2], 'column "lists" is -1')
    unused = Lookup(5, torch.tensor([-1]), torch.tensor([ROWS]), True)
    assert not list(of_lookup(unused, torch.ones(ROWS, dtype=torch.bool), {}))


def test_a_log_density_that_is_not_finite_is_told_with_its_value():
    amounts = torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=F64)
    gamma = dist.Gamma(torch.full((ROWS,), 2.0, dtype=F64), 1.0)
    with pyro.validation_enabled(False):
        (fault,) = without_density(site_of(gamma, amounts), -1, ROWS)
        assert (fault.rows, fault.of_all) == ([1, 3], False)
        assert fault.what == 'the log density of site "y" is -inf at 0'
        assert not list(without_density(site_of(gamma, amounts.clamp(min=0.1)), -1, ROWS))
        (fault,) = without_density(site_of(gamma, torch.zeros(ROWS, dtype=F64)), -1, ROWS)
        assert fault.of_all
        kept = torch.tensor([True, False, True, False])
        assert not list(without_density(site_of(gamma, amounts, mask=kept), -1, ROWS))
