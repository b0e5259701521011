"""Sparse and ragged columns: every operation gives what it gives on the dense rows; models train on either alike."""

import dataclasses

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from svi_problems import F64, batch_of, build, grad, noise_of, one_group

from trainer.errors import UserError
from trainer.inference.model.plates import Batch
from trainer.inference.model.ragged import Csr, Ragged, cat, each_tensor, maker, of_plain, parts, plain, rolled
from trainer.inference.optim.optimizers import Adam
from trainer.inference.optim.rounds import one_round
from trainer.inference.optim.schedules import Constant
from trainer.inference.programs.fused import Fused
from trainer.inference.programs.program import Eager

WIDTH = 7


def sparse(rows: int, seed: int = 0, room: int = 5) -> Csr:
    """Rows of 0 to 4 entries, some at one index twice, with ``room`` more than they use."""
    generator = np.random.default_rng(seed)
    offsets = torch.from_numpy(np.concatenate([[0], generator.integers(0, 5, rows).cumsum()]))
    count = int(offsets[-1])
    indices = torch.from_numpy(generator.integers(0, WIDTH, count))
    made = Csr(offsets, torch.from_numpy(generator.normal(size=count)), indices, WIDTH)
    return made.padded(count + room)


def lists(rows: int, seed: int = 0) -> Ragged:
    one = sparse(rows, seed)
    return Ragged(one.offsets, torch.stack([one.values, one.indices.double()], -1))


def by_loop(column: Csr) -> torch.Tensor:
    """The dense rows, entry by entry."""
    dense = torch.zeros(len(column), WIDTH, dtype=F64)
    for row in range(len(column)):
        for entry in range(int(column.offsets[row]), int(column.offsets[row + 1])):
            dense[row, int(column.indices[entry])] += column.values[entry]
    return dense


def test_dense_rows_and_products_are_those_of_a_loop():
    column = sparse(9)
    dense, weight = by_loop(column), torch.randn(WIDTH, 3, dtype=F64)
    assert torch.equal(column.dense(), dense)
    torch.testing.assert_close(column @ weight, dense @ weight, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(column @ weight[:, 0], dense @ weight[:, 0], rtol=1e-14, atol=1e-14)
    assert len(column) == 9
    assert column.row_of_entry[int(column.offsets[-1]) :].eq(9).all()  # unused entries are no row's


def test_what_belongs_to_rows_reaches_their_entries_and_comes_back():
    """What an unused entry holds reaches no row; a row's part is taken once for each of its entries."""
    column, each = sparse(9), torch.arange(9, dtype=F64)
    used = torch.arange(len(column.values)) < column.offsets[-1]
    assert torch.equal(column.spread(each)[used], each.repeat_interleave(column.lengths))
    spread = torch.where(used, column.spread(each), torch.inf)
    assert torch.equal(column.total(spread), each * column.lengths)
    pairs = torch.stack([spread, -spread], -1)
    assert torch.equal(column.total(pairs)[:, 1], -each * column.lengths)


def test_sparse_rows_pass_for_their_dense_ones():
    column = sparse(9)
    dense = column.dense()
    assert (column.shape, column.dtype, column.device) == (dense.shape, dense.dtype, dense.device)
    for made, want in ((column.new_zeros(2), dense.new_zeros(2)), (column.new_full((2,), 3), dense.new_full((2,), 3)),
                       (column.new_tensor(2.0), dense.new_tensor(2.0))):  # fmt: skip
        assert made.dtype == want.dtype
        assert torch.equal(made, want)


@pytest.mark.parametrize(
    "at",
    [slice(2, 6), slice(None), slice(-1, None), slice(None, None, 2), torch.tensor([3, 3, 0]), torch.arange(9) % 2 == 0,
     slice(0, 0)],
)  # fmt: skip
def test_rows_are_taken_as_from_a_tensor(at):
    column, other = sparse(9), lists(9)
    assert torch.equal(column[at].dense(), by_loop(column)[at])
    taken = other[at]
    assert torch.equal(taken.lengths, other.lengths[at])
    whole = [other.values[a:b] for a, b in zip(other.offsets, other.offsets[1:])]
    places = torch.arange(9)[at].tolist()
    want = torch.cat([torch.zeros(0, 2, dtype=F64), *(whole[i] for i in places)])
    assert torch.equal(taken.values, want)


def test_stacks_are_indexed_by_their_parts_and_put_together_again():
    one, two = sparse(4, 1).padded(30), sparse(4, 2).padded(30)
    stack = cat([one[None], two[None]])
    assert len(stack) == 2
    assert torch.equal(stack[1].dense(), two.dense())
    assert torch.equal(stack[0:1][0].dense(), one.dense())
    assert torch.equal(cat([one, two]).dense(), torch.cat([one.dense(), two.dense()]))
    turned = rolled(stack[None])[0]
    assert torch.equal(turned[1].dense(), two.dense().roll(1, dims=0))
    assert turned.values.shape == stack.values.shape


@pytest.mark.parametrize("column", [sparse(5), lists(5), torch.randn(5, 2)], ids=["csr", "ragged", "dense"])
def test_a_column_is_what_is_made_of_its_parts_and_of_what_a_file_holds(column):
    count, make = maker(column)
    assert len(parts(column)) == count
    for again in (make(*parts(column)), of_plain(plain(column))):
        assert type(again) is type(column)
        for one, other in zip(parts(again), parts(column), strict=True):
            assert torch.equal(one, other)


def test_floats_change_their_type_and_integers_do_not():
    half = sparse(3).to(torch.float32)
    assert (half.dtype, half.indices.dtype, half.offsets.dtype) == (torch.float32, torch.int64, torch.int64)
    assert half.double().is_floating_point()
    assert each_tensor(half, torch.clone).nbytes == half.nbytes


def on_sparse(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(WIDTH, dtype=F64), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def test_the_elbo_and_its_gradient_are_those_of_the_dense_rows():
    column, y = sparse(12), torch.randn(12, dtype=F64)
    noise, found = noise_of(torch.randn(1, 1, WIDTH, dtype=F64)), []
    for x in (column, column.dense()):
        inference, theta = build(on_sparse, x=x, y=y)
        found.append(grad(inference, theta, noise, one_group(x=x, y=y)))
    torch.testing.assert_close(*found, rtol=1e-13, atol=1e-13)
    assert found[0].norm() > 1


def test_rows_that_depend_on_each_other_are_refused():
    def centered(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(WIDTH, dtype=F64), 2.0).to_event(1))
        with pyro.plate("data", len(x)):
            mean = x @ w
            pyro.sample("y", dist.Normal(mean - mean.mean(), 0.5), obs=y)

    with pytest.raises(Exception, match="not exchangeable over rows"):
        build(centered, x=sparse(12), y=torch.randn(12, dtype=F64))


def chunk(slots: int, groups: int, rows: int) -> tuple[Batch, Batch]:
    """A chunk with a sparse column, and the same with its dense rows."""
    torch.manual_seed(0)
    slot = [[sparse(rows, 10 * k + a).padded(5 * rows)[None] for a in range(groups)] for k in range(slots)]
    x = cat([cat(each)[None] for each in slot])
    dense = torch.stack([torch.stack([x[k][a].dense() for a in range(groups)]) for k in range(slots)])
    valid = torch.full((slots, groups), rows - 1)  # the last row of each is padding
    y = torch.randn(slots, groups, rows, dtype=F64)
    return tuple(Batch({"x": each, "y": y}, valid, valid.sum(1), None) for each in (x, dense))


@pytest.mark.slow
@pytest.mark.xdist_group("fused")
def test_training_takes_the_same_steps_on_sparse_rows_eager_and_fused():
    ours, theirs = chunk(6, 2, 8)
    inference, theta = build(on_sparse, num_obs=100, x=ours.columns["x"][0][0], y=ours.columns["y"][0][0])
    inference = dataclasses.replace(inference, objective=dataclasses.replace(inference.objective, antithetic=True))
    update = one_round(Adam(0.05), Constant(), 1000, 1000)
    state = update.init(theta)
    ends = {}
    for name, program, data in (("dense", Eager, theirs), ("eager", Eager, ours), ("fused", Fused, ours)):
        made = program(inference, update, 3, (0, 1))
        made.prepare(state, data.part(0, 1), lambda said: None)
        ends[name] = made.run(state, data, 6).state.theta
    assert (ends["dense"] - theta).norm() > 0.1
    torch.testing.assert_close(ends["eager"], ends["dense"], rtol=0, atol=1e-12)
    torch.testing.assert_close(ends["fused"], ends["dense"], rtol=0, atol=1e-12)


def test_a_batch_knows_its_rows_and_type():
    batch = batch_of(x=sparse(6), y=torch.zeros(6))
    assert batch.size == 6
    assert batch.dtype == F64


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: x * w,
        lambda x, w: w * x,
        lambda x, w: x + 1.0,
        lambda x, w: 1.0 - x,
        lambda x, w: x / w,
        lambda x, w: x**2,
    ],
)
def test_sparse_rows_have_no_arithmetic_and_say_what_there_is(use):
    x = Csr(torch.tensor([0, 1, 2]), torch.tensor([1.0, 2.0]), torch.tensor([0, 2]), 3)
    with pytest.raises(UserError, match=r"no arithmetic value by value: use x @ w, or x\.dense\(\)"):
        use(x, torch.ones(3))
