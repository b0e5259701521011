"""Rows as they are stored as columns of a model, against the rows written out."""

from typing import Any

import numpy as np
import pytest
import torch

from trainer.data.fields import CsrRows, RaggedRows
from trainer.inference.model.ragged import Csr, Ragged
from trainer.posterior.tensors import as_type, shared, to_tensor

F32, F64 = torch.float32, torch.float64
OFFSETS = np.array([0, 2, 2, 3])
CSR = CsrRows(OFFSETS, np.array([4, 0, 1], np.uint16), np.array([1, 2, 3], np.uint8), 5)
RAGGED = RaggedRows(OFFSETS, np.array([[1.5, 2.5], [3.5, 4.5], [5.5, 6.5]], np.float32))
DENSE = torch.tensor([[2.0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 3, 0, 0, 0]])


@pytest.mark.parametrize(
    ("values", "dtype", "want"),
    [
        (np.array([0.1], np.float64), F32, torch.tensor([0.1])),
        (np.array([0.1], np.float32), F64, torch.tensor([np.float32(0.1)], dtype=F64)),
        (np.array([-(2**63), 2**63 - 1]), F32, torch.tensor([-(2**63), 2**63 - 1])),
        (np.array([-128, 127], np.int8), F64, torch.tensor([-128, 127])),
        (np.array([65_535], np.uint16), F64, torch.tensor([65_535])),
        (np.array([True, False]), F64, torch.tensor([True, False])),
        (np.zeros((0, 3)), F32, torch.zeros(0, 3)),
        (np.arange(6.0).reshape(2, 3).T, F64, torch.arange(6.0, dtype=F64).view(2, 3).T),
        (np.arange(6.0)[::-2], F64, torch.tensor([5.0, 3.0, 1.0], dtype=F64)),
    ],
    ids=str,
)
def test_dense_rows_have_the_types_of_training(values: np.ndarray, dtype: torch.dtype, want: torch.Tensor) -> None:
    found = to_tensor(values, dtype)
    assert found.dtype == want.dtype
    assert torch.equal(found, want)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_values_of_sparse_rows_are_floats_and_their_places_int64(dtype: torch.dtype) -> None:
    """Whatever integers they are stored as."""
    found = to_tensor(CSR, dtype)
    assert isinstance(found, Csr)
    assert (found.values.dtype, found.indices.dtype, found.offsets.dtype) == (dtype, torch.int64, torch.int64)
    assert torch.equal(found.dense(), DENSE.to(dtype))


@pytest.mark.parametrize(("stored", "kept"), [(np.float32, F64), (np.int32, torch.int64), (np.bool_, torch.bool)])
def test_lists_keep_their_kind(stored: Any, kept: torch.dtype) -> None:
    found = to_tensor(RaggedRows(OFFSETS, RAGGED.values.astype(stored)), F64)
    assert isinstance(found, Ragged)
    assert (found.values.dtype, found.offsets.dtype) == (kept, torch.int64)
    assert found.lengths.tolist() == [2, 0, 1]
    np.testing.assert_array_equal(found.values, RAGGED.values.astype(stored))


def test_shared_rows_keep_their_types_and_their_memory() -> None:
    values = np.arange(3, dtype=np.int16)
    column = shared(values)
    values[1] = 9
    assert (column.dtype, column.tolist()) == (torch.int16, [0, 9, 2])
    sparse, lists = shared(CSR), shared(RAGGED)
    assert (sparse.indices.dtype, sparse.values.dtype, sparse.width) == (torch.uint16, torch.uint8, 5)
    assert lists.values.data_ptr() == RAGGED.values.ctypes.data
    assert sparse.offsets.data_ptr() == OFFSETS.ctypes.data


@pytest.mark.parametrize("kind", [torch.float16, F32, F64, torch.int8, torch.int64, torch.bool])
def test_types(kind: torch.dtype) -> None:
    found = as_type(torch.ones(2, dtype=kind), F64).dtype
    assert found == (F64 if kind.is_floating_point else torch.bool if kind == torch.bool else torch.int64)
