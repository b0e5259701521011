"""Shards as others read them: stock WebDataset, and Python's tar with numpy."""

import gc
import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from shard_tools import all_dtypes, csr, ragged, write_folder

from trainer.data.fields import Rows
from trainer.data.shards.folder import ShardFolder
from trainer.data.shards.index import DTYPES, ROW_ID, Column
from trainer.data.shards.tar import (
    RECORD,
    ShardWriter,
    member_name,
    npy_header,
    padding,
    payload_bytes,
    tar_header,
    widest_of,
)

BLOCKS = [7, 1, 384, 30, 2, 19, 30]  # 384 bytes and their header fill a tar record
COLUMNS = all_dtypes(sum(BLOCKS))
EXPECTED = {**COLUMNS, ROW_ID: np.arange(sum(BLOCKS))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "train", COLUMNS, BLOCKS, shard_bytes=40_000)
    assert len(list((tmp_path / "train").glob("*.tar"))) > 2
    return tmp_path / "train"


def equal_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # WebDataset's own
def test_stock_webdataset_reads_the_rows(folder: Path) -> None:
    shards = [str(shard) for shard in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    gc.collect()
    assert [sample["__key__"] for sample in samples] == [f"{block:08d}" for block in range(len(BLOCKS))]
    for name, values in EXPECTED.items():
        blocks = [np.load(io.BytesIO(sample[f"{name}.npy"]), allow_pickle=False) for sample in samples]
        assert [len(block) for block in blocks] == BLOCKS
        equal_bits(np.concatenate(blocks), values)


@pytest.mark.parametrize("columns", [COLUMNS, {"words": csr(113), "lists": ragged(113)}], ids=["dense", "varying"])
def test_the_members_are_those_of_webdatasets_writer(tmp_path: Path, columns: dict[str, Rows]) -> None:
    """To the byte; it puts more zeros at the end of a shard."""
    index = write_folder(tmp_path / "a", columns, [7, 1, 84, 2, 19], shard_bytes=20_000)
    for shard in index.shards:
        content, stock = (tmp_path / "a" / shard.name).read_bytes(), io.BytesIO()
        with (
            tarfile.open(fileobj=io.BytesIO(content)) as tar,
            webdataset.TarWriter(stock, "", "", 0o644, encoder=False, mtime=0) as writer,
        ):
            for member in tar:
                key, part = member.name.split(".", 1)
                file = tar.extractfile(member)
                assert file is not None
                writer.write({"__key__": key, part: file.read()})
        assert stock.getvalue().startswith(content[: -2 * RECORD])
        assert not any(stock.getvalue()[len(content) - 2 * RECORD :])


def test_tar_and_numpy_read_the_rows_and_the_index_knows_the_places(folder: Path) -> None:
    index = ShardFolder(folder).index
    found: dict[str, list[np.ndarray]] = {name: [] for name in EXPECTED}
    for shard in index.shards:
        content = (folder / shard.name).read_bytes()
        assert len(content) == shard.bytes <= 40_000 + 2 * RECORD
        assert hashlib.sha256(content).hexdigest() == shard.sha256
        with tarfile.open(folder / shard.name, errorlevel=2) as tar:
            members = iter(tar.getmembers())
            for block in range(len(shard.rows)):
                for name in EXPECTED:
                    member = next(members)
                    assert (member.name.split(".", 1)[1], member.offset) == (f"{name}.npy", shard.offsets[name][block])
                    assert (member.mtime, member.uid, member.mode, member.uname) == (0, 0, 0o644, "")
                    file = tar.extractfile(member)
                    assert file is not None
                    found[name].append(np.load(io.BytesIO(file.read()), allow_pickle=False))
            assert next(members, None) is None
    for name, values in EXPECTED.items():
        equal_bits(np.concatenate(found[name]), values)


def test_our_reader_gives_the_same_bits(folder: Path) -> None:
    opened = ShardFolder(folder)
    assert opened.block_rows.tolist() == BLOCKS
    for name, values in EXPECTED.items():
        equal_bits(np.concatenate([opened.read_block(block, name) for block in range(len(BLOCKS))]), values)


def test_the_same_rows_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """Whatever the byte order and the strides that the rows came in."""
    turned = {
        name: np.asfortranarray(values).astype(values.dtype.newbyteorder(">")) for name, values in COLUMNS.items()
    }
    write_folder(tmp_path / "again", turned, BLOCKS, shard_bytes=40_000)
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_a_block_of_another_shape_is_not_written(tmp_path: Path) -> None:
    index = write_folder(tmp_path / "a", {"x": np.ones((4, 2))}, [4])
    writer = ShardWriter(tmp_path, index.columns, 1 << 20)
    with pytest.raises(AssertionError, match="x:"):
        writer.write({"x": np.ones((4, 3)), ROW_ID: np.arange(4)})


@pytest.mark.parametrize("name", ["00000000.x.npy", "00000012.x.npy", "99999999.counts.indices.npy", "00000007.y.npy"])
@pytest.mark.parametrize("size", [0, 511, 1 << 20, 2**33 - 1])
def test_tar_headers_are_those_of_the_standard_library(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    assert tar_header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
@pytest.mark.parametrize("rows", [0, 1, 384])
def test_npy_headers_and_sizes_are_numpys(dtype: str, shape: tuple[int, ...], rows: int) -> None:
    column, file = Column("x", dtype, shape), io.BytesIO()
    values = np.zeros((rows, *shape), np.dtype(dtype).newbyteorder("<"))
    np.lib.format.write_array(file, values, (1, 0))
    assert npy_header(column, rows) + values.tobytes() == file.getvalue()
    assert payload_bytes(column, rows) == values.nbytes


def test_a_member_fills_whole_records() -> None:
    assert [padding(size) for size in (0, 1, 511, 512, 513, 2**40)] == [0, 511, 1, 0, 511, 0]
    assert member_name(12, "x") == "00000012.x.npy"


@pytest.mark.parametrize("lengths", [[3], [0, 0], [1, 5, 0, 2, 7, 7], [4, 0, 0, 0, 0, 0, 0, 9, 1]])
def test_the_most_entries_of_rows_that_follow_each_other(lengths: list[int]) -> None:
    """Of 2^j rows, by looking at every run of them; of fewer where the block has no more."""
    spans = [2**j for j in range((len(lengths) - 1).bit_length() + 1)]
    runs = [[lengths[i : i + span] for i in range(max(len(lengths) - span, 0) + 1)] for span in spans]
    assert widest_of(np.cumsum([0, *lengths])) == [max(map(sum, of_span)) for of_span in runs]


@pytest.mark.parametrize("blocks", [([1, 5, 0, 2], [9]), ([9], [1, 5, 0, 2]), ([2] * 9, [1, 30], [3, 3, 3])])
def test_blocks_add_to_what_was_widest(blocks: tuple[list[int], ...]) -> None:
    """A shorter block counts with all its rows where 2^j are more than it has."""
    most = max((len(each) - 1).bit_length() for each in blocks)
    found: list[int] = []
    for lengths in blocks:
        found = widest_of(np.cumsum([0, *lengths]), found)
    assert found == [max(sum(each[i : i + 2**j]) for each in blocks for i in range(len(each))) for j in range(most + 1)]


def test_a_shard_ends_before_a_block_that_would_exceed_it(tmp_path: Path) -> None:
    index = write_folder(tmp_path / "probe", {"x": np.zeros(8)}, [2])
    block = index.shards[0].bytes - 2 * RECORD
    for bytes_, shards in ((2 * block, [2, 2, 1]), (2 * block - 1, [1] * 5), (1, [1] * 5), (5 * block, [5])):
        folder = tmp_path / str(bytes_)
        folder.mkdir()
        writer = ShardWriter(folder, index.columns, bytes_, shard=3, block=10)
        for first in range(0, 10, 2):
            writer.write({"x": np.zeros(2), ROW_ID: np.arange(first, first + 2)})
        made = writer.close()
        assert [len(shard.rows) for shard in made] == shards
        assert [shard.name for shard in made] == [f"{3 + i:06d}.tar" for i in range(len(shards))]
        with tarfile.open(folder / made[-1].name) as tar:
            assert tar.getnames()[-1] == f"00000014.{ROW_ID}.npy"


def test_nothing_written_is_no_shard_and_an_old_one_is_not_overwritten(tmp_path: Path) -> None:
    index = write_folder(tmp_path / "a", {"x": np.zeros(2)}, [2])
    assert ShardWriter(tmp_path, index.columns, 100).close() == ()
    with pytest.raises(FileExistsError):
        ShardWriter(tmp_path / "a", index.columns, 100).write({"x": np.zeros(2), ROW_ID: np.arange(2)})
