"""A file that is written is there whole or not at all."""

import os
from pathlib import Path

import pytest

from trainer.data import store
from trainer.data.store import atomic_write, sync_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_at_the_end_alone_and_whole(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"abc")
        file.flush()
        assert "a.bin" not in names(tmp_path)
    assert names(tmp_path) == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"abc"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_after_an_error_what_was_there_stays(tmp_path: Path, error: type[BaseException]) -> None:
    def halfway() -> None:
        with atomic_write(tmp_path / "a.bin") as file:
            file.write(b"new")
            raise error

    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(error):
        halfway()
    assert names(tmp_path) == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"old"


def test_a_reader_of_the_old_file_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"old")
    with (tmp_path / "a.bin").open("rb") as reader:
        with atomic_write(tmp_path / "a.bin") as file:
            file.write(b"new")
        assert reader.read() == b"old"
    assert (tmp_path / "a.bin").read_bytes() == b"new"


def test_the_file_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    """Not those of a temporary one, which its owner alone may read."""
    (tmp_path / "plain").touch()
    with atomic_write(tmp_path / "ours"):
        pass
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_its_bytes_are_durable_before_its_name_and_its_name_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        happened.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "bytes")
        sync(handle)

    def rename(old: str, new: Path) -> None:
        happened.append("name")
        replace(old, new)

    monkeypatch.setattr(store.os, "fsync", fsync)
    monkeypatch.setattr(store.os, "replace", rename)
    with atomic_write(tmp_path / "a") as file:
        file.write(b"abc")
    assert happened == ["bytes", "name", "folder"]


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "no" / "a"):
        pass
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "no")
