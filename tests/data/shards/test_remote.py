"""Shards from real servers that fail in every way: the right rows or a sentence, and a cache that holds only what is
right."""

import errno
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from servers import Faulty, faulty, nginx, s3
from shard_tools import all_dtypes, flip, write_folder

from trainer.data.plan import Mixing, Plan
from trainer.data.shards import remote
from trainer.data.shards.cache import RemoteFiles, ShardCache
from trainer.data.shards.files import AHEAD
from trainer.data.shards.folder import ShardFolder, open_split
from trainer.data.shards.reader import Reader
from trainer.data.shards.remote import Store
from trainer.data.shards.splits import is_packed
from trainer.errors import UserError

BLOCKS = [4, 7, 5, 6, 2, 8, 3, 5]
ROWS = sum(BLOCKS)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause before the next attempt."""
    monkeypatch.setattr(remote, "_PAUSE", 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two splits, the training one of several shards."""
    write_folder(tmp_path / "packed" / "train", all_dtypes(ROWS), BLOCKS, shard_bytes=15_000)
    write_folder(tmp_path / "packed" / "held_out", all_dtypes(9), [9], split="held_out", first_id=100)
    return tmp_path / "packed"


@pytest.fixture
def server(folder: Path) -> Iterator[Faulty]:
    with faulty(folder) as made:
        yield made


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", timeout=20.0)


def rows_of(folder: ShardFolder) -> list[bytes]:
    """Every byte of every column."""
    return [folder.read_block(b, c.name).tobytes() for b in range(len(folder.block_rows)) for c in folder.index.columns]


def remote_folder(server: Faulty, cache: ShardCache) -> ShardFolder:
    found = open_split(server.url, "train", cache)
    assert found is not None
    return found


def test_a_web_server_and_a_bucket_give_the_rows_of_the_folder(folder: Path, cache: ShardCache, tmp_path: Path) -> None:
    want = rows_of(ShardFolder(folder / "train"))
    with nginx(folder, tmp_path) as url:
        for split in ("train", "held_out"):
            found = open_split(url, split, cache)
            assert found is not None
            assert rows_of(found) == rows_of(ShardFolder(folder / split))
        assert is_packed(url)
        assert open_split(f"{url}/train", "held_out", cache) is None
        with pytest.raises(UserError, match=r"/nowhere is not a shard folder"):
            open_split(f"{url}/nowhere", "train", cache)
    with s3() as system:
        system.mkdir("bucket")
        system.put(str(folder), "bucket/packed", recursive=True)
        fresh = ShardCache(tmp_path / "another")
        found = open_split("s3://bucket/packed", "train", fresh)
        assert found is not None
        assert rows_of(found) == want
        with pytest.raises(UserError, match="s3://bucket/none is not a shard folder"):
            open_split("s3://bucket/none", "train", fresh)


def test_a_reader_keeps_to_the_limit_and_holds_few_files(tmp_path: Path) -> None:
    """200 shards, of which ten fit: two epochs, in an order that needs all of them at any time."""
    write_folder(tmp_path / "train", {"x": np.arange(400)}, [2] * 200, shard_bytes=1)
    near = ShardFolder(tmp_path / "train")
    cache = ShardCache(tmp_path / "cache", 10 * max(shard.bytes for shard in near.index.shards))
    files = RemoteFiles(Store(f"file://{tmp_path}/train"), cache)
    far = ShardFolder(files)
    assert far.open_at_once == 10 - AHEAD
    plan = Plan(near.block_rows, 0, 2, 4)
    reader = Reader(far, plan, ["x"], [[0, 1]])
    seen, most = [], 0
    for step in range(0, plan.steps_per_epoch, 2):
        chunk = reader.chunk(step, 2)
        seen += [int(x) for k in range(2) for x in chunk.columns["x"][k, 0, : chunk.valid[k, 0]]]
        most = max(most, len(list((tmp_path / "cache").glob("*.tar"))))
    assert sorted(seen) == list(range(400))
    assert most <= 10
    assert len(files._coming) <= AHEAD
    reader.close()


@pytest.mark.parametrize("fault", ["503", "drop", "short", "flip", "slow"])
def test_what_goes_wrong_once_is_tried_again(folder: Path, server: Faulty, cache: ShardCache, fault: str) -> None:
    cache.timeout = 2.0
    shard = ShardFolder(folder / "train").index.shards[1].name
    server.faults = {"index.json": [fault] if fault in ("503", "drop", "slow") else [], shard: [fault]}
    assert rows_of(remote_folder(server, cache)) == rows_of(ShardFolder(folder / "train"))
    assert not any(server.faults.values())
    assert not list(cache.folder.glob("*.part"))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("503", r"/train/000001.tar cannot be read \(503"),
        ("drop", r"/train/000001.tar cannot be read \("),
        ("short", r"/train/000001.tar ends after [\d,]+ bytes where the index says [\d,]+, in block \d+ of it"),
        ("flip", r"/train/000001.tar does not match its sha256, block 0 of it, column \"float32\", 3 times"),
        ("slow", r"/train/000001.tar cannot be read \(nothing came in 0.2 s\)"),
    ],
)
def test_what_stays_wrong_is_an_error_that_names_the_shard(
    server: Faulty, cache: ShardCache, fault: str, said: str
) -> None:
    opened = remote_folder(server, cache)
    opened.files.store.timeout = 0.2 if fault == "slow" else 20.0
    server.faults = {"000001.tar": [fault] * 99}
    first = len(opened.index.shards[0].rows)
    with pytest.raises(UserError, match=said):
        opened.read_block(first, "row_id")
    assert opened.read_block(0, "row_id").tolist() == list(range(BLOCKS[0]))
    assert [path.suffix for path in cache.folder.iterdir() if path.suffix != ".lock"] == [".tar"]


def test_a_missing_shard_and_a_missing_library_are_named(
    folder: Path, server: Faulty, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = remote_folder(server, cache)
    (folder / "train" / "000000.tar").unlink()
    with pytest.raises(UserError, match=r"/train/000000.tar is missing: put it there again"):
        opened.read_block(0, "row_id")
    with pytest.raises(UserError, match="nosuch://x is not a readable address"):
        Store("nosuch://x").read("index.json")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(UserError, match=r"needs a library that is not installed .*pip install 'svi-trainer\[remote\]'"):
        Store(server.url).read("index.json")


def test_a_shard_is_fetched_once_by_all(folder: Path, server: Faulty, cache: ShardCache) -> None:
    """Four threads with caches of their own in the same folder, as four ranks of a node have."""
    caches = [ShardCache(cache.folder) for _ in range(4)]
    opened = [open_split(f"{server.url}/train", "train", each) for each in caches]
    server.asked.clear()
    found: list[list[bytes]] = []
    threads = [threading.Thread(target=lambda one=one: found.append(rows_of(one))) for one in opened]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [rows_of(ShardFolder(folder / "train"))] * 4
    assert sorted(server.asked) == [shard.name for shard in opened[0].index.shards]
    assert rows_of(remote_folder(server, cache)) == found[0]
    assert server.asked.count("000000.tar") == 1


def test_files_of_the_same_name_are_told_apart(folder: Path, server: Faulty, cache: ShardCache) -> None:
    train, held_out = (open_split(server.url, split, cache) for split in ("train", "held_out"))
    assert train.index.shards[0].name == held_out.index.shards[0].name
    assert rows_of(train) == rows_of(ShardFolder(folder / "train"))
    assert rows_of(held_out) == rows_of(ShardFolder(folder / "held_out"))


def test_the_least_recently_used_goes_and_what_is_in_use_stays(server: Faulty, cache: ShardCache) -> None:
    opened = remote_folder(server, cache)
    shards = opened.index.shards
    assert len(shards) >= 5
    cache.limit = sum(shard.bytes for shard in shards[:3])
    store = Store(f"{server.url}/train")
    held = cache.open(shards[0], store)
    for age, shard in enumerate(shards[:3]):
        cache.open(shard, store)
        os.utime(cache.folder / f"{shard.sha256}.tar", (age, age))
    kept = lambda: [(cache.folder / f"{shard.sha256}.tar").exists() for shard in shards[:5]]  # noqa: E731
    cache.open(shards[3], store)
    assert kept() == [True, False, True, True, False]  # the oldest is held, the next one goes
    del held
    cache.open(shards[4], store)
    assert kept()[0] is False


def test_a_part_of_a_killed_process_goes(server: Faulty, cache: ShardCache) -> None:
    cache.folder.mkdir()
    (cache.folder / "0.part").write_bytes(b"half")
    remote_folder(server, cache).read_block(0, "row_id")
    assert not (cache.folder / "0.part").exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_file_that_goes_bad_in_the_cache_is_fetched_again(
    folder: Path, server: Faulty, cache: ShardCache, damage: str
) -> None:
    shard = remote_folder(server, cache).index.shards[1]
    rows_of(remote_folder(server, cache))
    path = cache.folder / f"{shard.sha256}.tar"
    if damage == "flip":
        flip(path, shard.offsets["float32"][0] + 1000)
    else:
        os.truncate(path, 1000 if damage == "cut" else 0)
    assert rows_of(remote_folder(server, cache)) == rows_of(ShardFolder(folder / "train"))


def test_a_full_disk_is_named(server: Faulty, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    opened = remote_folder(server, cache)
    monkeypatch.setattr("trainer.data.shards.cache.os.fsync", full)
    with pytest.raises(UserError, match=r"no space is left for shards in .*cache: free some, or give another folder"):
        opened.read_block(0, "row_id")
    assert not list(cache.folder.glob("*.part"))


def test_chunks_from_afar_are_those_of_the_folder(folder: Path, server: Faulty, cache: ShardCache) -> None:
    """With a cache that holds half of the shards, and a fault ahead of need that stays."""
    near = ShardFolder(folder / "train")
    cache.limit = sum(shard.bytes for shard in near.index.shards) // 2
    far = remote_folder(server, cache)
    plan = Plan(near.block_rows, 3, 2, 10, Mixing(run_rows=2, shard_of=near.shard_of, shards_together=2))
    readers = [Reader(each, plan, ["float32", "int8"], [[0, 1]], with_row_id=True) for each in (near, far)]
    spans = [(first, 2) for first in range(0, 2 * plan.steps_per_epoch, 2)]
    for one, other in zip(*(reader.chunks(spans) for reader in readers), strict=True):
        assert np.array_equal(one.row_id, other.row_id)
        for name in ("float32", "int8"):
            assert one.columns[name].tobytes() == other.columns[name].tobytes()
    for reader in readers:
        reader.close()
