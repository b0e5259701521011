"""Several folders are one data set: every row of each, once an epoch, under row ids that count on."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import faulty
from shard_tools import all_dtypes, csr, flip, ragged

from trainer.data.fields import VaryingRows
from trainer.data.packing.columns import ColumnMap
from trainer.data.packing.pack import pack
from trainer.data.packing.running_moments import RunningMoments
from trainer.data.plan import Mixing, Plan
from trainer.data.shards.cache import ShardCache
from trainer.data.shards.concatenated import ConcatenatedFiles
from trainer.data.shards.files import AHEAD, LocalFiles
from trainer.data.shards.folder import ShardFolder, open_split
from trainer.data.shards.index import ROW_ID, Shard, parse_index, write_index
from trainer.data.shards.reader import Reader
from trainer.data.shards.verify import intact
from trainer.data.sources.memory import MemorySource
from trainer.errors import UserError

MONDAY = {**all_dtypes(37), "city": np.array(["Oslo", "Rome"])[np.arange(37) % 2]}
TUESDAY = {**all_dtypes(61), "city": np.array(["Rome", "Aachen", "Oslo"])[np.arange(61) % 3]}
WEDNESDAY = {**all_dtypes(5), "city": np.array(["Bern"] * 5)}
for each in (MONDAY, TUESDAY, WEDNESDAY):
    for name in ("float32", "float64"):
        each[name] = np.nan_to_num(each[name], neginf=0.0)


def packed(folder: Path, table: dict[str, Any], like: Any = None, columns: ColumnMap | None = None) -> Path:
    pack(MemorySource(table), folder, block_rows=8, shard_bytes=40_000, held_out=0.2, like=like, columns=columns)
    return folder


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("days")
    made = [packed(place / "monday", MONDAY)]
    for name, table in (("tuesday", TUESDAY), ("wednesday", WEDNESDAY)):
        made.append(packed(place / name, table, like=list(made)))
    return made


def opened(days: list[Path], split: str = "train") -> ShardFolder:
    folder = open_split(days, split)
    assert folder is not None
    return folder


def rows_of(folder: ShardFolder) -> dict[int, dict[str, Any]]:
    """What a whole epoch on three lanes gives for each row id."""
    names = [column.name for column in folder.index.columns if column.name != ROW_ID]
    plan = Plan(folder.block_rows, 1, 3, 12, Mixing(run_rows=2, pool_blocks=2))
    reader, found = Reader(folder, plan, names, [[0, 1], [2]], with_row_id=True), {}
    try:
        chunk = reader.chunk(0, plan.steps_per_epoch)
    finally:
        reader.close()
    for k, a in np.ndindex(chunk.valid.shape):
        for row in range(chunk.valid[k, a]):
            assert chunk.row_id is not None
            number = int(chunk.row_id[k, a, row])
            assert number not in found
            found[number] = {name: chunk.columns[name][k, a, row] for name in names}
    return found


def test_every_row_of_every_table_once_an_epoch(days: list[Path]) -> None:
    both = [opened(days), opened(days, "held_out")]
    found = {**rows_of(both[0]), **rows_of(both[1])}
    whole = {name: np.concatenate([each[name] for each in (MONDAY, TUESDAY, WEDNESDAY)]) for name in MONDAY}
    assert sorted(found) == list(range(37 + 61 + 5))
    assert sum(folder.num_rows for folder in both) == len(found)
    words = both[0].index.column("city").vocabulary
    assert words == ["Oslo", "Rome", "Aachen", "Bern"]
    for number, row in found.items():
        for name, value in row.items():
            if name == "city":
                assert words[int(value)] == whole[name][number]
            else:
                np.testing.assert_array_equal(value, whole[name][number].astype(value.dtype))


def test_blocks_have_the_same_ids_as_the_reader_gives(days: list[Path]) -> None:
    folder = opened(days)
    blocks = [folder.read_block(block, ROW_ID) for block in range(len(folder.block_rows))]
    assert sorted(np.concatenate(blocks).tolist()) == sorted(rows_of(folder))


def test_the_statistics_are_those_of_all_rows(days: list[Path]) -> None:
    folder = opened(days)
    for name in ("float32", "float64", "int32"):
        moments = RunningMoments()
        for block in range(len(folder.block_rows)):
            moments.add(folder.read_block(block, name))
        for what, expected in moments.statistics().items():
            given = folder.index.column(name).statistics
            assert given is not None
            np.testing.assert_allclose(given[what], expected, rtol=1e-12)


def test_the_statistics_of_groups_are_over_their_rows(tmp_path: Path) -> None:
    rng, folders = np.random.default_rng(0), []
    for day in range(2):
        table = {"who": np.repeat(np.arange(9), 1 + np.arange(9) % 4), "t": np.zeros(0)}
        table["t"] = rng.normal(day, 1, len(table["who"]))
        options = {"like": folders[0]} if folders else {"group_by": "who", "columns": {"t": "t"}}
        pack(MemorySource(table), tmp_path / str(day), held_out=0, **options)
        folders.append(tmp_path / str(day))
    folder, values = opened(folders), []
    for block in range(len(folder.block_rows)):
        t, length = folder.read_block(block, "t"), folder.read_block(block, "length")
        values += [t[i, : length[i]] for i in range(len(t))]
    statistics = folder.index.column("t").statistics
    assert statistics is not None
    np.testing.assert_allclose([statistics["mean"], statistics["sd"]],
                               [np.concatenate(values).mean(), np.concatenate(values).std()], rtol=1e-6)  # fmt: skip


def test_sparse_and_ragged_columns(tmp_path: Path) -> None:
    for day, count in enumerate((11, 23)):
        table = {"words": csr(count), "walks": ragged(count)}
        pack(MemorySource(table), tmp_path / str(day), block_rows=5, held_out=0)
    folder = opened([tmp_path / "0", tmp_path / "1"])
    names, plan = ["words", "walks"], Plan(folder.block_rows, 1, 1, 34)
    reader = Reader(folder, plan, names, [[0]], with_row_id=True)
    chunk = reader.chunk(0, 1)
    reader.close()
    assert chunk.row_id is not None
    assert sorted(chunk.row_id[0, 0].tolist()) == list(range(34))
    for name, made in (("words", csr), ("walks", ragged)):
        rows = chunk.columns[name]
        assert isinstance(rows, VaryingRows)
        offsets = rows.offsets[0, 0]
        for at, number in enumerate(chunk.row_id[0, 0].tolist()):
            source, row = (made(11), number) if number < 11 else (made(23), number - 11)
            one = source[row : row + 1]
            np.testing.assert_array_equal(
                rows.entries["values"][0, 0, offsets[at] : offsets[at + 1]], one.entries["values"]
            )


def test_a_folder_without_held_out_rows_leaves_the_others_theirs(days: list[Path], tmp_path: Path) -> None:
    pack(MemorySource(MONDAY | {"int32": MONDAY["int32"][::-1]}), tmp_path / "all", held_out=0, columns=None)
    whole = [tmp_path / "all", days[0]]
    assert sorted(rows_of(opened(whole, "held_out"))) == sorted(
        number + 37 for number in rows_of(opened(days[:1], "held_out"))
    )
    assert open_split([tmp_path / "all"], "held_out") is None


def test_the_order_and_the_number_of_folders_are_part_of_the_digest(days: list[Path]) -> None:
    digests = {opened(some).index.digest for some in (days, days[:2], days[:1], days[1::-1])}
    assert len(digests) == 4
    assert opened(days).index.digest == opened(days).index.digest
    assert opened(days[:1]).index == ShardFolder(days[0] / "train").index


def test_its_index_can_be_written_and_read(days: list[Path], tmp_path: Path) -> None:
    folder = opened(days)
    write_index(tmp_path, folder.index)
    read = parse_index((tmp_path / "index.json").read_bytes(), "here")
    assert read.shards == folder.index.shards
    assert rows_of(ShardFolder(folder.files, index=read)).keys() == rows_of(folder).keys()


def test_damage_names_the_folder(days: list[Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(days[1], tmp_path / "bad"))
    folder = ShardFolder(copy / "train")
    shard = folder.index.shards[-1]
    flip(copy / "train" / shard.name, shard.offsets["int64"][-1] + 700)
    number = len(folder.block_rows) - 1
    with pytest.raises(UserError, match=rf'bad/train/{shard.name}, block {number}, column "int64" does not match'):
        rows_of(opened([days[0], copy]))
    (copy / "train" / shard.name).unlink()
    with pytest.raises(UserError, match=rf"bad/train/{shard.name} is missing"):
        opened([days[0], copy])


def test_at_addresses_too(days: list[Path], tmp_path: Path) -> None:
    with faulty(days[0].parent) as server:
        there = open_split([f"{server.url}/{day.name}" for day in days[:2]] + [days[2]], "train", ShardCache(tmp_path))
        assert there is not None
        assert there.index.digest == opened(days).index.digest
        found, expected = rows_of(there), rows_of(opened(days))
        assert found.keys() == expected.keys()
        for number, row in expected.items():
            assert all(np.array_equal(found[number][name], value) for name, value in row.items())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"more": np.zeros(3)}, 'other has a column "more" and .*first has none'),
        ({"n": None}, 'first has a column "n" and .*other has none'),
        ({"n": np.zeros(3)}, 'column "n" has dtype int64 in .*first and float32 in .*other'),
        ({"x": np.zeros((3, 3))}, r'column "x" has shape \(2,\) in .*first and \(3,\) in .*other'),
        ({"city": np.array(["Rome"] * 3)}, 'code 0 of column "city" is "Oslo" in .*first and "Rome" in .*other'),
        ({"city": np.array([1, 2, 3])}, 'column "city" holds words in one of .*first and .*other, and numbers'),
    ],
)
def test_what_differs_is_named(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    table = {"n": np.arange(3), "x": np.zeros((3, 2)), "city": np.array(["Oslo"] * 3)}
    other = {name: values for name, values in {**table, **change}.items() if values is not None}
    for name, each in (("first", table), ("other", other)):
        pack(MemorySource(each), tmp_path / name, held_out=0)
    with pytest.raises(UserError, match=f"{sentence}.*: pack the table of .*other again with svi shard like=.*first"):
        opened([tmp_path / "first", tmp_path / "other"])


def test_new_words_of_two_folders_that_know_only_the_first_are_told_apart(tmp_path: Path) -> None:
    for day, city, like in (("first", "Rome", None), ("b", "Aachen", "first"), ("c", "Bern", "first")):
        table = {"city": np.array(["Oslo", "Rome", city])}
        pack(MemorySource(table), tmp_path / day, held_out=0, like=like and tmp_path / like)
    for order, (one, two) in (("first b c", "bc"), ("c first b", "cb"), ("b c first", "bc")):
        words = {"b": "Aachen", "c": "Bern"}
        sentence = (rf'code 2 of column "city" is "{words[one]}" in \S*{one} and "{words[two]}" in \S*{two}: pack the '
                    rf"table of \S*{two} again with svi shard like=\S*{one}\.")  # fmt: skip
        with pytest.raises(UserError, match=sentence):
            opened([tmp_path / day for day in order.split()])


def test_what_belongs_together_must_be_drawn_alike(tmp_path: Path) -> None:
    """With another seed, or another share, a patient could be held out on Monday and trained on on Tuesday."""
    table = {"who": np.arange(400) % 40, "n": np.arange(400)}
    for name, options in (
        ("first", {"split_by": "who"}),
        ("like", {"like": tmp_path / "first"}),
        ("seed", {"split_by": "who", "seed": 1}),
        ("share", {"split_by": "who", "held_out": 0.5}),
        ("rows", {}),
        ("grouped", {"group_by": "who"}),
        ("again", {"group_by": "who", "seed": 1}),
    ):
        pack(MemorySource(table | {"n": table["n"] + ord(name[0])}), tmp_path / name, **options)
    assert opened([tmp_path / "first", tmp_path / "like"]).num_rows < 800
    for first, other, was, now in (
        ("first", "seed", r"0\.1 of who \(seed 0\)", r"0\.1 of who \(seed 1\)"),
        ("first", "share", r"0\.1 of who \(seed 0\)", r"0\.5 of who \(seed 0\)"),
        ("rows", "first", "single rows", r"0\.1 of who \(seed 0\)"),
        ("grouped", "again", r"0\.1 of who \(seed 0\)", r"0\.1 of who \(seed 1\)"),
    ):
        sentence = rf"{was} was held out of \S*{first} and {now} of \S*{other}, .*: pack the table of \S*{other} again"
        with pytest.raises(UserError, match=sentence):
            opened([tmp_path / first, tmp_path / other])


class Asked(LocalFiles):
    """A folder that remembers what was wanted of it."""

    def want(self, shards: Iterable[Shard]) -> None:
        wanted.extend(self.path_of(shard) for shard in shards)


wanted: list[str] = []


def test_of_all_folders_together_only_a_few_shards_are_fetched_ahead(days: list[Path]) -> None:
    """Those that are wanted are held in the cache, which may have no room for more."""
    files = ConcatenatedFiles([Asked(day / "train") for day in days], [0, 0, 0])
    shards = files.index().shards * 3
    files.want(shards)
    assert wanted == [files.path_of(shard) for shard in shards[:AHEAD]]
    assert len(shards) > AHEAD


def test_columns_made_of_others_and_other_shifts_are_named(tmp_path: Path) -> None:
    table = {"a": np.arange(9.0), "b": np.arange(9.0)}
    for name, options in (
        ("first", {"columns": {"x": ["a", "b"]}}),
        ("turned", {"columns": {"x": ["b", "a"]}}),
        ("shifted", {"columns": {"x": ["a", "b"]}, "standardize": ["x"]}),
    ):
        pack(MemorySource(table), tmp_path / name, held_out=0, **options)
    for name, sentence in (
        ("turned", r"x made of \['a', 'b'\] in .*first and \['b', 'a'\] in .*turned"),
        ("shifted", r"x standardised by None in .*first and \{'mean'"),
    ):
        with pytest.raises(UserError, match=sentence):
            opened([tmp_path / "first", tmp_path / name])


def test_a_folder_given_twice_is_named(days: list[Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(days[0], tmp_path / "copy"))
    with pytest.raises(UserError, match=r"copy holds the same shards as .*monday: name every folder once"):
        opened([*days, copy])


def test_what_is_intact_keeps_its_numbers(days: list[Path]) -> None:
    folder = opened(days)
    assert len(folder.index.shards[0].rows) > 2
    bad = {1, len(folder.block_rows) - 1}
    index = intact(folder.index, bad)
    fewer = ShardFolder(folder.files, index=index)
    kept = [fewer.read_block(block, ROW_ID) for block in range(len(fewer.block_rows))]
    lost = np.concatenate([folder.read_block(block, ROW_ID) for block in bad]).tolist()
    assert sorted(np.concatenate(kept).tolist()) == sorted(set(rows_of(folder)) - set(lost)) == sorted(rows_of(fewer))
    shards = {"0-000000.tar": [1], "2-000000.tar": [0]}
    assert index.meta["left_out"] == {"rows": len(lost), "blocks": 2, "shards": shards, "of": folder.index.digest}
    assert all(column.statistics is None for column in index.columns)
