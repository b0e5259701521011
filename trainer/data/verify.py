"""Every byte of a shard folder against its index."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.data.index import Shard
from trainer.data.reader import ShardFolder
from trainer.errors import UserError


@dataclass(frozen=True)
class Report:
    """What was found intact, and a sentence for each shard that is not (or for the index)."""

    shards: int
    blocks: int
    rows: int
    damaged: tuple[str, ...]


def verify(path: Path, progress: Callable[[int, int], None] | None = None) -> Report:
    """Checks every member's headers and hash and every shard's sha256 (so the bytes between members too).

    A bad shard is named with its first bad block, and the others are checked still. ``progress``: called after each
    shard with (rows done, rows in all).
    """
    try:
        folder = ShardFolder(path, check=False)
    except UserError as error:
        return Report(0, 0, 0, (str(error),))
    shards = blocks = rows = first = done = 0
    damaged = []
    for shard in folder.index.shards:
        try:
            _check(folder, shard, first)
        except UserError as error:
            damaged.append(str(error))
        else:
            shards, blocks, rows = shards + 1, blocks + len(shard.rows), rows + sum(shard.rows)
        first, done = first + len(shard.rows), done + sum(shard.rows)
        if progress is not None:
            progress(done, folder.num_rows)
    return Report(shards, blocks, rows, tuple(damaged))


def _check(folder: ShardFolder, shard: Shard, first: int) -> None:
    """Raises UserError where ``shard``, whose blocks start at number ``first``, is not what the index says."""
    folder.check_size(shard)
    for block in range(first, first + len(shard.rows)):
        for column in folder.index.columns:
            folder.read_block(block, column.name)
    with (folder.path / shard.name).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            raise UserError(
                f"shard {folder.path / shard.name} does not match its sha256 outside its blocks: "
                "copy the shard again, or pack the table again."
            )
