"""The bytes of a shard: a plain tar whose members are `BLOCK.COLUMN.npy`, so that stock WebDataset reads it.

Headers are made with fixed times and owners: the same rows give the same bytes.
"""

import hashlib
import io
import math
import os
import tarfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from trainer.data.index import Column, Shard
from trainer.data.store import sync_folder

RECORD = 512  # bytes of a tar record; a member is its header, its data, and zeros up to a whole record


def member_name(block: int, column: str) -> str:
    """The name of the member that holds ``column`` of a shard's ``block``."""
    return f"{block:08d}.{column}.npy"


def npy_header(column: Column, rows: int) -> bytes:
    """The `.npy` header of ``rows`` rows of a column: a reader compares bytes, and parses nothing."""
    file = io.BytesIO()
    dtype = np.dtype(column.dtype).newbyteorder("<")
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows, *column.shape)}
    )
    return file.getvalue()


def tar_header(name: str, size: int) -> bytes:
    """The tar header of a member of ``size`` bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    return info.tobuf(tarfile.USTAR_FORMAT)


def padding(size: int) -> int:
    """Bytes of zeros after a member's ``size`` bytes of data."""
    return -size % RECORD


def payload_bytes(column: Column, rows: int) -> int:
    """Bytes of the values of ``rows`` rows."""
    return rows * math.prod(column.shape) * np.dtype(column.dtype).itemsize


class ShardWriter:
    """Writes blocks into shards of about ``shard_bytes``, hashing as it writes; `close` gives the index's entries."""

    def __init__(self, folder: Path, columns: tuple[Column, ...], shard_bytes: int):
        self.folder, self.columns, self.shard_bytes = folder, columns, shard_bytes
        self.shards: list[Shard] = []
        self.blocks = 0
        self._file: BinaryIO | None = None

    def write(self, block: dict[str, np.ndarray]) -> None:
        """Appends one block: column name -> [rows, ...], every array of the same number of rows."""
        rows = len(block[self.columns[0].name])
        members = [self._member(column, block[column.name], rows) for column in self.columns]
        if self._file is not None and self._position + sum(map(len, members)) > self.shard_bytes:
            self._finish()
        if self._file is None:
            self._start()
        assert self._file is not None
        for column, member in zip(self.columns, members):
            self._offsets[column.name].append(self._position)
            self._xxh3[column.name].append(xxhash.xxh3_64_hexdigest(member))
            self._put(member)
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

    def _member(self, column: Column, values: np.ndarray, rows: int) -> bytes:
        values = np.ascontiguousarray(values, dtype=np.dtype(column.dtype).newbyteorder("<"))
        assert values.shape == (rows, *column.shape), f"{column.name}: {values.shape} for {(rows, *column.shape)}"
        data = npy_header(column, rows) + values.tobytes()
        return tar_header(member_name(self.blocks, column.name), len(data)) + data + bytes(padding(len(data)))

    def _start(self) -> None:
        self._name = f"{len(self.shards):06d}.tar"
        self._file = (self.folder / self._name).open("xb")
        self._sha256, self._position = hashlib.sha256(), 0
        self._rows: list[int] = []
        self._offsets: dict[str, list[int]] = {column.name: [] for column in self.columns}
        self._xxh3: dict[str, list[str]] = {column.name: [] for column in self.columns}

    def _put(self, data: bytes) -> None:
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
            )
        )
