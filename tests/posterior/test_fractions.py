"""A model that fails on a fraction where whole numbers were packed says so, and any other failure stays itself."""

import pytest
import torch

from trainer.data.shards.index import Column, Index
from trainer.errors import UserError
from trainer.inference.model.plates import Batch
from trainer.inference.model.ragged import Ragged
from trainer.posterior.fractions import refusing_fractions

INDEX = Index(
    (Column("k", "int64"), Column("x", "float32"), Column("v", "int64", (2,)), Column("r", "int64", kind="ragged")),
    (),
    0,
    "train",
)


def fail(error: Exception, columns: dict, row_id: torch.Tensor | None = None) -> None:
    batch = Batch.whole(columns, row_id)
    with refusing_fractions(INDEX, batch):
        raise error


@pytest.mark.parametrize("error", [IndexError("a"), RuntimeError("a"), TypeError("a"), ValueError("a\nb")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_column_its_value_and_its_row_are_named(error: Exception, dtype: torch.dtype) -> None:
    columns = {"x": torch.tensor([0.5, 0.5, 0.5], dtype=dtype), "k": torch.tensor([1.0, 2.5, 3.5], dtype=dtype)}
    with pytest.raises(UserError, match=r"column 'k' holds 2\.5 in row 1 .*whole numbers were packed.*\(a\)") as found:
        fail(error, columns)
    assert found.value.__cause__ is error
    with pytest.raises(UserError, match=r"column 'k' holds 2\.5 in row 71 "):
        fail(error, columns, torch.tensor([70, 71, 72]))


def test_of_several_numbers_the_row_is_shown() -> None:
    with pytest.raises(UserError, match=r"column 'v' holds \[2\.0, 0\.25\] in row 1 "):
        fail(IndexError("a"), {"v": torch.tensor([[1.0, 2.0], [2.0, 0.25]])})


@pytest.mark.parametrize(
    "columns",
    [
        {"k": torch.tensor([1, 2])},
        {"x": torch.tensor([0.5, 1.5])},
        {"r": Ragged(torch.tensor([0, 1]), torch.tensor([0.5]))},
    ],
    ids=["whole", "floats", "lists"],
)
def test_where_no_fraction_is_new_the_error_is_the_models(columns: dict) -> None:
    error = IndexError("out of range")
    with pytest.raises(IndexError) as found:
        fail(error, columns)
    assert found.value is error


def test_another_error_and_none_pass_through() -> None:
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError(), {"k": torch.tensor([0.5])})
    with refusing_fractions(INDEX, Batch.whole({"k": torch.tensor([0.5])})):
        pass


def test_floats_that_are_whole_are_no_fraction() -> None:
    """Rows of a batch that has one elsewhere: the model fails on these for another reason."""
    error = IndexError("index 99 is out of range")
    with pytest.raises(IndexError) as found:
        fail(error, {"k": torch.tensor([1.0, 99.0])})
    assert found.value is error
