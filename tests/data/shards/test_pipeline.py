"""`ShardFolder.webdataset`: every row once over ranks and workers, as WebDataset and torch's loader tell them apart."""

import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from servers import faulty
from shard_tools import all_dtypes, csr, flip, ragged, write_folder
from torch.utils.data import DataLoader

from trainer.data.fields import CsrRows, Rows
from trainer.data.shards.cache import ShardCache
from trainer.data.shards.folder import ShardFolder, open_split
from trainer.data.shards.index import ROW_ID
from trainer.data.shards.verify import intact
from trainer.errors import CorruptDataError, UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
BLOCKS = [7, 1, 30, 2, 19, 30, 11, 4]
ROWS = sum(BLOCKS)
TABLE: dict[str, Rows] = {
    **all_dtypes(ROWS),
    "words": csr(ROWS),
    "wide": csr(ROWS, 70_000, dtype="float32"),
    "lists": ragged(ROWS),
}
NAMES = {*TABLE, ROW_ID}


def several(place: Path) -> ShardFolder:
    """One of more shards than ranks and workers."""
    write_folder(place / "several", TABLE, BLOCKS, shard_bytes=5_000)
    folder = ShardFolder(place / "several")
    assert len(folder.index.shards) >= 6
    return folder


def single(place: Path) -> ShardFolder:
    """One of fewer shards than ranks or workers."""
    write_folder(place / "single", TABLE, BLOCKS)
    folder = ShardFolder(place / "single")
    assert len(folder.index.shards) == 1
    return folder


def concatenated(place: Path) -> ShardFolder:
    """Three folders of unlike numbers of shards, whose rows are the table from end to end."""
    for name, blocks, shard_bytes in (
        ("a", slice(0, 3), 5_000),
        ("b", slice(3, 5), 1 << 20),
        ("c", slice(5, 8), 5_000),
    ):
        first, count = sum(BLOCKS[: blocks.start]), sum(BLOCKS[blocks])
        columns = {column: values[first : first + count] for column, values in TABLE.items()}
        write_folder(place / name, columns, BLOCKS[blocks], shard_bytes)
    found = open_split([place / name for name in "abc"], "train")
    assert found is not None
    return found


MADE: list[Callable[[Path], ShardFolder]] = [several, single, concatenated]


@pytest.fixture(params=MADE, ids=lambda make: make.__name__)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> ShardFolder:
    return request.param(tmp_path)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Iterator[int]]:
    """Each rank in turn, told as torchrun tells it."""

    def of(world: int) -> Iterator[int]:
        for rank in range(world):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(world))
            yield rank

    return of


def loaded(pipeline: Any, workers: int = 0) -> list[dict[str, Any]]:
    """What torch's loader gives of single rows (or batches) that WebDataset made; NumPy's arrays."""
    return list(DataLoader(pipeline, batch_size=None, num_workers=workers, collate_fn=lambda row: row))


def same(found: Any, expected: Any) -> None:
    assert isinstance(found, np.ndarray | np.generic)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


def check_rows(rows: Iterable[dict[str, Any]], expected: Iterable[int] = range(ROWS)) -> None:
    """``rows`` are those ``expected`` of the table, each once, in any order."""
    by_id = {int(row[ROW_ID]): row for row in rows}
    assert sorted(by_id) == sorted(expected)
    for number, row in by_id.items():
        assert row.keys() == NAMES
        for name, values in TABLE.items():
            if isinstance(values, np.ndarray):
                same(row[name], values[number])
                continue
            here = slice(*values.offsets[number : number + 2])
            if isinstance(values, CsrRows):
                assert row[name].keys() == {"indices", "values"}
                same(row[name]["indices"], values.indices[here].astype(np.int64))
                same(row[name]["values"], values.values[here])
            else:
                same(row[name], values.values[here])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world", "shuffle"), [(1, True), (2, 13), (3, False), (3, True)])
def test_every_row_once_over_ranks_and_workers(
    folder: ShardFolder, ranks: Callable[[int], Iterator[int]], world: int, shuffle: bool | int, workers: int
) -> None:
    pipeline = folder.webdataset(shuffle)
    parts = [loaded(pipeline, workers) for _ in ranks(world)]
    assert all(parts), "a rank has no rows"
    assert sum(map(len, parts)) == ROWS
    check_rows(row for part in parts for row in part)


def test_a_rank_has_whole_shards_where_they_suffice(tmp_path: Path, ranks: Callable[[int], Iterator[int]]) -> None:
    folder = several(tmp_path)
    ends = np.cumsum([0, *(sum(shard.rows) for shard in folder.index.shards)])
    read = [{int(np.searchsorted(ends, row[ROW_ID], "right")) for row in folder.webdataset()} for _ in ranks(3)]
    assert sum(map(len, read)) == len(folder.index.shards)


@pytest.mark.parametrize(("size", "workers"), [(1, 0), (16, 0), (16, 2), (ROWS, 0), (1000, 2)])
def test_batches_are_the_rows(folder: ShardFolder, size: int, workers: int) -> None:
    batches = loaded(folder.webdataset(batch_size=size), workers)
    counts = [len(batch[ROW_ID]) for batch in batches]
    assert sum(counts) == ROWS
    assert max(counts) <= size
    assert sum(count < size for count in counts) <= max(workers, 1)
    rows = []
    for batch, count in zip(batches, counts):
        assert batch.keys() == NAMES
        for row in range(count):
            found: dict[str, Any] = {}
            for name, values in batch.items():
                if not isinstance(values, dict):
                    found[name] = values[row]
                    continue
                assert values["offsets"].dtype == np.int64
                assert len(values["offsets"]) == count + 1
                here = slice(*values["offsets"][row : row + 2])
                entries = {part: array[here] for part, array in values.items() if part != "offsets"}
                found[name] = entries if "indices" in entries else entries["values"]
            rows.append(found)
    check_rows(rows)


def test_torch_makes_tensors_of_a_batch(tmp_path: Path) -> None:
    batch = next(iter(DataLoader(several(tmp_path).webdataset(batch_size=7), batch_size=None)))
    assert batch["float32"].shape == (7, *TABLE["float32"][:1].shape[1:])  # type: ignore[union-attr]
    assert torch.equal(batch[ROW_ID], torch.arange(7))
    words = batch["wide"]
    rows = torch.repeat_interleave(torch.arange(7), words["offsets"].diff())
    dense = torch.zeros(7, 70_000).index_put((rows, words["indices"]), words["values"], accumulate=True)
    wide = TABLE["wide"]
    assert isinstance(wide, CsrRows)
    expected = np.zeros((7, 70_000), "float32")
    for row in range(7):
        here = slice(*wide.offsets[row : row + 2])
        np.add.at(expected[row], wide.indices[here], wide.values[here])
    assert np.array_equal(dense.numpy(), expected)


def test_rows_of_a_choice_of_columns(folder: ShardFolder) -> None:
    for row in folder.webdataset(columns=["lists", "int64"]):
        assert list(row) == ["lists", "int64", ROW_ID]
    with pytest.raises(UserError, match='no column "nothing"'):
        folder.webdataset(columns=["nothing"])


@pytest.mark.parametrize(("shuffle", "workers"), [(True, 0), (5, 0), (1000, 0), (True, 2)])
def test_seeds_make_the_order(folder: ShardFolder, shuffle: bool | int, workers: int) -> None:
    """A new one in each epoch."""
    pipeline = folder.webdataset(shuffle)

    def orders() -> list[list[int]]:
        random.seed(3), torch.manual_seed(3)
        return [[int(row[ROW_ID]) for row in loaded(pipeline, workers)] for _ in range(2)]

    first, second = orders()
    assert sorted(first) == sorted(second) == list(range(ROWS))
    assert len({tuple(first), tuple(second), tuple(range(ROWS))}) == 3
    assert orders() == [first, second]


def test_without_shuffle_rows_come_as_they_lie(folder: ShardFolder) -> None:
    assert [int(row[ROW_ID]) for row in folder.webdataset()] == list(range(ROWS))


def test_it_is_a_pipeline_of_webdataset(folder: ShardFolder) -> None:
    pipeline = folder.webdataset()
    assert isinstance(pipeline, webdataset.DataPipeline)
    longer = pipeline.map(lambda row: int(row[ROW_ID])).shuffle(20).with_epoch(ROWS + 5)
    found = list(longer)
    assert len(found) == ROWS + 5
    assert set(found) == set(range(ROWS))


def test_another_process_reads_what_is_sent_to_it(folder: ShardFolder) -> None:
    check_rows(pickle.loads(pickle.dumps(folder.webdataset(True))))


@pytest.mark.parametrize(("shuffle", "workers"), [(False, 0), (True, 2)])
def test_shards_at_an_address(
    tmp_path: Path, ranks: Callable[[int], Iterator[int]], shuffle: bool, workers: int
) -> None:
    """Fetched into the cache, also by workers that were forked from a process that has fetched some."""
    several(tmp_path)
    with faulty(tmp_path) as server:
        folder = open_split(f"{server.url}/several", "train", ShardCache(tmp_path / "cache", timeout=20.0))
        assert folder is not None
        folder.want(np.arange(4))
        folder.read_block(0, ROW_ID)
        pipeline = folder.webdataset(shuffle)
        check_rows(pickle.loads(pickle.dumps(pipeline)))
        check_rows(row for _ in ranks(2) for row in loaded(pipeline, workers))
        assert len(list((tmp_path / "cache").glob("*.tar"))) == len(folder.index.shards)


@pytest.mark.parametrize(("column", "workers"), [("float32", 0), ("words.values", 0), ("lists.ends", 2), (ROW_ID, 2)])
def test_a_damaged_block_is_an_error_that_names_it(tmp_path: Path, column: str, workers: int) -> None:
    folder = several(tmp_path)
    shard = folder.index.shards[2]
    flip(tmp_path / "several" / shard.name, shard.offsets[column][0] + 512 + 128)
    with pytest.raises(CorruptDataError, match=f'{shard.name}, block .*column "{column}" does not match its hash'):
        loaded(folder.webdataset(), workers)


@pytest.mark.parametrize("bad", [{0}, {2, 3}, {7}])
def test_blocks_that_are_left_out_do_not_come(folder: ShardFolder, bad: set[int]) -> None:
    less = ShardFolder(folder.files, index=intact(folder.index, bad))
    ends = np.cumsum([0, *BLOCKS])
    kept = [row for b in range(len(BLOCKS)) if b not in bad for row in range(ends[b], ends[b + 1])]
    check_rows(less.webdataset(True), kept)


@pytest.mark.parametrize(("option", "value"), [("shuffle", -1), ("batch_size", 0), ("batch_size", -3)])
def test_an_option_without_a_sense_is_refused(tmp_path: Path, option: str, value: int) -> None:
    with pytest.raises(UserError, match=f"{option}={value} .*: give "):
        several(tmp_path).webdataset(**{option: value})
