"""Every kind of damage, wherever shards are: an error that names the shard, and the block where it lies in one; never a
wrong row. What goes bad in the cache is fetched again."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import faulty, s3
from shard_tools import csr, flip, sign, write_folder

from trainer.data.plan import Mixing, Plan
from trainer.data.shards import remote
from trainer.data.shards.cache import RemoteFiles, ShardCache
from trainer.data.shards.files import LocalFiles, read_index
from trainer.data.shards.folder import ShardFolder
from trainer.data.shards.reader import Reader
from trainer.data.shards.remote import Store
from trainer.data.shards.tar import RECORD
from trainer.data.shards.verify import verify
from trainer.errors import UserError

ROWS = 12
COLUMNS = {
    "x": np.arange(24, dtype=np.float32).reshape(ROWS, 2),
    "y": -np.arange(24, dtype=np.float32).reshape(ROWS, 2),
    "words": csr(ROWS),
}
BAD = "000001.tar"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of two blocks each."""
    folder = tmp_path_factory.mktemp("whole") / "train"
    index = write_folder(folder, COLUMNS, [2] * 6, shard_bytes=16_000)
    assert [len(shard.rows) for shard in index.shards] == [2, 2, 2]
    return folder


def at(folder: Path, column: str, block: int = 1) -> int:
    """The first byte of a member of the second shard."""
    return read_index(folder).shards[1].offsets[column][block]


def rewritten(folder: Path, change: Callable[[bytearray], Any]) -> None:
    data = bytearray((folder / BAD).read_bytes())
    changed = change(data)
    (folder / BAD).write_bytes(data if changed is None else changed)


def flip_payload(folder: Path) -> str:
    flip(folder / BAD, at(folder, "x") + RECORD + 128 + 3, 1)
    return "block"


def flip_tar_header(folder: Path) -> str:
    flip(folder / BAD, at(folder, "y") + 100, 1)
    return "block"


def flip_npy_header(folder: Path) -> str:
    flip(folder / BAD, at(folder, "words.values") + RECORD + 20, 1)
    return "block"


def flip_padding(folder: Path) -> str:
    flip(folder / BAD, at(folder, "y") - 1, 1)
    return "block"


def flip_where_a_sparse_row_ends(folder: Path) -> str:
    flip(folder / BAD, at(folder, "words.ends") + RECORD + 128, 1)
    return "block"


def cut_in_a_member(folder: Path) -> str:
    rewritten(folder, lambda data: data[: at(folder, "x") + RECORD + 130])
    return "block"


def cut_at_a_member(folder: Path) -> str:
    rewritten(folder, lambda data: data[: at(folder, "x")])
    return "block"


def cut_at_a_record(folder: Path) -> str:
    rewritten(folder, lambda data: data[: at(folder, "y") + RECORD])
    return "block"


def without_the_end_of_the_archive(folder: Path) -> str:
    rewritten(folder, lambda data: data[: -2 * RECORD])
    return "shard"


def empty(folder: Path) -> str:
    rewritten(folder, lambda data: b"")
    return "shard"


def zeroed_hole(folder: Path) -> str:
    start = at(folder, "x")
    rewritten(folder, lambda data: data.__setitem__(slice(start, start + 2 * RECORD), bytes(2 * RECORD)))
    return "block"


def swapped_shards(folder: Path) -> str:
    os.rename(folder / "000000.tar", folder / "t")
    os.rename(folder / BAD, folder / "000000.tar")
    os.rename(folder / "t", folder / BAD)
    return "shard"  # of other sizes or other hashes


def swapped_columns(folder: Path) -> str:
    x, y, size = at(folder, "x"), at(folder, "y"), at(folder, "y") - at(folder, "x")

    def swap(data: bytearray) -> None:
        data[x : x + size], data[y : y + size] = data[y : y + size], data[x : x + size]

    rewritten(folder, swap)
    return "block"


def duplicate_member(folder: Path) -> str:
    x, first, size = at(folder, "x"), at(folder, "x", 0), at(folder, "y") - at(folder, "x")
    rewritten(folder, lambda data: data.__setitem__(slice(x, x + size), data[first : first + size]))
    return "block"


def pickle_in_a_member(folder: Path) -> str:
    place = at(folder, "x") + RECORD
    header = (
        b"\x93NUMPY\x01\x00"
        + (118).to_bytes(2, "little")
        + b"{'descr': '|O', 'fortran_order': False, 'shape': (2, 2), }"
    )
    rewritten(folder, lambda data: data.__setitem__(slice(place, place + len(header)), header))
    return "block"


def more_members(folder: Path) -> str:
    rewritten(folder, lambda data: data[: -2 * RECORD] + b"x.pyd".ljust(RECORD, b"\0") + bytes(2 * RECORD))
    return "shard"


def link_to_another_file(folder: Path) -> str:
    (folder / BAD).unlink()
    (folder / BAD).symlink_to(folder / "000000.tar")
    return "shard"


def missing(folder: Path) -> str:
    (folder / BAD).unlink()
    return "shard"


def forged(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], str]:
    """An index that was changed by somebody who knows how to sign it."""

    def damage(folder: Path) -> str:
        content = json.loads((folder / "index.json").read_text())
        change(content)
        sign(folder, content)
        return "index or block"

    return damage


INDEXES: dict[str, Callable[[dict[str, Any]], None]] = {
    "wrong row count": lambda c: c["shards"][1]["rows"].__setitem__(1, 1),
    "too many rows": lambda c: c["shards"][1]["rows"].__setitem__(1, 2**40),
    "wrong dtype": lambda c: c["columns"][0].__setitem__("dtype", "int32"),
    "object dtype": lambda c: c["columns"][0].__setitem__("dtype", "object"),
    "pipe: name": lambda c: c["shards"][1].__setitem__("name", "pipe:cat /etc/passwd"),
    "path traversal": lambda c: c["shards"][1].__setitem__("name", "../../000001.tar"),
    "absolute name": lambda c: c["shards"][1].__setitem__("name", "/000001.tar"),
    "absurd shard size": lambda c: c["shards"][1].__setitem__("bytes", 2**62),
    "absurd shape": lambda c: c["columns"][0].__setitem__("shape", [2**40]),
    "absurd offset": lambda c: c["shards"][1]["offsets"]["x"].__setitem__(1, 2**50),
    "negative offset": lambda c: c["shards"][1]["offsets"]["x"].__setitem__(1, -512),
    "another's offsets": lambda c: c["shards"][1]["offsets"].update(x=c["shards"][1]["offsets"]["y"]),
    "fewer entries": lambda c: c["shards"][1]["entries"]["words"].__setitem__(1, 0),
    "absurd entries": lambda c: c["shards"][1]["entries"]["words"].__setitem__(1, 2**30),
    "a wider column": lambda c: c["columns"][2].__setitem__("shape", [5]),
}
BYTES = (flip_payload, flip_tar_header, flip_npy_header, flip_padding, flip_where_a_sparse_row_ends, cut_in_a_member,
         cut_at_a_member, cut_at_a_record, without_the_end_of_the_archive, empty, zeroed_hole, swapped_shards,
         swapped_columns, duplicate_member, pickle_in_a_member, more_members,
         link_to_another_file, missing)  # fmt: skip
DAMAGE = {**{each.__name__: each for each in BYTES}, **{name: forged(change) for name, change in INDEXES.items()}}


def read_all(folder: ShardFolder) -> dict[int, bytes]:
    """The bytes of each row by its number, as training reads them."""
    plan = Plan(folder.block_rows, 0, 2, 4, Mixing(run_rows=1))
    reader = Reader(folder, plan, tuple(COLUMNS), [[0, 1]], with_row_id=True)
    found = {}
    try:
        for chunk in reader.chunks((step, 1) for step in range(plan.steps_per_epoch)):
            assert chunk.row_id is not None
            for row in range(int(chunk.valid[0, 0])):
                words = chunk.columns["words"]
                low, high = words.offsets[0, 0, row : row + 2]
                parts = [chunk.columns[name][0, 0, row] for name in ("x", "y")]
                parts += [words.indices[0, 0, low:high], words.values[0, 0, low:high]]
                found[int(chunk.row_id[0, 0, row])] = b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
    finally:
        reader.close()
    return found


@pytest.fixture(scope="module")
def truth(whole: Path) -> dict[int, bytes]:
    found = read_all(ShardFolder(whole))
    assert len(found) == ROWS
    return found


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause before the next attempt."""
    monkeypatch.setattr(remote, "_PAUSE", 0.0)


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """`bucket(folder)` puts a folder there and gives its address."""
    with s3() as system:
        system.mkdir("shards")

        def put(folder: Path) -> str:
            place = f"s3://shards/{folder.name}"
            for file in folder.iterdir():
                system.pipe_file(f"{place}/{file.name}", file.read_bytes())
            return place

        yield put


def check(files: Any, kind: str, truth: dict[int, bytes]) -> None:
    """Training and `svi verify` end in sentences that name what is damaged."""
    report = verify(files)
    assert report.damaged, "svi verify found nothing"
    try:
        found = read_all(ShardFolder(files))
    except UserError as error:
        sentences = [str(error), *report.damaged]
    else:  # what no row is read from is no affair of training's, as long as every row is right
        assert found == truth
        assert kind == "shard"
        sentences = list(report.damaged)
    for sentence in sentences:
        assert "index" in sentence if kind == "index or block" and "shard" not in sentence else "shard" in sentence
        if kind == "block":
            assert BAD in sentence
            assert "block " in sentence
        if kind == "shard":
            assert ".tar" in sentence


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("where", ["local", "http", "s3"])
def test_damage_is_named_and_no_row_is_wrong(
    damage: Callable[[Path], str], where: str, whole: Path, truth: dict[int, bytes], tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    folder = Path(shutil.copytree(whole, tmp_path / tmp_path.name))
    kind = damage(folder)
    if where == "local":
        check(LocalFiles(folder), kind, truth)
    elif where == "http":
        with faulty(folder) as server:
            check(RemoteFiles(Store(server.url, 5.0), ShardCache(tmp_path / "cache")), kind, truth)
    else:
        address = request.getfixturevalue("bucket")(folder)
        check(RemoteFiles(Store(address, 20.0), ShardCache(tmp_path / "cache")), kind, truth)


@pytest.mark.parametrize("damage", BYTES, ids=lambda each: each.__name__)
def test_what_goes_bad_in_the_cache_is_fetched_again(
    damage: Callable[[Path], str], whole: Path, truth: dict[int, bytes], tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path / "cache")
    with faulty(whole) as server:
        assert read_all(ShardFolder(RemoteFiles(Store(server.url, 5.0), cache))) == truth
        shadow = tmp_path / "shadow"  # the cached files by their names in the folder, to be damaged
        shadow.mkdir()
        shutil.copy(whole / "index.json", shadow)
        for shard in read_index(whole).shards:
            shutil.copy(tmp_path / "cache" / f"{shard.sha256}.tar", shadow / shard.name)
        damage(shadow)
        for shard in read_index(whole).shards:
            kept = tmp_path / "cache" / f"{shard.sha256}.tar"
            kept.unlink()
            if (shadow / shard.name).exists():
                shutil.copy(shadow / shard.name, kept)
        assert read_all(ShardFolder(RemoteFiles(Store(server.url, 5.0), cache))) == truth
