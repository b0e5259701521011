"""A folder that is there whole or not at all, and what may be overwritten."""

import errno
import os
from pathlib import Path

import pytest

from trainer.data.packing.partial import check_out, disk_of, is_whole, partial_folder
from trainer.errors import UserError


def pack(out: Path, overwrite: bool = False, content: str = "new", error: BaseException | None = None) -> None:
    with partial_folder(out, overwrite) as folder:
        assert folder.parent == out.parent
        (folder / "train").mkdir()
        (folder / "train" / "index.json").write_text(content)
        if error:
            raise error


def content(out: Path) -> str:
    return (out / "train" / "index.json").read_text()


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with partial_folder(out, False) as folder:
        (folder / "file").write_text("x")
        assert not out.exists()
    assert names(out.parent) == ["out"]
    assert names(out) == ["file"]


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt(), UserError("no")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_after_an_error_nothing_has_happened(tmp_path: Path, error: BaseException, overwrite: bool) -> None:
    if overwrite:
        pack(tmp_path / "out", content="old")
    with pytest.raises(type(error)):
        pack(tmp_path / "out", overwrite, error=error)
    assert names(tmp_path) == ["out"] * overwrite
    assert not overwrite or content(tmp_path / "out") == "old"


def test_a_packed_folder_is_replaced_where_that_is_asked_for(tmp_path: Path) -> None:
    pack(tmp_path / "out", content="old")
    with pytest.raises(UserError, match="out' exists: choose another out=, or write overwrite=true"):
        pack(tmp_path / "out")
    pack(tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("is_file", [False, True])
def test_what_is_no_packed_folder_is_never_replaced(tmp_path: Path, is_file: bool) -> None:
    out = tmp_path / "out"
    out.write_text("mine") if is_file else (out / "mine").mkdir(parents=True)
    assert not is_whole(out)
    for overwrite, said in ((True, "is not a packed folder, and is not overwritten"), (False, "exists")):
        with pytest.raises(UserError, match=f"out' {said}"):
            pack(out, overwrite)
        with pytest.raises(UserError, match=f"out' {said}"):
            check_out(out, overwrite)
    assert names(tmp_path) == ["out"]
    check_out(tmp_path / "other", False)


def test_what_killed_processes_left_goes_and_nothing_else_does(tmp_path: Path) -> None:
    """Also where the name has a star in it."""
    out = tmp_path / "o*t"
    for name in (".o*t.partial-123", ".o*t.partial-replaced", ".oxt.partial-9", ".other.partial-1"):
        (tmp_path / name / "train").mkdir(parents=True)
    pack(out)
    assert sorted(names(tmp_path)) == [".other.partial-1", ".oxt.partial-9", "o*t"]


def test_a_relative_folder_is_beside_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with partial_folder(Path("out"), False) as folder:
        assert folder.is_absolute()
        assert folder.parent == Path.cwd()
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "no space is left on the disk of 'out'"),
        (errno.EDQUOT, "no space is left on the disk of 'out'"),
        (errno.EACCES, "cannot write 'out': Permission denied"),
        (errno.EROFS, "cannot write 'out': Read-only file system"),
    ],
)
def test_what_a_disk_refuses_is_said(number: int, said: str) -> None:
    with pytest.raises(UserError, match=said) as found, disk_of(Path("out")):
        raise OSError(number, os.strerror(number))
    assert isinstance(found.value.__cause__, OSError)
