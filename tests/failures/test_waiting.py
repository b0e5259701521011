"""A signal is heard while a rank waits for others that do not come."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import app_tools
import pytest
from failure_tools import _LIMIT, ARGUMENTS, Fault, free_port, start

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("failures")]
_AT_ONCE = 5.0


def until_it_listens(port: int) -> None:
    """Until rank 0 waits where the ranks are to meet."""
    for _ in range(int(_LIMIT / 0.1)):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("rank 0 does not listen")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_while_the_others_have_not_come(shards, tmp_path, name):
    port = free_port()
    run = start(shards, tmp_path / "run", port=port)
    waiting, absent = run.processes
    os.kill(absent.pid, signal.SIGSTOP)
    try:
        until_it_listens(port)
        os.kill(waiting.pid, getattr(signal, name))
        waiting.join(_AT_ONCE)
        assert waiting.exitcode == 128 + getattr(signal, name), run.said(0)
        assert f"stopped by {name} before training" in run.out(0)
        assert "Traceback" not in run.said(0)
    finally:
        run.end()


def test_while_the_others_are_busy_before_training(shards, tmp_path):
    """Rank 1 is stopped in its preparation, for which rank 0 waits in a collective."""
    run = start(shards, tmp_path / "run", faults=[Fault(1, 1, "SIGSTOP", "prepare")])
    waiting = run.processes[0]
    try:
        run.until(0, "rows to train on")
        while "(stopped)" not in Path(f"/proc/{run.processes[1].pid}/status").read_text():
            time.sleep(0.05)
        os.kill(waiting.pid, signal.SIGTERM)
        waiting.join(_AT_ONCE)
        assert waiting.exitcode == 128 + signal.SIGTERM, run.said(0)
    finally:
        run.end()


def test_while_the_ranks_that_it_has_launched_start(shards, tmp_path):
    """Rank 1 takes seconds to import what it needs."""
    chosen = {**dict(each.split("=", 1) for each in ARGUMENTS), "trainer": "ddp_sim", "data.path": str(shards)}
    words = (*(f"{name}={value}" for name, value in chosen.items()), f"run_dir={tmp_path}/run")
    run = app_tools.start("train", *words, output=subprocess.PIPE)
    try:
        assert run.stdout is not None
        assert "rows to train on" in run.stdout.readline()
        while not (children := Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()):
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)
        said, told = run.communicate(timeout=2 * _AT_ONCE)
        assert run.returncode == 128 + signal.SIGTERM, told
        assert "stopped by SIGTERM before training" in said
        assert not [child for child in children if Path(f"/proc/{child}").exists()]
    finally:
        run.kill()
        run.wait()
