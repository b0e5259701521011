"""A fork that tests take for a process of `svi` sees what a fresh one sees, and ends as one."""

import json
import os
import signal
import subprocess
import sys

import pytest
from app_tools import start, svi
from forked import Forked, can_fork, command_environment

OWN = """
import json, logging, multiprocessing, os, signal, sys, threading, torch, warnings
from trainer.inference.isolation import is_fork
print("seen " + json.dumps({
    "argv": sys.argv, "path": sys.path, "flags": list(sys.flags), "warnoptions": sys.warnoptions,
    "filters": [repr(each) for each in warnings.filters][-5:],
    "environment": dict(os.environ), "folder": os.getcwd(), "group": os.getpgid(0),
    "signals": [getattr(signal.getsignal(n), "__name__", signal.getsignal(n)) for n in sorted(signal.valid_signals())],
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "main": [sys.modules["__main__"].__spec__.name, sys.modules["__main__"].__file__],
    "threads": [threading.active_count(), torch.get_num_threads()],
    "fork": is_fork(), "parent": multiprocessing.parent_process(), "root": len(logging.root.handlers),
    "files": sorted(os.listdir("/proc/self/fd")), "stdin": sys.stdin.read(), "umask": os.umask(0o22),
    "stdout": [sys.stdout.encoding, sys.stdout.line_buffering, sys.stdout.write_through, sys.stdout.errors],
}), flush=True)
"""

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
ASK = ("train", "model._target_=own.nothing", "data.path=x")


@pytest.mark.slow
def test_a_fork_sees_what_a_fresh_process_sees(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    seen = []
    for real in (True, False):
        process = start(*ASK, output=subprocess.PIPE, environment={"OF_A_TEST": "1"}, real=real)
        assert isinstance(process, Forked) != real
        out, err = process.communicate(timeout=120)
        assert (process.returncode, "own has no nothing" in err) == (2, True), err
        seen.append(json.loads(out.partition("seen ")[2].splitlines()[0]))
    assert seen[0] == seen[1]


def test_a_fork_ends_as_it_is_ended(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("import sys\nsys.stdout.write('begun\\n')\nsys.stdout.flush()\nwhile True: pass\n")
    for number in (signal.SIGKILL, signal.SIGALRM):
        process = start(*ASK, output=subprocess.PIPE, start_new_session=True)
        try:
            assert process.stdout.readline() == "begun\n"
            assert process.poll() is None
            assert os.getpgid(process.pid) == process.pid
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.0)
            process.send_signal(number)
            assert process.communicate(timeout=60) == ("", "")
            assert process.returncode == process.poll() == -number
        finally:
            process.kill()  # of what has ended: nothing


def test_what_a_process_reads_at_its_start_is_not_forked():
    plain = command_environment()
    assert can_fork(plain)
    assert can_fork({**plain, "PYTHONPATH": "elsewhere", "WANDB_MODE": "offline"})
    for name in ("PYTHONHASHSEED", "OMP_NUM_THREADS", "SLURM_PROCID", "COVERAGE_PROCESS_CONFIG"):
        assert not can_fork({**plain, name: "7"})
    assert svi("--help").args == [sys.executable, "-m", "trainer", "--help"]
