"""`index.json`: what a shard folder holds. N always comes from here.

Versioned and self-hashed; every field's type and size is checked when it is read, so that a damaged or crafted index is
an error that names it, never a wrong row.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.data.store import atomic_write
from trainer.errors import UserError

FORMAT_VERSION = 1
ROW_ID = "row_id"
"""The int64 column of row numbers in the source, which every folder has and no model sees."""
INDEX_NAME = "index.json"
DTYPES = ("float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool", "uint16")
KINDS = ("dense", "csr", "ragged")
_COLUMN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_\-]+\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Column:
    """One column: ``shape`` is that of a row; ``vocabulary``: what the codes of a categorical column stand for.

    ``kind`` "csr": rows of ``shape`` (width,) of which only the entries that are not zero are stored, values of
    ``dtype``; "ragged": rows of varying numbers of entries, each of ``shape`` and ``dtype``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    vocabulary: list[Any] | None = None
    statistics: dict[str, Any] | None = None
    kind: str = "dense"

    @property
    def members(self) -> "tuple[Member, ...]":
        """What a block holds of it: itself; or for each row where its entries end, then the entries."""
        if self.kind == "dense":
            return (Member(self, False),)
        ends = Member(Column(f"{self.name}.ends", "int32"), False)
        if self.kind == "ragged":
            return ends, Member(Column(f"{self.name}.values", self.dtype, self.shape), True)
        indices = Column(f"{self.name}.indices", "uint16" if self.shape[0] <= 2**16 else "int32")
        return ends, Member(indices, True), Member(Column(f"{self.name}.values", self.dtype), True)


class Member(NamedTuple):
    """One array of a column in a block: a value for each row, or for each entry."""

    column: Column
    of_entries: bool


@dataclass(frozen=True)
class Shard:
    """One tar file: ``rows`` per block; per member and block its place (the header) and its hash.

    For csr and ragged columns also ``entries`` per block, and ``widest``: [j] is the most entries that 2^j rows have
    (or fewer, in a smaller block) that follow each other. ``numbers``: those that the names of its members give its
    blocks, where they do not count on from the shard before. ``first_id``: what is added to its row ids.
    """

    name: str
    bytes: int
    sha256: str
    rows: tuple[int, ...]
    offsets: dict[str, tuple[int, ...]]
    xxh3: dict[str, tuple[str, ...]]
    entries: dict[str, tuple[int, ...]] = field(default_factory=dict)
    widest: dict[str, tuple[int, ...]] = field(default_factory=dict)
    numbers: tuple[int, ...] = ()
    first_id: int = 0

    def part(self, blocks: Sequence[int], numbers: Sequence[int]) -> "Shard":
        """What is left with only ``blocks`` of its blocks, of those ``numbers`` [blocks] in all."""

        def kept(of_columns: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
            return {name: tuple(values[b] for b in blocks) for name, values in of_columns.items()}

        return replace(
            self,
            rows=tuple(self.rows[b] for b in blocks),
            offsets=kept(self.offsets),
            xxh3=kept(self.xxh3),
            entries=kept(self.entries),
            numbers=tuple(numbers[b] for b in blocks),
        )


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

    @cached_property
    def digest(self) -> str:
        """sha256 of the canonical JSON: the index hash that a checkpoint remembers."""
        return _digest(_content(self))

    @property
    def block_numbers(self) -> list[Sequence[int]]:
        """Of each shard, the numbers of its blocks in the names of its members."""
        found: list[Sequence[int]] = []
        first = 0
        for shard in self.shards:
            found.append(shard.numbers or range(first, first + len(shard.rows)))
            first += len(shard.rows)
        return found

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


def parse_index(data: bytes, path: str) -> Index:
    """The index in ``data``, checked. Raises UserError naming ``path``, from where it was read."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}): pack the table again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not an index: pack the table again.")
    if content.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {content.get('version')} where this program reads {FORMAT_VERSION}: "
            "pack the table again, or use the version that packed it."
        )
    given = content.pop("digest", None)
    digest = _digest(content)
    if given != digest:
        raise UserError(f"{path} does not match its own hash, so it was damaged or edited: pack the table again.")
    try:
        index = _parse(content)
        index.__dict__["digest"] = digest  # not taken anew: seconds, for a billion rows
        return index
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): pack the table again.") from None


def _content(index: Index) -> dict[str, Any]:
    content = {"version": FORMAT_VERSION, **asdict(index)}
    for column in content["columns"]:  # a table without them has the index, and the hash, that it always had
        if column["kind"] == "dense":
            del column["kind"]
    for shard in content["shards"]:
        if not shard["entries"]:
            del shard["entries"], shard["widest"]
        for name in ("numbers", "first_id"):
            if not shard[name]:
                del shard[name]
    # Tuples as lists, so that the hash of what is read is that of what was written.
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain


def _digest(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _parse(content: dict[str, Any]) -> Index:
    columns = tuple(_parse_column(**column) for column in content["columns"])
    names = [column.name for column in columns]
    _require(len(set(names)) == len(names), "a column is named twice")
    _require(ROW_ID in names, f"there is no column {ROW_ID}")
    _require(isinstance(content["shards"], list), "shards is not a list")
    row_id = columns[names.index(ROW_ID)]
    _require((row_id.dtype, row_id.shape) == ("int64", ()), f"column {ROW_ID} is no int64 per row")
    shards = tuple(_parse_shard(columns, **shard) for shard in content["shards"])
    _require(len({shard.name for shard in shards}) == len(shards), "a shard is named twice")
    _require(type(content["seed"]) is int, f"seed {content['seed']!r}")
    return Index(columns, shards, content["seed"], str(content["split"]), dict(content["meta"]))


def _parse_column(
    name: str, dtype: str, shape: list[int], vocabulary: Any, statistics: Any, kind: str = "dense"
) -> Column:
    _require(bool(_COLUMN_NAME.fullmatch(name)), f"column name {name!r}")
    _require(dtype in DTYPES, f"dtype {dtype!r}")
    _require(all(type(n) is int and n > 0 for n in shape) and math.prod(shape) < 2**31, f"shape {shape}")
    _require(kind in KINDS and (kind != "csr" or len(shape) == 1), f"kind {kind!r} of {name}")
    return Column(name, dtype, tuple(shape), vocabulary, statistics, kind)


def _parse_shard(  # noqa: PLR0913  the fields of a JSON object
    columns: tuple[Column, ...],
    name: str,
    bytes: int,
    sha256: str,
    rows: list[int],
    offsets: dict[str, Any],
    xxh3: dict[str, Any],
    entries: dict[str, Any] | None = None,
    widest: dict[str, Any] | None = None,
    numbers: Sequence[int] = (),
    first_id: int = 0,
) -> Shard:
    _require(bool(_SHARD_NAME.fullmatch(name)), f"shard name {name!r}")
    _require(bool(_SHA256.fullmatch(sha256)), f"sha256 of {name}")
    _require(type(bytes) is int, f"bytes of {name}")
    _require(all(type(n) is int and n > 0 for n in rows), f"rows of {name}")
    _require(len(numbers) in (0, len(rows)), f"numbers of {name}")
    _require(all(type(n) is int and 0 <= n < 10**8 for n in numbers), f"numbers of {name}")
    _require(type(first_id) is int and 0 <= first_id < 2**62, f"first_id of {name}")
    entries, widest = entries or {}, widest or {}
    varying = {column.name for column in columns if column.kind != "dense"}
    _require(set(entries) == set(widest) == varying, f"entries of {name}")
    for counts in (*entries.values(), *widest.values()):
        _require(all(type(n) is int and 0 <= n < 2**31 for n in counts), f"entries of {name}")
    _require(all(len(counts) > 0 for counts in widest.values()), f"entries of {name}")
    members = [(column, member) for column in columns for member in column.members]
    _require(set(offsets) == set(xxh3) == {member.column.name for _, member in members}, f"columns of {name}")
    for column, (part, of_entries) in members:
        places, row_bytes = offsets[part.name], math.prod(part.shape) * np.dtype(part.dtype).itemsize
        counts = entries[column.name] if of_entries else rows
        _require(len(places) == len(rows) == len(counts) == len(xxh3[part.name]), f"blocks of {name}")
        _require(all(type(n) is int and n >= 0 for n in places), f"offsets of {name}")
        _require(all(n + m * row_bytes < bytes for n, m in zip(places, counts)), f"blocks beyond the end of {name}")
    return Shard(
        name,
        bytes,
        sha256,
        tuple(rows),
        {column: tuple(places) for column, places in offsets.items()},
        {column: tuple(hashes) for column, hashes in xxh3.items()},
        {column: tuple(counts) for column, counts in entries.items()},
        {column: tuple(counts) for column, counts in widest.items()},
        tuple(numbers),
        first_id,
    )


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)
