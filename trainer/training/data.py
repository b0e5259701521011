"""The data that a config names: `data.path`, a place or a list of them, and, for an address, `data.cache`."""

import time
from collections.abc import Sequence
from pathlib import Path

from trainer.data.shards.cache import ShardCache
from trainer.data.shards.folder import TIMEOUT, ShardFolder, open_split
from trainer.data.shards.read_thread import Reading, within
from trainer.data.shards.splits import is_packed
from trainer.errors import UserError
from trainer.options.kinds import shown
from trainer.options.verbs import Data, TrainData


def places(path: str | Sequence[str]) -> list[str]:
    """The folders or addresses (or tables) that ``path`` names."""
    return [path] if isinstance(path, str) else list(path)


def training_split(data: Data) -> ShardFolder:
    """The training split of a shard folder, or of several together. Raises UserError where there is none."""
    folder = _opened(data, "train")
    if folder is None:
        raise UserError(
            f"data.path={shown(data.path)} is not a shard folder: pack one with svi shard source=TABLE out=DIR"
        )
    return folder


def held_out_split(data: Data) -> ShardFolder | None:
    """The rows that were held out, if there are any."""
    return _opened(data, "held_out")


def _opened(data: Data, split: str) -> ShardFolder | None:
    several, began = places(data.path), time.monotonic()
    timeout, check = (data.timeout, data.on_corrupt == "error") if isinstance(data, TrainData) else (TIMEOUT, True)

    def reading(_thread: int) -> Reading:
        return Reading(f"data.path={shown(data.path)}", time.monotonic() - began)

    folder = within(timeout, reading, lambda: open_split(several, split, cache_of(data), check))
    if folder is not None:
        folder.timeout = timeout
    return folder


def cache_of(data: Data) -> ShardCache:
    """Where shards of an address are kept."""
    return ShardCache(None if data.cache.dir is None else Path(data.cache.dir), data.cache.bytes, data.cache.timeout)


def table_or_split(data: Data) -> ShardFolder | str:
    """The training split of shard folders, or the place of one table.

    Raises UserError for several places of which one is a table.
    """
    several = places(data.path)
    packed = [is_packed(place, cache_of(data)) for place in several]
    if len(several) > 1 and not all(packed):
        raise UserError(f"{several[packed.index(False)]} is a table: give one table at a time, or pack them.")
    return training_split(data) if packed[0] else several[0]
