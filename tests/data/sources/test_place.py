"""Names, bytes and globs of files here and at an address."""

import gzip
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from trainer.data.sources.place import files_at, is_compressed, opened, stamp, suffix


@pytest.mark.parametrize(
    ("name", "ending", "compressed"),
    [
        ("t.csv", ".csv", False),
        ("a.b/T.CSV.GZ", ".csv", True),
        ("t.parquet", ".parquet", False),
        ("https://host/t.jsonl.gz", ".jsonl", True),
        ("t.gz", "", True),
        ("t", "", False),
        ("a.d/t", "", False),
        (".csv", "", False),
        (Path("x/t.Svm"), ".svm", False),
    ],
)
def test_what_a_name_ends_in(name: object, ending: str, compressed: bool) -> None:
    assert suffix(name) == ending
    assert is_compressed(name) == compressed


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/place", recursive=True)


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "T.CSV.GZ"])
@pytest.mark.parametrize("far", [False, True])
def test_a_file_gives_its_bytes_from_any_place_on(
    tmp_path: Path, memory: fsspec.AbstractFileSystem, name: str, far: bool
) -> None:
    content = b"a,b\n" + b"1,2\n" * 1000
    stored = gzip.compress(content) if name.lower().endswith("gz") else content
    (tmp_path / name).write_bytes(stored)
    memory.pipe(f"/place/{name}", stored)
    with opened(f"memory://place/{name}" if far else tmp_path / name) as stream:
        assert stream.read() == content
        for at in (2000, 3, 3990):
            stream.seek(at)
            assert (stream.tell(), stream.read(9)) == (at, content[at : at + 9])


def test_a_file_that_changed_has_another_stamp(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"abc")
    before = stamp(path)
    assert stamp(str(path)) == before
    os.utime(path, ns=(0, 1))
    moved = stamp(path)
    assert moved != before
    path.write_bytes(b"abcd")
    os.utime(path, ns=(0, 1))
    assert stamp(path) != moved
    memory.pipe("/place/t.csv", b"abc")
    known = stamp("memory://place/t.csv")
    memory.pipe("/place/t.csv", b"abcd")
    assert stamp("memory://place/t.csv") != known


def test_globs_match_files_in_order(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "a.txt", "[x].csv", "sub/c.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "d.csv").mkdir()

    def found(pattern: str) -> list[str]:
        return [Path(each).relative_to(tmp_path).as_posix() for each in files_at(f"{tmp_path}/{pattern}")]

    assert found("*.csv") == ["[x].csv", "a.csv", "b.csv"]
    assert found("**/*.csv") == ["[x].csv", "a.csv", "b.csv", "sub/c.csv"]
    assert found("[x].csv") == ["[x].csv"]  # a file of this name comes before what the pattern matches
    assert found("[ab].csv") == ["a.csv", "b.csv"]
    assert found("sub") == found("none.csv") == found("*.none") == []


def test_globs_of_addresses_reach_what_can_be_listed(memory: fsspec.AbstractFileSystem) -> None:
    for name in ("b.csv", "a.csv", "a.txt"):
        memory.pipe(f"/place/{name}", b"x")
    found = [str(each).replace(":///", "://") for each in files_at("memory://place/*.csv")]
    assert found == ["memory://place/a.csv", "memory://place/b.csv"]
    assert files_at("memory://place/none.csv") == ("memory://place/none.csv",)  # that it is not there is said later
    assert files_at("https://host/a*.csv") == ("https://host/a*.csv",)
