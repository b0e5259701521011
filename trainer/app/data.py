"""The data that a config names: `data.path`, a place or a list of them, and, for an address, `data.cache`."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from trainer.data.shards.cache import ShardCache
from trainer.data.shards.folder import TIMEOUT, ShardFolder, open_split
from trainer.data.shards.read_thread import Reading, within
from trainer.errors import UserError


def places(path: Any) -> list[str]:
    """The folders or addresses (or tables) that ``path`` names. Raises UserError where it names none."""
    found = [str(each) for each in path] if isinstance(path, Sequence) and not isinstance(path, str) else [str(path)]
    if not found:
        raise UserError("data.path=[] names no folder: give one, or several in brackets.")
    return found


def training_split(data: DictConfig) -> ShardFolder:
    """The training split of a shard folder, or of several together. Raises UserError where there is none."""
    folder = _opened(data, "train")
    if folder is None:
        raise UserError(f"data.path={data.path} is no shard folder: pack one with svi shard source=TABLE out=DIR")
    return folder


def held_out_split(data: DictConfig) -> ShardFolder | None:
    """The rows that were held out, if there are any."""
    return _opened(data, "held_out")


def _opened(data: DictConfig, split: str) -> ShardFolder | None:
    timeout, several = float(data.get("timeout", TIMEOUT)), places(data.path)
    began, check = time.monotonic(), data.get("on_corrupt", "error") == "error"

    def reading(thread: int) -> Reading:
        return Reading(f"data.path={data.path}", time.monotonic() - began)

    folder = within(timeout, reading, lambda: open_split(several, split, cache_of(data), check))
    if folder is not None:
        folder.timeout = timeout
    return folder


def cache_of(data: DictConfig) -> ShardCache:
    """Where shards of an address are kept. Raises UserError for settings that cannot be."""
    given = data.cache
    for name in ("bytes", "timeout"):
        if given[name] is not None and not float(given[name]) > 0:
            raise UserError(f"data.cache.{name}={given[name]} must be more than 0.")
    limit = None if given.bytes is None else int(given.bytes)
    return ShardCache(None if given.dir is None else Path(str(given.dir)), limit, float(given.timeout))
