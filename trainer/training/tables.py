"""Tables that a run is given in place of shards: packed on the way, once."""

import contextlib
import errno
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock
from rich.console import Console

from trainer.data.address import is_address
from trainer.data.fields import choose
from trainer.data.packing.ingest import WEIGHT
from trainer.data.packing.pack import pack
from trainer.data.shards.cache import ShardCache
from trainer.data.shards.index import INDEX_NAME
from trainer.data.shards.splits import is_packed
from trainer.data.sources.source import open_source
from trainer.errors import UserError
from trainer.training.columns_line import columns_line


def shards_of(paths: Sequence[str], console: Console, cache: ShardCache, weight: str | None = None) -> list[str]:
    """The shard folders of ``paths``: themselves, or the folder beside each into which its table is packed, once, with
    the columns and codes of those before it.

    ``weight``: the column of a table that says how many observations a row stands for; a folder of its own has it.
    Raises UserError where a table has changed since.
    """
    found: list[str] = []
    for path in paths:
        found.append(_shards_of(path, found, console, cache, weight))
    return found


def _shards_of(path: str, like: list[str], console: Console, cache: ShardCache, weight: str | None) -> str:
    remote, here = is_address(path), Path(path)
    if is_packed(path, cache) or not (remote or here.is_file() or any(here.rglob("*.parquet"))):
        return path  # a shard folder, or nothing: whoever opens it says so
    ending = ".shards" if weight in (None, WEIGHT) else f".weight-{weight}.shards"
    out = Path(path.rstrip("/").rpartition("/")[2] + ending) if remote else here.with_name(here.name + ending)
    index = out / "train" / INDEX_NAME
    if not out.is_dir():
        columns = None if like or weight in (None, WEIGHT) else _weighted(path, weight)
        with _lock_beside(path, out):
            if not out.is_dir():
                console.print(f"packing {path} into {out}, this once (svi shard chooses columns, splits and more)")
                train, _ = pack(path, out, columns=columns, spare=not like, like=list(like) or None)
                console.print(columns_line(train))
    elif not remote and index.is_file() and _changed(here) > index.stat().st_mtime:
        raise UserError(f"{path} has changed since it was packed: remove {out} to pack it again, or train on {out}.")
    return str(out)


def _weighted(path: str, weight: str) -> dict[str, str]:
    """The columns of a table by their own names, and those of ``weight`` as weights."""
    fields = open_source(path).fields
    choose([weight], list(fields), path)
    return {**{name: name for name in fields}, WEIGHT: weight}


@contextlib.contextmanager
def _lock_beside(path: str, out: Path) -> Iterator[None]:
    """Holds the lock of ``out``. Raises UserError where nothing may be written."""
    lock = FileLock(f"{out}.lock")
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise UserError(
            f"{out} cannot be written ({error.strerror}): pack it elsewhere (svi shard source={path} out=DIR), and "
            "give data.path=DIR."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _changed(table: Path) -> float:
    """When a table was changed last: a file, or anything in a folder."""
    return max(each.stat().st_mtime for each in (table, *table.rglob("*")))
