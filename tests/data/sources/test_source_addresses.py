"""Tables on servers and in buckets are the tables on disk, whatever their format."""

from pathlib import Path

import numpy as np
import pytest
from servers import Faulty, faulty, s3
from test_bag_of_words import counts, docword
from test_h5ad import write as write_h5ad
from test_sources import read, table, write

from trainer.data.packing.pack import pack
from trainer.data.sources.source import open_source
from trainer.errors import UserError

FORMS = ["parquet", "csv", "npz", "arrow", "jsonl"]


def contents(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.rglob("*.tar"))]


@pytest.fixture
def server(tmp_path: Path):
    with faulty(tmp_path) as running:
        yield running


@pytest.mark.parametrize("form", FORMS)
def test_a_file_on_a_server_is_read_as_one_on_disk(server: Faulty, tmp_path: Path, form: str) -> None:
    here = write(tmp_path, form, table())
    there = open_source(f"{server.url}/t.{form}")
    assert there.fields == open_source(here).fields
    assert read(there) == read(open_source(here))
    pack(here, tmp_path / "here", block_rows=100)
    pack(f"{server.url}/t.{form}", tmp_path / "there", block_rows=100, workers=2)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_words_and_cells_on_a_server(server: Faulty, tmp_path: Path) -> None:
    docword(tmp_path / "docword.t.txt.gz", counts())
    (tmp_path / "vocab.t.txt").write_text("\n".join(f"w{i}" for i in range(counts().shape[1])))
    write_h5ad(tmp_path / "t.h5ad")
    for name in ("docword.t.txt.gz", "t.h5ad"):
        there, here = open_source(f"{server.url}/{name}"), open_source(tmp_path / name)
        assert there.fields == here.fields
        pack(there, tmp_path / f"{name}-there", missing="drop")
        pack(here, tmp_path / f"{name}-here", missing="drop")
        assert contents(tmp_path / f"{name}-there") == contents(tmp_path / f"{name}-here")


def test_what_is_not_there_is_named(server: Faulty) -> None:
    with pytest.raises(UserError, match=r"cannot read 'http://.*/none\.parquet'"):
        open_source(f"{server.url}/none.parquet")


def test_files_and_folders_in_a_bucket(tmp_path: Path) -> None:
    with s3() as system:
        system.mkdir("tables")
        halves = [{name: values[part::2] for name, values in table().items()} for part in (0, 1)]
        for number, half in enumerate(halves):
            for form in ("parquet", "csv"):
                path = write(tmp_path, form, half, f"part-{number}")
                system.put(str(path), f"tables/t/{path.name}")
        expected = {name: np.concatenate([half[name] for half in halves]).tolist() for name in table()}
        assert read(open_source("s3://tables/t/part-*.parquet")) == expected
        assert read(open_source("s3://tables/t/part-1.csv"))["n"] == halves[1]["n"].tolist()
        system.rm(system.glob("tables/t/*.csv"))
        assert read(open_source("s3://tables/t")) == expected
        with pytest.raises(UserError, match=r"no file at 's3://tables/none-\*\.parquet'"):
            open_source("s3://tables/none-*.parquet")
