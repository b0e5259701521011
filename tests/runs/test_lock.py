"""A run folder is held by one run, and what a run made of it decides what is left."""

import multiprocessing

import pytest
from filelock import FileLock

from trainer.errors import UserError
from trainer.runs import lock
from trainer.runs.lock import is_held, is_locked, locked


def test_a_folder_is_held_for_as_long_as_the_block(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE", 0.0)
    run_dir = tmp_path / "a" / "run"
    assert not is_locked(run_dir)
    with locked(run_dir):
        assert run_dir.is_dir()
        assert is_locked(run_dir)
        with pytest.raises(UserError, match=r"run is in use by another run: wait for it, or give another run_dir="):
            locked(run_dir).__enter__()
        assert is_locked(run_dir)
        (run_dir / "metrics.csv").touch()
    assert not is_locked(run_dir)
    assert (run_dir / "metrics.csv").exists()
    with locked(run_dir):
        assert is_locked(run_dir)


@pytest.mark.parametrize("error", [UserError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_a_run_that_came_to_nothing_leaves_no_folder(tmp_path, error):
    def fails(leaves):
        with locked(tmp_path / "run"):
            if leaves:
                (tmp_path / "run" / "log").touch()
            raise error

    with pytest.raises(type(error)):
        fails(leaves=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(type(error)):
        fails(leaves=True)
    assert (tmp_path / "run" / "log").exists()
    assert not is_locked(tmp_path / "run")


def test_to_look_whether_it_is_held_makes_nothing(tmp_path):
    assert not is_held(tmp_path / "no" / ".lock")
    (tmp_path / ".lock").touch()
    assert not is_held(tmp_path / ".lock")
    with FileLock(tmp_path / ".lock"):
        assert is_held(tmp_path / ".lock")
    assert not is_held(tmp_path / ".lock")
    assert not (tmp_path / "no").exists()


def hold(run_dir, held, done):
    with locked(run_dir):
        held.set()
        done.wait(20)


def test_another_process_holds_it_too(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE", 0.0)
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", held, done))
    process.start()
    try:
        assert held.wait(20)
        assert is_locked(tmp_path / "run")
        with pytest.raises(UserError, match="in use by another run"):
            locked(tmp_path / "run").__enter__()
    finally:
        process.kill()
        process.join()
    assert not is_locked(tmp_path / "run")  # the system let go of it
