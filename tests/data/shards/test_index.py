"""The index: a round trip, and every way in which its file can be wrong is a sentence that names it."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_tools import flip, sign, write_folder

from trainer.data.shards.files import read_index
from trainer.data.shards.folder import ShardFolder
from trainer.data.shards.index import Column, Index, Shard, write_index
from trainer.errors import UserError

Content = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "train", {"x": np.ones((8, 2), np.float32)}, [5, 3])
    return tmp_path / "train"


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        read_index(folder)
    sentence = str(error.value)
    assert str(folder / "index.json") in sentence
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def test_the_index_comes_back_as_it_was_written(tmp_path: Path) -> None:
    statistics = {"mean": [0.1, float("nan")], "sd": [1e-300, 2.0], "min": [-0.0, 1], "max": [1, 2]}
    columns = (
        Column("x", "float32", (2,), None, statistics),
        Column("word", "int64", (), ["ä", "", "\U0001f40c", 'a"b']),
        Column("row_id", "int64"),
    )
    names = [column.name for column in columns]
    places, hashes = dict.fromkeys(names, (0, 9)), dict.fromkeys(names, ("ab", "cd"))
    shards = (
        Shard("000000.tar", 99, "ef" * 32, (2, 3), places, hashes),
        Shard("b_1-c.tar", 50, "01" * 32, (), *empty(names)),
    )
    index = Index(columns, shards, 2**63 - 1, "held_out", {"source": "a\nb", "dropped": 0})
    write_index(tmp_path, index)
    read = read_index(tmp_path)
    assert repr(read) == repr(index)  # a NaN is not equal to itself
    assert read.digest == index.digest
    assert (read.num_rows, read.block_rows.tolist()) == (5, [2, 3])
    assert read.column("word").vocabulary == ["ä", "", "\U0001f40c", 'a"b']
    with pytest.raises(UserError, match=r'no column "z" in these shards \(x, word, row_id\)'):
        read.column("z")


def empty(names: list[str]) -> tuple[dict[str, tuple], dict[str, tuple]]:
    return dict.fromkeys(names, ()), dict.fromkeys(names, ())


def test_every_flipped_byte_and_every_truncation_is_noticed(folder: Path) -> None:
    path = folder / "index.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        flip(path, place, 0x01)
        refusal(folder)
        path.write_bytes(whole[:place])
        refusal(folder)
        path.write_bytes(whole)
    assert read_index(folder).num_rows == 8


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not readable JSON"),
        ("PK\x03\x04", "not readable JSON"),
        ("[" * 100_000, "not readable JSON"),
        ("[]", "is not an index"),
        ("null", "is not an index"),
        ("{}", "format version None where this program reads 1"),
        ('{"version": 2, "columns": []}', "format version 2 where this program reads 1"),
        ('{"version": 1}', "does not match its own hash"),
    ],
)
def test_what_is_no_index_is_named(folder: Path, text: str, reason: str) -> None:
    (folder / "index.json").write_text(text)
    assert reason in refusal(folder)


def test_a_missing_or_unreadable_index_is_named(folder: Path) -> None:
    (folder / "index.json").unlink()
    assert "is missing" in refusal(folder)
    (folder / "index.json").mkdir()
    assert f"cannot be read ({os.strerror(21)})" in refusal(folder)


def edit(*path: Any, to: Any) -> Callable[[Content], None]:
    """An edit that puts ``to`` at a path of keys."""

    def apply(content: Content) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    apply.__name__ = f"{'.'.join(map(str, path))}={to!r}"[:60]
    return apply


def rename(name: str) -> Callable[[Content], None]:
    """Another name for column x, in the shards too."""

    def apply(content: Content) -> None:
        content["columns"][0]["name"] = name
        for part in ("offsets", "xxh3"):
            content["shards"][0][part][name] = content["shards"][0][part].pop("x")

    apply.__name__ = f"x becomes {name!r}"[:60]
    return apply


FORGERIES = [
    *(rename(name) for name in ("../x", "x.y", "x" * 100, "", "1x", "x/y", "x\n")),
    *(
        edit("shards", 0, "name", to=name)
        for name in (
            "../x.tar",
            "/etc/x.tar",
            "a/b.tar",
            "pipe:cat x.tar",
            "x.tar\n",
            "",
            "x",
            "..",
            "a\0.tar",
            7,
            None,
        )
    ),
    *(edit("columns", 0, "name", to=name) for name in (1, None)),
    *(
        edit("columns", 0, "dtype", to=dtype)
        for dtype in ("object", "|O", "O", "str", "datetime64[ns]", "<f4", "complex64", ["float32"], None)
    ),
    *(edit("columns", 0, "shape", to=shape) for shape in ([-1], [0], [2.0], [True], ["2"], [2**20, 2**20], 2, None)),
    *(edit("shards", 0, "rows", to=rows) for rows in ([0, 8], [-1, 9], [8], [5, 3, 1], [5.0, 3], ["5", 3], [5, 10**9])),
    edit("shards", 0, "rows", to=[5, 10**30]),
    *(edit("shards", 0, "offsets", "x", to=places) for places in ([0], [-512, 0], [0, 10**9], ["0", 1], {}, None)),
    edit("shards", 0, "offsets", to={"x": [0, 1]}),
    edit("shards", 0, "offsets", "../x", to=[0, 1]),
    edit("shards", 0, "xxh3", to={"x": ["0", "1"]}),
    edit("shards", 0, "xxh3", "x", to=[]),
    edit("shards", 0, "bytes", to="many"),
    edit("shards", 0, "bytes", to=0),
    edit("shards", 0, "bytes", to=1e9),
    *(edit("shards", 0, "sha256", to=text) for text in ("", "../" + "0" * 61, "0" * 65, "G" * 64, None)),
    edit("shards", 0, "extra", to=1),
    edit("shards", 0, "columns", to=[]),
    edit("shards", 0, to=[]),
    edit("shards", to={}),
    edit("shards", to=None),
    edit("columns", to="x"),
    edit("columns", 0, to={"name": "x"}),
    edit("columns", 1, "name", to="x"),
    edit("columns", 1, "name", to="id"),
    edit("columns", 1, "dtype", to="float32"),
    edit("columns", 1, "shape", to=[1]),
    edit("seed", to=float("inf")),
    edit("seed", to="0"),
    edit("meta", to=3),
    lambda content: content["shards"].append(copy.deepcopy(content["shards"][0])),
    lambda content: content["columns"].append(content["columns"][0]),
    lambda content: content.pop("split"),
]


@pytest.mark.parametrize("forge", FORGERIES, ids=lambda forge: forge.__name__)
def test_a_forged_index_with_the_right_hash_is_refused(folder: Path, forge: Callable[[Content], None]) -> None:
    content = json.loads((folder / "index.json").read_text())
    sign(folder, content)
    assert read_index(folder).num_rows == 8
    forge(content)
    sign(folder, content)
    assert "is damaged" in refusal(folder)


@pytest.mark.parametrize(
    "forge",
    [
        edit("shards", 0, "rows", to=[4, 4]),
        edit("columns", 0, "dtype", to="int32"),
        edit("columns", 0, "shape", to=[2, 1]),
        rename("y"),
        edit("shards", 0, "xxh3", "x", to=["0" * 16, "0" * 16]),
        edit("shards", 0, "offsets", "x", to=[512, 512]),
        edit("shards", 0, "bytes", to=5632),
        edit("shards", 0, "name", to="1.tar"),
    ],
    ids=lambda forge: forge.__name__,
)
def test_a_forged_index_that_fits_itself_does_not_fit_the_shards(
    folder: Path, forge: Callable[[Content], None]
) -> None:
    content = json.loads((folder / "index.json").read_text())
    forge(content)
    sign(folder, content)
    with pytest.raises(UserError, match=r"(000000|1)\.tar.*pack the table again[.,]"):
        ShardFolder(folder).read_block(0, content["columns"][0]["name"])
