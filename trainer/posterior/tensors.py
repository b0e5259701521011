"""Rows as they are stored, as what a model receives."""

from typing import Any

import numpy as np
import torch

from trainer.data.fields import CsrRows, RaggedRows, Rows
from trainer.inference.model.ragged import Csr, Ragged, each_tensor


def shared(rows: Rows) -> Any:
    """``rows`` as a column of the same types, in the same memory."""
    if isinstance(rows, np.ndarray):
        return torch.from_numpy(rows)
    offsets, values = torch.from_numpy(rows.offsets), torch.from_numpy(rows.values)
    if isinstance(rows, RaggedRows):
        return Ragged(offsets, values)
    return Csr(offsets, values, torch.from_numpy(rows.indices), rows.width)


def to_tensor(rows: Rows, dtype: torch.dtype) -> Any:
    """Floats, and the values of sparse rows, as ``dtype``; truth values as they are; other numbers as int64."""
    if isinstance(rows, CsrRows):
        rows = CsrRows(rows.offsets, rows.indices.astype(np.int64), rows.values.astype(np.float64), rows.width)
    elif isinstance(rows, np.ndarray):
        rows = np.ascontiguousarray(rows)
    return each_tensor(shared(rows), lambda tensor: as_type(tensor, dtype))


def as_type(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Floats as ``dtype``; truth values as they are; other numbers as int64."""
    if tensor.dtype == torch.bool:
        return tensor
    return tensor.to(dtype if tensor.is_floating_point() else torch.int64)
