"""Shard folders written block by block, with bytes to damage."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.fields import CsrRows, RaggedRows, Rows
from trainer.data.shards.index import DTYPES, ROW_ID, Column, Index, write_index
from trainer.data.shards.tar import ShardWriter

SHAPES: dict[str, tuple[int, ...]] = {"float32": (3,), "int64": (2, 2)}


def all_dtypes(count: int) -> dict[str, np.ndarray]:
    """A column of each dtype, named for it, some with a shape; extremes, and NaN, first."""
    generator = np.random.default_rng(0)
    columns = {}
    for dtype in DTYPES:
        kind, shape = np.dtype(dtype).kind, (count, *SHAPES.get(dtype, ()))
        if kind == "f":
            columns[dtype] = generator.normal(size=shape).astype(dtype)
            columns[dtype][:3].flat[:3] = (np.nan, -np.inf, np.finfo(dtype).tiny)
        elif kind == "b":
            columns[dtype] = generator.random(shape) < 0.5
        else:
            limits = np.iinfo(dtype)
            columns[dtype] = generator.integers(limits.min, limits.max, shape, dtype, endpoint=True)
            columns[dtype][:2].flat[:2] = (limits.min, limits.max)
    return columns


def described_by(name: str, values: Rows) -> Column:
    """The column that stores ``values`` as they are."""
    if isinstance(values, np.ndarray):
        return Column(name, values.dtype.name, values.shape[1:])
    dtype = values.values.dtype.name
    if isinstance(values, CsrRows):
        return Column(name, dtype, (values.width,), kind="csr")
    return Column(name, dtype, values.values.shape[1:], kind="ragged")


def csr(count: int, width: int = 50, mean: float = 3.0, dtype: str = "uint16") -> CsrRows:
    """``count`` rows of about ``mean`` entries, a few of many and some of none."""
    generator = np.random.default_rng(count)
    lengths = generator.poisson(mean * generator.exponential(size=count))
    offsets = np.concatenate([[0], lengths.cumsum()])
    values = generator.integers(1, 9, offsets[-1]).astype(dtype)
    return CsrRows(offsets, generator.integers(0, width, offsets[-1]), values, width)


def ragged(count: int, shape: tuple[int, ...] = (2,)) -> RaggedRows:
    """``count`` rows of 0 to 6 entries."""
    generator = np.random.default_rng(count)
    offsets = np.concatenate([[0], generator.integers(0, 7, count).cumsum()])
    return RaggedRows(offsets, generator.normal(size=(offsets[-1], *shape)).astype("float32"))


def write_folder(
    path: Path,
    columns: Mapping[str, Rows],
    block_rows: Sequence[int],
    shard_bytes: int = 1 << 20,
    first_id: int = 0,
    split: str = "train",
) -> Index:
    """Writes the rows of ``columns``, numbered from ``first_id``, in blocks of ``block_rows`` rows."""
    path.mkdir(parents=True)
    count = sum(block_rows)
    columns = {**columns, ROW_ID: np.arange(first_id, first_id + count)}
    described = tuple(described_by(name, values) for name, values in columns.items())
    writer = ShardWriter(path, described, shard_bytes)
    ends = np.cumsum([0, *block_rows])
    for first, end in itertools.pairwise(ends):
        writer.write({name: values[first:end] for name, values in columns.items()})
    index = Index(described, writer.close(), 0, split, {"source": "t.parquet"})
    write_index(path, index)
    return index


def flip(file: Path, place: int, bits: int = 0xFF) -> None:
    """Changes one byte of a file."""
    data = bytearray(file.read_bytes())
    data[place] ^= bits
    file.write_bytes(data)


def sign(folder: Path, content: dict[str, Any]) -> None:
    """Writes ``content`` as the index of ``folder``, with the hash that belongs to it, as a forger would."""
    content = {name: value for name, value in content.items() if name != "digest"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    (folder / "index.json").write_text(json.dumps({**content, "digest": digest}))
