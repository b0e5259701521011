"""Killed at every line of a save, on full disks, damaged, launched twice in one folder: what is there is whole."""

import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from app_tools import final_state, tensors
from failure_tools import Fault, fork_server, start

from trainer.engine import checkpoint
from trainer.engine.metrics import MetricsFile
from trainer.errors import UserError
from trainer.inference.optim.rounds import State

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("failures")]
SAVED = ("checkpoint.py", "store.py")  # the files whose lines write a checkpoint


def state_at(step):
    zero = torch.zeros((), dtype=torch.int64)
    return State(torch.tensor(step), torch.full((3,), float(step)), torch.zeros(3), zero, {})


def save_and_die(path: Path, line: int) -> None:
    """Saves step 2; SIGKILL at the ``line``th line of it."""
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        if not frame.f_code.co_filename.endswith(SAVED):
            return None
        lines += event == "line"
        if lines == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    checkpoint.save(path, state_at(2), {})


@pytest.mark.failure(what="SIGKILL during a save", lost="the steps since the checkpoint before")
def test_killed_at_every_line_of_a_save(tmp_path, seen):
    checkpoint.save(tmp_path / "step_000000001.ckpt", state_at(1), {})
    path, found = tmp_path / "step_000000002.ckpt", []
    for line in range(1, 200):
        process = fork_server().Process(target=save_and_die, args=(path, line))
        process.start()
        process.join()
        newest = checkpoint.newest(tmp_path)
        state, _ = checkpoint.load(newest)
        assert torch.equal(state.theta, state_at(int(state.step)).theta)
        found.append(int(state.step))
        if process.exitcode == 0:
            break
        checkpoint.manifest_of(path).unlink(missing_ok=True)
    assert len(found) > 25
    assert found == sorted(found)
    assert set(found) == {1, 2}
    seen("nothing; the newest complete checkpoint is the one before", -signal.SIGKILL)


@pytest.mark.failure(what="a checkpoint is cut short, or a bit flips", lost="the steps since the checkpoint before")
def test_a_damaged_checkpoint_is_passed_over(tmp_path, seen):
    for step in (1, 2):
        checkpoint.save(tmp_path / f"step_00000000{step}.ckpt", state_at(step), {})
    path, told = tmp_path / "step_000000002.ckpt", []
    whole = path.read_bytes()
    for content in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:]):
        path.write_bytes(content)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            assert checkpoint.newest(tmp_path) == tmp_path / "step_000000001.ckpt"
        told.append(str(found[0].message))
        with pytest.raises(UserError, match="resume from another one"):
            checkpoint.load(path)
    assert "bytes where its manifest says" in told[0]
    seen(told[1].replace(str(tmp_path), "RUN"), 0)


def test_what_a_killed_process_left_of_a_checkpoint_is_removed(shards, tmp_path):
    left = tmp_path / "run" / "checkpoints" / ".step_000000008.ckpt.abc.tmp"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    assert start(shards, tmp_path / "run", ranks=1).wait().codes == [0]
    assert not left.exists()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 512 kB."""
    folder = tmp_path / "run"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs root that may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


FILL = "sh cat /dev/zero > {}/ballast 2>/dev/null"


@pytest.mark.failure(what="the disk is full for a while", lost="nothing but the rows of metrics.csv meanwhile")
def test_a_disk_that_is_full_for_a_while(shards, small_disk, seen):
    faults = [Fault(0, 12, FILL.format(small_disk)), Fault(0, 28, f"sh rm {small_disk}/ballast")]
    run = start(shards, small_disk, ranks=1, faults=faults).wait()
    assert run.codes == [0], run.said(0)
    said = [line for line in run.out(0).splitlines() if "could not be written" in line]
    assert len(said) == 2
    assert int(final_state(small_disk)[0].step) == 40
    seen(said[0].replace(str(small_disk), "RUN"), 0)


@pytest.mark.failure(what="the disk is full at the end", lost="the steps since the last checkpoint")
def test_a_disk_that_is_full_at_the_end(shards, small_disk, seen):
    run = start(shards, small_disk, ranks=1, faults=[Fault(0, 34, FILL.format(small_disk))]).wait()
    assert run.codes == [2], run.said(0)
    assert run.err(0).count("\n") == 1
    assert int(final_state(small_disk)[0].step) == 32
    (small_disk / "ballast").unlink()
    assert start(shards, small_disk, ranks=1).wait().codes == [0]
    seen(run.err(0).replace(str(small_disk), "RUN"), 2)


@pytest.mark.failure(what="the disk of the cache is full", lost="the time to compile, at each run")
def test_a_full_cache(shards, tmp_path, small_disk, monkeypatch, seen):
    subprocess.run(["mount", "-o", "remount,nr_inodes=1", str(small_disk)], check=True)
    run = start(shards, tmp_path / "other", "program=fused", ranks=1, cache=small_disk).wait(within=280)  # it compiles
    assert run.codes == [0], run.said(0)
    (said,) = [line for line in run.out(0).splitlines() if "not kept" in line]
    assert "No space left on device" in said
    seen(re.sub(r"in \d+ s", "in N s", said.replace(str(small_disk), "CACHE")), 0)


@pytest.mark.failure(what="a logger fails midway (W&B, a full disk)", lost="its figures; metrics.csv has them")
def test_a_logger_that_fails_is_told_once(tmp_path, seen):
    class WandbLogger:
        def log_metrics(self, numbers, step):
            raise OSError("the service is gone\nand more")

    told, kept = [], []
    healthy = SimpleNamespace(log_metrics=lambda numbers, step: kept.append(step))
    figures = MetricsFile(tmp_path / "metrics.csv", told.append)
    for step in (1, 2):
        figures.to_loggers(SimpleNamespace(loggers=[WandbLogger(), healthy]), {"elbo": 1.0}, step)
    assert kept == [1, 2]
    (said,) = told
    full = MetricsFile(Path("/dev/full"), told.append)
    for _ in range(2):
        full.or_say("metrics.csv", lambda: full.append({"step": 1.0}))
    assert told[1:] == [
        "metrics.csv takes no figures ([Errno 28] No space left on device): training continues without them."
    ]
    seen(said, 0)


@pytest.mark.failure(what="a second launch in the same run folder", lost="nothing")
def test_a_second_launch_in_the_same_folder_is_refused(shards, tmp_path, seen):
    first = start(shards, tmp_path / "run", ranks=1, faults=[Fault(0, 20, "SIGSTOP")])
    first.until(0, "step 18/40")
    second = start(shards, tmp_path / "run", "checkpoint.keep_last=3").wait()
    assert second.codes == [2, 2]
    assert "keep_last" not in (tmp_path / "run" / ".hydra" / "overrides.yaml").read_text()
    told = second.err(0) + second.err(1)
    assert told.count("\n") == 1
    while Path(f"/proc/{first.processes[0].pid}/stat").read_text().split()[2] != "T":
        pass
    os.kill(first.processes[0].pid, signal.SIGCONT)
    assert first.wait().codes == [0]
    seen(told.replace(str(tmp_path / "run"), "RUN"), 2)


@pytest.mark.failure(what="two launches in the same second", lost="nothing: two run folders")
def test_two_launches_in_the_same_second(shards, tmp_path, seen):
    folder = "${now:%Y-%m-%d_%H-%M-%S_%f}"
    text = (Path(checkpoint.__file__).parents[2] / "conf" / "train.yaml").read_text()
    assert f"run_dir: runs/{folder}" in text
    runs = [start(shards, tmp_path / folder, ranks=1) for _ in range(2)]
    assert [run.wait().codes for run in runs] == [[0], [0]]
    folders = [path for path in tmp_path.iterdir() if (path / "metrics.json").exists()]
    one, two = (tensors(final_state(path)[0]) for path in folders)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    seen("nothing", 0)
