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
from trainer.data.shards.index import ROW_ID
from trainer.data.shards.tar import RECORD, ShardWriter, tar_header

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
