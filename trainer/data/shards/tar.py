"""The bytes of a shard: a plain tar whose members are `BLOCK.COLUMN.npy`, so that stock WebDataset reads it.

A csr column has `BLOCK.COLUMN.ends.npy` (int32 [rows], where in the others a row ends), `.indices.npy` (uint16 where
the width is at most 65,536, else int32) and `.values.npy`; a ragged one `.ends.npy` and `.values.npy`.

Headers are made with fixed times and owners: the same rows give the same bytes, those of `webdataset.TarWriter` up to
the zeros at the end (docs/decisions/0013-tar-writer.md says why it does not write them).
"""

import hashlib
import io
import math
import os
import tarfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from trainer.data.fields import Rows
from trainer.data.shards.index import Column, Shard
from trainer.data.store import sync_folder

RECORD = 512  # bytes of a tar record; a member is its header, its data, and zeros up to a whole record


def member_name(block: int, column: str) -> str:
    """The name of the member that holds ``column`` of a shard's ``block``."""
    return f"{block:08d}.{column}.npy"


def npy_header(column: Column, rows: int) -> bytes:
    """The `.npy` header of ``rows`` rows of a column: a reader compares bytes, and parses nothing."""
    return _npy_header(column.dtype, (rows, *column.shape))


@lru_cache(maxsize=256)
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype).newbyteorder("<"))
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def tar_header(name: str, size: int) -> bytes:
    """The tar header of a member of ``size`` bytes: all but its number and sum is that of the other blocks' members."""
    number = name[:8].encode()
    header, others = _tar_header(name[8:], size)
    return number + header[8:148] + b"%06o\0 " % (others + sum(number)) + header[156:]


@lru_cache(maxsize=256)
def _tar_header(name: str, size: int) -> tuple[bytes, int]:
    """The header of block 0, and the sum of its bytes but those of the number."""
    info = tarfile.TarInfo("0" * 8 + name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    header = info.tobuf(tarfile.USTAR_FORMAT)
    return header, sum(header[8:148]) + 8 * ord(" ") + sum(header[156:])


def padding(size: int) -> int:
    """Bytes of zeros after a member's ``size`` bytes of data."""
    return -size % RECORD


def payload_bytes(column: Column, rows: int) -> int:
    """Bytes of the values of ``rows`` rows."""
    return rows * math.prod(column.shape) * np.dtype(column.dtype).itemsize


class ShardWriter:
    """Writes blocks into shards of about ``shard_bytes``, hashing as it writes; `close` gives the index's entries.

    ``shard``, ``block``: the numbers of the first ones.
    """

    def __init__(self, folder: Path, columns: tuple[Column, ...], shard_bytes: int, shard: int = 0, block: int = 0):
        self.folder, self.columns, self.shard_bytes = folder, columns, shard_bytes
        self.shards: list[Shard] = []
        self.blocks, self._first_shard = block, shard
        self._file: BinaryIO | None = None

    def write(self, block: Mapping[str, Rows]) -> None:
        """Appends one block: column name -> [rows, ...], or `CsrRows` or `RaggedRows`, all of as many rows."""
        rows = len(block[self.columns[0].name])
        members = {
            part.name: self._member(part, values)
            for column in self.columns
            for part, values in _arrays(column, block[column.name], rows)
        }
        size = sum(len(piece) for member in members.values() for piece in member)
        if self._file is not None and self._position + size > self.shard_bytes:
            self._finish()
        if self._file is None:
            self._start()
        assert self._file is not None
        for name, member in members.items():
            self._offsets.setdefault(name, []).append(self._position)
            digest = xxhash.xxh3_64()
            for piece in member:
                digest.update(piece)
                self._put(piece)
            self._xxh3.setdefault(name, []).append(digest.hexdigest())
        for column in self.columns:
            if column.kind != "dense":
                offsets = block[column.name].offsets  # type: ignore[union-attr]
                self._entries.setdefault(column.name, []).append(int(offsets[-1]))
                self._widest[column.name] = widest_of(offsets, self._widest.get(column.name, []))
        self._rows.append(rows)
        self.blocks += 1

    def close(self) -> tuple[Shard, ...]:
        """Ends the last shard, makes all durable, and returns the shards."""
        if self._file is not None:
            self._finish()
        sync_folder(self.folder)
        return tuple(self.shards)

    def abort(self) -> None:
        """Closes what is open; the folder is for the caller to remove."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _member(self, column: Column, values: np.ndarray) -> tuple[bytes, memoryview, bytes]:
        """What comes before the values, the values, and what fills the record."""
        values = np.ascontiguousarray(values, dtype=np.dtype(column.dtype).newbyteorder("<"))
        header, size = npy_header(column, len(values)), values.nbytes
        before = tar_header(member_name(self.blocks, column.name), len(header) + size) + header
        return before, values.reshape(-1).view(np.uint8).data, bytes(padding(len(header) + size))

    def _start(self) -> None:
        self._name = f"{self._first_shard + len(self.shards):06d}.tar"
        self._file = (self.folder / self._name).open("xb")
        self._sha256, self._position = hashlib.sha256(), 0
        self._rows: list[int] = []
        self._offsets: dict[str, list[int]] = {}
        self._xxh3: dict[str, list[str]] = {}
        self._entries: dict[str, list[int]] = {}
        self._widest: dict[str, list[int]] = {}

    def _put(self, data: bytes | memoryview) -> None:
        assert self._file is not None
        self._file.write(data)
        self._sha256.update(data)
        self._position += len(data)

    def _finish(self) -> None:
        assert self._file is not None
        self._put(bytes(2 * RECORD))  # a tar ends with two empty records
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self.shards.append(
            Shard(
                self._name,
                self._position,
                self._sha256.hexdigest(),
                tuple(self._rows),
                {name: tuple(places) for name, places in self._offsets.items()},
                {name: tuple(hashes) for name, hashes in self._xxh3.items()},
                {name: tuple(counts) for name, counts in self._entries.items()},
                {name: tuple(counts) for name, counts in self._widest.items()},
            )
        )


def widest_of(offsets: np.ndarray, before: Sequence[int] = ()) -> list[int]:
    """[j]: the most entries of 2^j rows that follow each other, over the block of ``offsets`` [rows + 1] and those
    that gave ``before``.
    """
    rows, found = len(offsets) - 1, []
    for j in range(max((rows - 1).bit_length() + 1, len(before))):
        span = min(2**j, rows)
        most = int((offsets[span:] - offsets[:-span]).max())
        found.append(max([most, *before[min(j, len(before) - 1) :][:1]]))
    return found


def _arrays(column: Column, values: Rows, rows: int) -> list[tuple[Column, np.ndarray]]:
    """The arrays of a block's members."""
    if isinstance(values, np.ndarray):
        assert values.shape == (rows, *column.shape), f"{column.name}: {values.shape} for {(rows, *column.shape)}"
        return [(column, values)]
    assert len(values) == rows, f"{column.name}: {len(values)} rows for {rows}"
    assert values.offsets[-1] < 2**31, f"{column.name}: {values.offsets[-1]} entries in a block"
    arrays = (values.offsets[1:], *values.entries.values())
    return [(member.column, array) for member, array in zip(column.members, arrays, strict=True)]
