"""Every byte of a shard folder against its index."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from trainer.data.reader import ShardFolder
from trainer.errors import UserError


@dataclass(frozen=True)
class Report:
    """What was checked and found intact."""

    shards: int
    blocks: int
    rows: int


def verify(folder: ShardFolder, progress: Callable[[int, int], None] | None = None) -> Report:
    """Checks every member's headers and hash and every shard's sha256 (so the bytes between members too).

    ``progress``: called with (rows done, rows in all). Raises UserError naming the first bad shard, and block.
    """
    block = done = 0
    for shard in folder.index.shards:
        for rows in shard.rows:
            for column in folder.index.columns:
                folder.read_block(block, column.name)
            block, done = block + 1, done + rows
            if progress is not None:
                progress(done, folder.num_rows)
        with (folder.path / shard.name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                raise UserError(
                    f"shard {folder.path / shard.name} does not match its sha256 outside its blocks: "
                    "copy the shard again, or pack the table again."
                )
    return Report(len(folder.index.shards), block, done)
