"""Verifying: each byte of a shard counts, and all bad shards are named, each with its block."""

import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from shard_tools import flip, sign, write_folder

from trainer.data.shards.files import read_index
from trainer.data.shards.folder import ShardFolder
from trainer.data.shards.tar import RECORD, member_name, padding, tar_header
from trainer.data.shards.verify import verify
from trainer.errors import UserError

COLUMNS = {"x": np.arange(24, dtype=np.float32).reshape(12, 2)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of the same size, of two blocks each."""
    index = write_folder(tmp_path / "train", COLUMNS, [2] * 6, shard_bytes=4096)
    assert [len(shard.rows) for shard in index.shards] == [2, 2, 2]
    assert len({shard.bytes for shard in index.shards}) == 1
    return tmp_path / "train"


def test_an_intact_folder(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify(folder, lambda done, total: seen.append((done, total)))
    assert (report.shards, report.blocks, report.rows, report.damaged) == (3, 6, 12, ())
    assert seen == [(4, 12), (8, 12), (12, 12)]


def test_every_flipped_byte_is_found_and_its_shard_and_block_named(folder: Path) -> None:
    """Of the second shard: tar headers, `.npy` headers, values, the zeros after them and those at the end."""
    shard = read_index(folder).shards[1]
    path = folder / shard.name
    whole = path.read_bytes()
    places = sorted((place, 2 + b, name) for name, starts in shard.offsets.items() for b, place in enumerate(starts))
    expected = {}
    for (start, block, name), (end, _, _) in zip(places, [*places[1:], (len(whole) - 2 * RECORD, 0, "")]):
        expected.update(dict.fromkeys(range(start, end), f'{path}, block {block}, column "{name}" '))
    expected.update(dict.fromkeys(range(end, len(whole)), f"{path} does not match its sha256 outside its blocks"))
    assert expected.keys() == set(range(len(whole)))
    kinds = set()
    for place, start_of_sentence in expected.items():
        flip(path, place, 1 << place % 8)
        report = verify(folder)
        path.write_bytes(whole)
        assert (report.shards, report.blocks, report.rows, len(report.damaged)) == (2, 4, 8, 1)
        assert report.damaged[0].startswith(f"shard {start_of_sentence}")
        kinds.add(re.sub(r".*(header|hash|sha256).*", r"\1", report.damaged[0]))
    assert kinds == {"header", "hash", "sha256"}
    assert not verify(folder).damaged


def swap(folder: Path) -> None:
    os.rename(folder / "000000.tar", folder / "x")
    os.rename(folder / "000002.tar", folder / "000000.tar")
    os.rename(folder / "x", folder / "000002.tar")


def directory(folder: Path) -> None:
    (folder / "000001.tar").unlink()
    (folder / "000001.tar").mkdir()


DAMAGE: list[tuple[Callable[[Path], object], dict[str, str]]] = [
    (lambda f: os.truncate(f / "000001.tar", 3000), {"000001.tar": "has 3,000 bytes where the index says"}),
    (lambda f: os.truncate(f / "000001.tar", 0), {"000001.tar": "has 0 bytes where the index says"}),
    (lambda f: os.truncate(f / "000001.tar", 10**4), {"000001.tar": "has 10,000 bytes where the index says"}),
    (lambda f: (f / "000001.tar").unlink(), {"000001.tar": "is missing"}),
    (lambda f: (f / "000001.tar").write_bytes(bytes(5120)), {"000001.tar": ', block 2, column "x" has a header'}),
    (directory, {"000001.tar": "bytes where the index says"}),
    (swap, {"000000.tar": ', block 0, column "x" has a header', "000002.tar": ', block 4, column "x" has a header'}),
    (lambda f: shutil.copy(f / "000000.tar", f / "000002.tar"), {"000002.tar": ', block 4, column "x" has a header'}),
]


@pytest.mark.parametrize(("damage", "expected"), DAMAGE)
def test_whole_shards_gone_wrong(folder: Path, damage: Callable[[Path], object], expected: dict[str, str]) -> None:
    damage(folder)
    report = verify(folder)
    assert len(report.damaged) == len(expected)
    for sentence, (shard, reason) in zip(report.damaged, expected.items()):
        assert str(folder / shard) in sentence
        assert reason in sentence
        assert sentence.endswith(".")
        assert "\n" not in sentence
    assert report.shards == 3 - len(expected)
    if "bytes where" in reason or "missing" in reason:  # noticed before any training
        with pytest.raises(UserError) as error:
            ShardFolder(folder)
        assert str(error.value) == report.damaged[0]


def test_all_bad_shards_are_reported(folder: Path) -> None:
    flip(folder / "000000.tar", 2 * 1024 + 700)
    (folder / "000001.tar").unlink()
    os.truncate(folder / "000002.tar", 9)
    report = verify(folder)
    assert [re.findall(r"\d{6}\.tar", sentence) for sentence in report.damaged] == [[f"00000{i}.tar"] for i in range(3)]
    assert ', block 1, column "x" does not match its hash' in report.damaged[0]
    assert (report.shards, report.rows) == (0, 0)


def test_a_damaged_index_is_reported(folder: Path) -> None:
    flip(folder / "index.json", 100, 1)
    report = verify(folder)
    assert report.rows == 0
    assert len(report.damaged) == 1
    assert str(folder / "index.json") in report.damaged[0]


@pytest.mark.parametrize("forged_hash", [False, True])
def test_a_pickle_in_a_member_is_never_loaded(folder: Path, forged_hash: bool) -> None:
    """An `.npy` of objects, whose pickle would leave a mark, in place of a block; even with the hash that it has."""
    mark = folder / "mark"

    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (mark,))

    file = io.BytesIO()
    np.save(file, np.array([Evil(), None], dtype=object), allow_pickle=True)
    data = file.getvalue()
    assert len(data) <= 512
    np.load(io.BytesIO(data), allow_pickle=True)
    assert mark.exists()  # the pickle works
    mark.unlink()
    member = tar_header(member_name(0, "x"), len(data)) + data + bytes(padding(len(data)))
    path = folder / "000000.tar"
    path.write_bytes(member + path.read_bytes()[len(member) :])
    if forged_hash:
        content = json.loads((folder / "index.json").read_text())
        content["shards"][0]["xxh3"]["x"][0] = xxhash.xxh3_64_hexdigest(member)
        sign(folder, content)
    assert '000000.tar, block 0, column "x" has a header that is not what the index says' in verify(folder).damaged[0]
    with pytest.raises(UserError, match="block 0"):
        ShardFolder(folder).read_block(0, "x")
    assert not mark.exists()
