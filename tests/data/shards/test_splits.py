"""Where the splits of a folder lie, and the sentences for what is no shard folder."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from shard_tools import write_folder

from trainer.data.shards.cache import ShardCache
from trainer.data.shards.splits import is_packed, split_files, split_of
from trainer.errors import UserError


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    for split, rows in (("train", 3), ("held_out", 2)):
        write_folder(tmp_path / "p" / split, {"x": np.zeros(rows)}, [rows], split=split)
    return tmp_path / "p"


@pytest.fixture(params=["folder", "address"])
def place(request: pytest.FixtureRequest, packed: Path) -> Iterator[Path | str]:
    """The same as a path and as an address."""
    if request.param == "folder":
        yield packed
        return
    system = fsspec.filesystem("memory")
    system.put(str(packed), "/splits", recursive=True)
    yield "memory://splits"
    system.rm("/splits", recursive=True)


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache")


def below(place: Path | str, name: str) -> Path | str:
    return f"{place}/{name}" if isinstance(place, str) else place / name


def test_a_split_is_found_below_its_folder(place: Path | str, cache: ShardCache) -> None:
    for split, rows in (("train", 3), ("held_out", 2)):
        files = split_of(place, split, cache)
        assert files is not None
        assert (files.index().split, files.index().num_rows) == (split, rows)
        assert files.place.endswith(split)


def test_a_splits_own_folder_is_what_is_asked_for(place: Path | str, cache: ShardCache) -> None:
    """To train on, any; but `train` by itself has nothing held out."""
    for split in ("train", "held_out"):
        files = split_of(below(place, split), "train", cache)
        assert files is not None
        assert files.index().split == split
    held = split_of(below(place, "held_out"), "held_out", cache)
    assert held is not None
    assert held.index().num_rows == 2
    assert split_of(below(place, "train"), "held_out", cache) is None


def test_all_splits_or_its_own(place: Path | str, cache: ShardCache) -> None:
    assert [files.index().split for files in split_files(place, cache)] == ["train", "held_out"]
    assert [files.index().split for files in split_files(below(place, "held_out"), cache)] == ["held_out"]


def test_what_is_packed(place: Path | str, cache: ShardCache, tmp_path: Path) -> None:
    assert is_packed(place, cache)
    assert is_packed(below(place, "held_out"), cache)
    assert not is_packed(below(place, "nothing"), cache)
    assert not is_packed(tmp_path)


def test_without_rows_held_out_there_is_no_such_split(tmp_path: Path) -> None:
    write_folder(tmp_path / "p" / "train", {"x": np.zeros(3)}, [3])
    assert split_of(tmp_path / "p", "held_out", None) is None
    assert [files.index().split for files in split_files(tmp_path / "p")] == ["train"]


def test_a_split_without_its_index_is_not_passed_over(packed: Path) -> None:
    """It was held out once: an error when it is read, and not a run without it."""
    (packed / "held_out" / "index.json").unlink()
    for files in (split_of(packed, "held_out", None), split_files(packed)[1]):
        assert files is not None
        with pytest.raises(UserError, match=r"held_out.index\.json is missing"):
            files.index()


def test_what_is_no_shard_folder_is_named(tmp_path: Path, cache: ShardCache) -> None:
    with pytest.raises(UserError, match=r"there is no shard folder at .*none: make one by svi shard"):
        split_of(tmp_path / "none", "train", None)
    for place in (tmp_path, "memory://none"):
        with pytest.raises(UserError, match=r"is not a shard folder \(it holds no index\.json\)"):
            split_of(place, "held_out", cache)
        with pytest.raises(UserError, match=r"data\.path=.* is not a shard folder"):
            split_files(place, cache)
