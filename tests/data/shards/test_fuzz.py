"""Whatever the bytes of an index or a shard: an index and rows that are right, or an error for the user; never a crash.

Hypothesis makes the damage, and shrinks what it finds. A forged index carries the hash that belongs to it.
"""

import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_tools import csr, ragged, sign, write_folder

from trainer.data.shards.files import read_index
from trainer.data.shards.folder import ShardFolder
from trainer.data.shards.index import Index, parse_index
from trainer.data.shards.verify import verify
from trainer.errors import UserError

ROWS = 6
COLUMNS = {"x": np.arange(12, dtype=np.float32).reshape(ROWS, 2), "words": csr(ROWS, 9), "walks": ragged(ROWS)}
quick = settings(max_examples=200, deadline=None)

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 5), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["../x.tar", "/x.tar", "pipe:x", "csr", "ragged", "object", "uint16", "0" * 16, "f" * 64, 2**63]),
)  # fmt: skip
values = st.recursive(
    scalars, lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=4), each, max_size=3)
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of two blocks and one of one."""
    folder = tmp_path_factory.mktemp("whole") / "train"
    index = write_folder(folder, COLUMNS, [1, 2, 1, 2], shard_bytes=16_000)
    assert len(index.shards) > 1
    return folder


def rows_of(folder: ShardFolder) -> dict[tuple[int, str], bytes]:
    """The bytes of the rows of every block and column."""
    found = {}
    for block in range(len(folder.block_rows)):
        for column in folder.index.columns:
            rows = folder.read_block(block, column.name)
            arrays = [rows] if isinstance(rows, np.ndarray) else [rows.offsets, *rows.entries.values()]
            found[block, column.name] = b"".join(array.tobytes() for array in arrays)
    return found


@contextmanager
def copied(whole: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as place:
        yield Path(shutil.copytree(whole, Path(place) / "train"))


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value of a JSON document."""
    yield path
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, each in pairs:
        yield from places(each, (*path, key))


def places_near(members: list[int]) -> st.SearchStrategy[int]:
    """The bytes of a member that lie in or beside its values."""
    return st.tuples(st.sampled_from(members), st.integers(600, 700)).map(sum)


def changed(content: Any, path: tuple[Any, ...], value: Any, how: str) -> Any:
    """The document with what lies at ``path`` replaced by ``value``, removed, or there twice."""
    if not path:
        return value
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if how == "remove":
        del inner[path[-1]]
    elif how == "twice" and isinstance(inner, list):
        inner.insert(path[-1], copy.deepcopy(inner[path[-1]]))
    else:
        inner[path[-1]] = value
    return content


@quick
@given(data=st.data())
def test_a_forged_index_is_refused_or_gives_rows_that_were_packed(whole: Path, data: st.DataObject) -> None:
    content = json.loads((whole / "index.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(list(places(content))))
        content = changed(content, path, data.draw(values), data.draw(st.sampled_from(["replace", "remove", "twice"])))
    truth = set(rows_of(ShardFolder(whole)).values())
    with copied(whole) as folder:
        sign(folder, content if isinstance(content, dict) else {"content": content})
        try:
            names = [shard.name for shard in read_index(folder).shards]
            assert names == [Path(name).name for name in names]
            found = rows_of(ShardFolder(folder))
        except UserError:
            return
        assert set(found.values()) <= truth


@quick
@given(start=st.integers(0), cut=st.integers(0, 40), put=st.binary(max_size=40))
def test_an_index_with_other_bytes_is_refused(whole: Path, start: int, cut: int, put: bytes) -> None:
    original = (whole / "index.json").read_bytes()
    at = start % (len(original) + 1)
    damaged = original[:at] + put + original[at + cut :]
    sentence = ""
    try:
        assert parse_index(damaged, "here") == read_index(whole)
    except UserError as error:
        sentence = str(error)
    assert sentence.startswith("here ") or not sentence


@quick
@given(st.binary(max_size=200) | values.map(lambda each: json.dumps(each).encode()))
def test_bytes_that_are_no_index_are_refused(given_bytes: bytes) -> None:
    with pytest.raises(UserError, match=r"^here "):
        parse_index(given_bytes, "here")


@quick
@given(data=st.data())
def test_a_shard_with_other_bytes_gives_the_rows_or_an_error_that_names_it(whole: Path, data: st.DataObject) -> None:
    index: Index = read_index(whole)
    name = data.draw(st.sampled_from([shard.name for shard in index.shards]))
    truth = rows_of(ShardFolder(whole))
    with copied(whole) as folder:
        content = (folder / name).read_bytes()
        shard = next(shard for shard in index.shards if shard.name == name)
        members = [place for places in shard.offsets.values() for place in places]
        at = data.draw(st.integers(0, len(content)) | places_near(members))
        put = data.draw(st.binary(max_size=64) | st.integers(0, 2000).map(bytes))
        cut = data.draw(st.just(len(put)) | st.integers(0, 2000))
        damaged = content[:at] + put + content[at + cut :]
        (folder / name).write_bytes(damaged)
        sentence = ""
        try:
            assert rows_of(ShardFolder(folder, check=data.draw(st.booleans()))) == truth
        except UserError as error:
            sentence = str(error)
        assert not sentence or (name in sentence and damaged != content)
        assert bool(verify(folder).damaged) == (damaged != content)
