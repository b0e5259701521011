"""Files that are made once: by one at a time, whole or not at all, and gone when nobody uses them."""

import os
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from trainer import cache
from trainer.cache import cache_folder, kept, one_at_a_time, prune, put, used, without_lock

NOW, DAY = 2_000_000_000.0, 86_400


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("xdg", [None, "", "elsewhere"])
def test_where_the_cache_lies(tmp_path, monkeypatch, xdg):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if xdg is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg and str(tmp_path / xdg))
    assert cache_folder() == tmp_path / (xdg or ".cache") / "svi-trainer"


def test_without_a_home_it_goes_with_the_process(tmp_path, monkeypatch, capsys):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(cache.Path, "home", no_home)
    monkeypatch.setattr(cache.tempfile, "mkdtemp", lambda prefix: str(tmp_path / prefix))
    registered = []
    monkeypatch.setattr(cache.atexit, "register", lambda *given, **_: registered.append(given[1]))
    cache._without_home.cache_clear()
    try:
        first = cache_folder()
        assert first == tmp_path / "svi-cache-" / "svi-trainer"
        assert cache_folder() == first  # by the variable now, as for processes that this one starts
        assert registered == [str(tmp_path / "svi-cache-")]
        assert capsys.readouterr().err.count("set XDG_CACHE_HOME") == 1
    finally:
        cache._without_home.cache_clear()


def test_a_file_is_made_once_beside_its_place(tmp_path):
    made = []

    def make(path):
        assert path.name == "a.so"
        assert path.parent.parent == tmp_path / "new"
        assert not (tmp_path / "new" / "a.so").exists()
        made.append(path)
        path.write_text("x")

    for _ in range(2):
        assert kept(tmp_path / "new" / "a.so", make).read_text() == "x"
    assert len(made) == 1
    assert names(tmp_path / "new") <= {"a.so", "a.lock"}


def test_a_file_that_cannot_be_made_leaves_nothing_and_is_tried_again(tmp_path):
    def fails(path):
        path.write_text("half")
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        kept(tmp_path / "a.so", fails)
    assert names(tmp_path) <= {"a.lock"}
    assert kept(tmp_path / "a.so", lambda path: path.write_text("whole")).read_text() == "whole"


def test_of_several_that_want_a_file_one_makes_it(tmp_path):
    made, go = [], threading.Barrier(4)

    def make(path):
        made.append(path)
        path.write_text("x")

    def want():
        go.wait(20)
        assert kept(tmp_path / "a.so", make).read_text() == "x"

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_what_is_used_counts_as_used_now(tmp_path):
    assert not used(tmp_path / "a.so")
    (tmp_path / "a.so").touch()
    os.utime(tmp_path / "a.so", (5, 5))
    assert used(tmp_path / "a.so")
    assert (tmp_path / "a.so").stat().st_mtime > 5


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_one_at_a_time_and_no_lock_is_left(tmp_path, error):
    def hold():
        with one_at_a_time(tmp_path / "new" / "a.so"):
            assert FileLock(tmp_path / "new" / "a.lock", timeout=0).lock_file
            assert names(tmp_path / "new") == {"a.lock"}
            if error:
                raise error

    if error:
        with pytest.raises(error):
            hold()
    else:
        hold()
    assert names(tmp_path / "new") == set()


def test_where_no_lock_can_be_had_it_goes_on(tmp_path):
    """Beside a file that stands where the folder would."""
    (tmp_path / "file").touch()
    with one_at_a_time(tmp_path / "file" / "a.so"):
        pass
    assert names(tmp_path) == {"file"}


def test_a_lock_that_is_left_goes_and_one_that_is_held_stays(tmp_path):
    without_lock(tmp_path / "a.so")
    assert names(tmp_path) == set()
    (tmp_path / "a.lock").touch()
    without_lock(tmp_path / "a.so")
    assert names(tmp_path) == set()
    done, held = threading.Event(), threading.Event()

    def hold():
        with FileLock(tmp_path / "a.lock"):
            held.set()
            done.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(20)
    without_lock(tmp_path / "a.so")
    assert names(tmp_path) == {"a.lock"}
    done.set()
    thread.join()


def test_a_copy_is_whole_or_not_there(tmp_path, monkeypatch):
    (tmp_path / "made").write_bytes(b"abc" * 1000)
    put(tmp_path / "made", tmp_path / "new" / "a.so")
    assert (tmp_path / "new" / "a.so").read_bytes() == b"abc" * 1000
    assert names(tmp_path / "new") == {"a.so"}

    def full(source, target):
        target.write(b"ab")
        raise OSError("no space left")

    monkeypatch.setattr(cache.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="no space"):
        put(tmp_path / "made", tmp_path / "new" / "a.so")
    assert (tmp_path / "new" / "a.so").read_bytes() == b"abc" * 1000
    assert names(tmp_path / "new") == {"a.so"}


def aged(folder: Path, ages: dict[str, float], size: int = 1000) -> None:
    """Files of a folder that were last used so many days ago."""
    for name, days in ages.items():
        (folder / name).write_bytes(bytes(size))
        os.utime(folder / name, (NOW - days * DAY,) * 2)


def test_what_nobody_uses_is_pruned(tmp_path, monkeypatch):
    """By age, then by size, the least recently used first; what a killed process left after a day."""
    monkeypatch.setattr(cache.time, "time", lambda: NOW)
    aged(tmp_path, {"old.so": 90.1, "c.so": 89.9, "b.so": 2, "a.so": 1, "killed.part": 1.1, "killed.lock": 1.1,
                    "fresh.lock": 0.9})  # fmt: skip
    prune(tmp_path)
    assert names(tmp_path) == {"a.so", "b.so", "c.so", "fresh.lock"}
    prune(tmp_path, most=3500)
    assert names(tmp_path) == {"a.so", "b.so", "fresh.lock"}
    prune(tmp_path, most=3000)
    assert names(tmp_path) == {"a.so", "b.so", "fresh.lock"}
    prune(tmp_path, days=1.5)
    assert names(tmp_path) == {"a.so", "fresh.lock"}
    prune(tmp_path, most=0)
    assert names(tmp_path) == set()
    prune(tmp_path / "absent")


def test_a_folder_among_the_files_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(cache.time, "time", lambda: NOW)
    (tmp_path / "shards").mkdir()
    os.utime(tmp_path / "shards", (NOW - 900 * DAY,) * 2)
    prune(tmp_path)
    assert names(tmp_path) == {"shards"}
