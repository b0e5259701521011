"""The other ranks of this machine: started with what they need to know, and none left behind."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from trainer.distributed.local_ranks import LocalRanks
from trainer.engine.signals import StopOnSignal
from trainer.errors import Stopped

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))


def test_each_is_told_its_rank_and_where_to_meet(tmp_path):
    names = "MASTER_ADDR MASTER_PORT NODE_RANK LOCAL_RANK WORLD_SIZE"
    script = f"import os; e = os.environ; open(e['LOCAL_RANK'], 'w').write(' '.join(e[n] for n in '{names}'.split()))"
    others = LocalRanks()
    others.start([sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); {script}"], 3, 6)
    for child in others.children:
        assert child.wait() == 0
    others.end()
    port = os.environ["MASTER_PORT"]
    said = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert said == {rank: f"127.0.0.1 {port} 0 {rank} 6" for rank in ("1", "2")}
    assert os.environ["LOCAL_RANK"] == "0"


def test_what_the_environment_says_of_the_meeting_holds(monkeypatch):
    os.environ.update(MASTER_ADDR="10.0.0.7", MASTER_PORT="29511", NODE_RANK="1")
    others = LocalRanks()
    others.start(SLEEP, 1, 4)
    others.end()
    kept = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "WORLD_SIZE")}
    assert kept == {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29511", "NODE_RANK": "1", "WORLD_SIZE": "4"}


def test_a_signal_as_they_start_leaves_none_behind(monkeypatch):
    """The handler runs between the start of each child and the note that it is there."""
    popen, started = subprocess.Popen, []

    def start_and_be_told(command, **kwargs):
        started.append(popen(command, **kwargs))
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start_and_be_told)
    others = LocalRanks()
    with StopOnSignal() as signals, pytest.raises(Stopped), signals.at_the_end():
        others.start(SLEEP, 3, 3)
    others.end()
    assert len(started) == 2
    assert all(child.returncode == -signal.SIGKILL for child in started)


def test_a_failed_rank_ends_one_that_does_not_notice():
    script = """
import sys, time
from trainer.distributed import local_ranks
local_ranks._NOTICE = 0.1
others = local_ranks.LocalRanks()
others.start([sys.executable, "-c", "import sys; sys.exit(7)"], 2, 2)
time.sleep(600)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 7


def test_one_that_was_killed_is_named():
    script = """
import sys, time
from trainer.distributed import local_ranks
local_ranks._NOTICE = 0.1
others = local_ranks.LocalRanks()
others.start([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"], 2, 2)
time.sleep(600)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "rank 1 was ended by SIGKILL; continue with ckpt_path=last.\n"
