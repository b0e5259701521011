"""Where the splits of a shard folder lie, on this machine or at an address."""

from pathlib import Path

from trainer.data.address import Place, is_address
from trainer.data.shards.cache import RemoteFiles, ShardCache
from trainer.data.shards.files import Files, LocalFiles
from trainer.data.shards.index import INDEX_NAME
from trainer.data.shards.remote import Store
from trainer.errors import UserError


def split_of(place: Place, split: str, cache: ShardCache | None) -> Files | None:
    """The files of a split, or None where the folder has none of it. Raises UserError for what is no shard folder."""
    files = {name: _files(place, name, cache) for name in (split, "", "train")}
    if files[split].exists() or Path(place, split).is_dir():
        return files[split]
    if files[""].exists():
        # A split's own folder, given by itself, is what is asked for: to train on, or (in `train`) nothing held out.
        return files[""] if split == "train" or files[""].index().split == split else None
    if not files["train"].exists():
        if "://" not in str(place) and not Path(place).exists():
            raise UserError(f"there is no shard folder at {place}: make one by svi shard source=TABLE out={place}")
        raise UserError(
            f"{place} is not a shard folder (it holds no {INDEX_NAME}): svi shard source=TABLE out=DIR packs one"
        )
    return None


def split_files(place: Place, cache: ShardCache | None = None) -> list[Files]:
    """The files of each split of a folder or an address, or its own. Raises UserError where there is no index."""
    own = _files(place, "", cache)
    if own.exists():
        return [own]
    splits = [(name, _files(place, name, cache)) for name in ("train", "held_out")]
    if not any(files.exists() for _, files in splits):
        raise UserError(f"data.path={place} is not a shard folder: it holds no {INDEX_NAME}.")
    return [files for name, files in splits if files.exists() or Path(place, name).is_dir()]


def is_packed(place: Place, cache: ShardCache | None = None) -> bool:
    """Whether a folder or an address holds an index, for itself or for its training split."""
    return any(_files(place, name, cache).exists() for name in ("train", ""))


def _files(place: Place, name: str, cache: ShardCache | None) -> Files:
    """Those of the folder ``name`` of ``place``, or of itself."""
    if not is_address(place):
        return LocalFiles(Path(place) / name)
    cache = cache or ShardCache()
    store = Store(str(place), cache.timeout)
    return RemoteFiles(store / name if name else store, cache)
