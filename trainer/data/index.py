"""`index.json`: what a shard folder holds. N always comes from here.

Versioned and self-hashed; every field's type and size is checked when it is read, so that a damaged or crafted index is
an error that names it, never a wrong row.
"""

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.store import atomic_write
from trainer.errors import UserError

FORMAT_VERSION = 1
ROW_ID = "row_id"
"""The int64 column of row numbers in the source, which every folder has and no model sees."""
INDEX_NAME = "index.json"
DTYPES = ("float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
_COLUMN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_\-]+\.tar")


@dataclass(frozen=True)
class Column:
    """One column: ``shape`` is that of a row; ``vocabulary``: what the codes of a categorical column stand for."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    vocabulary: list[Any] | None = None
    statistics: dict[str, Any] | None = None


@dataclass(frozen=True)
class Shard:
    """One tar file: ``rows`` per block; per column and block the place of its member (the header) and its hash."""

    name: str
    bytes: int
    sha256: str
    rows: tuple[int, ...]
    offsets: dict[str, tuple[int, ...]]
    xxh3: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Index:
    """The columns and shards of one split."""

    columns: tuple[Column, ...]
    shards: tuple[Shard, ...]
    seed: int
    split: str
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """N."""
        return sum(sum(shard.rows) for shard in self.shards)

    @property
    def block_rows(self) -> np.ndarray:
        """int64 [blocks]: rows of each block, over all shards in order."""
        return np.array([rows for shard in self.shards for rows in shard.rows], dtype=np.int64)

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON: the index hash that a checkpoint remembers."""
        return _digest(_content(self))

    def column(self, name: str) -> Column:
        """The column ``name``. Raises UserError where there is none."""
        for column in self.columns:
            if column.name == name:
                return column
        raise UserError(f'there is no column "{name}" in these shards ({", ".join(c.name for c in self.columns)}).')


def write_index(folder: Path, index: Index) -> None:
    """Writes ``folder/index.json``, last of all, so that a folder without it was never finished."""
    content = _content(index)
    with atomic_write(folder / INDEX_NAME) as file:
        file.write(json.dumps({**content, "digest": _digest(content)}, separators=(",", ":")).encode())


def read_index(folder: Path) -> Index:
    """The index of a shard folder, checked. Raises UserError naming the file."""
    path = folder / INDEX_NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {folder} is no finished shard folder; pack it again.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): copy it again, or mend the disk.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable JSON ({error}): pack the table again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no index: pack the table again.")
    if content.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {content.get('version')} where this program reads {FORMAT_VERSION}: "
            "pack the table again, or use the version that packed it."
        )
    if content.pop("digest", None) != _digest(content):
        raise UserError(f"{path} does not match its own hash, so it was damaged or edited: pack the table again.")
    try:
        return _parse(content)
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): pack the table again.") from None


def _content(index: Index) -> dict[str, Any]:
    content = {"version": FORMAT_VERSION, **asdict(index)}
    return json.loads(json.dumps(content))  # tuples as lists, so that the hash of what is read is that of what was


def _digest(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _parse(content: dict[str, Any]) -> Index:
    columns = tuple(_parse_column(**column) for column in content["columns"])
    names = [column.name for column in columns]
    _require(len(set(names)) == len(names), "a column is named twice")
    _require(ROW_ID in names, f"there is no column {ROW_ID}")
    _require(isinstance(content["shards"], list), "shards is no list")
    row_id = columns[names.index(ROW_ID)]
    _require((row_id.dtype, row_id.shape) == ("int64", ()), f"column {ROW_ID} is no int64 per row")
    shards = tuple(_parse_shard(columns, **shard) for shard in content["shards"])
    _require(len({shard.name for shard in shards}) == len(shards), "a shard is named twice")
    _require(type(content["seed"]) is int, f"seed {content['seed']!r}")
    return Index(columns, shards, content["seed"], str(content["split"]), dict(content["meta"]))


def _parse_column(name: str, dtype: str, shape: list[int], vocabulary: Any, statistics: Any) -> Column:
    _require(bool(_COLUMN_NAME.fullmatch(name)), f"column name {name!r}")
    _require(dtype in DTYPES, f"dtype {dtype!r}")
    _require(all(type(n) is int and n > 0 for n in shape) and math.prod(shape) < 2**31, f"shape {shape}")
    return Column(name, dtype, tuple(shape), vocabulary, statistics)


def _parse_shard(
    columns: tuple[Column, ...],
    name: str,
    bytes: int,
    sha256: str,
    rows: list[int],
    offsets: dict[str, Any],
    xxh3: dict[str, Any],
) -> Shard:
    _require(bool(_SHARD_NAME.fullmatch(name)), f"shard name {name!r}")
    _require(all(type(n) is int and n > 0 for n in rows), f"rows of {name}")
    _require(set(offsets) == set(xxh3) == {column.name for column in columns}, f"columns of {name}")
    for column in columns:
        places, row_bytes = offsets[column.name], math.prod(column.shape) * np.dtype(column.dtype).itemsize
        _require(len(places) == len(rows) == len(xxh3[column.name]), f"blocks of {name}")
        _require(all(type(n) is int and n >= 0 for n in places), f"offsets of {name}")
        _require(all(n + m * row_bytes < bytes for n, m in zip(places, rows)), f"blocks beyond the end of {name}")
    return Shard(
        name,
        bytes,
        sha256,
        tuple(rows),
        {column: tuple(places) for column, places in offsets.items()},
        {column: tuple(hashes) for column, hashes in xxh3.items()},
    )


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)
