"""`svi ...` forked from a process that has imported all it needs: what tests use of `subprocess.Popen`, at a tenth of
its time.

Tests of what a process loads, of launchers, of caches between processes and of packages start real ones.
"""

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

_FIXED = ("PYTHON", "OMP_", "MKL_", "OPENBLAS_", "TORCH", "PYRO", "CUDA", "GLOO", "NCCL", "COVERAGE_")
"""How the names of variables begin that a process reads as it starts or imports."""
_LATER = ("PYTHONPATH", "TORCHINDUCTOR_CACHE_DIR")  # these are read when they are needed
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID")  # Lightning reads them as it is imported
_LIMIT = 120.0  # seconds that the server may take to start


def command_environment(**changes: str) -> dict[str, str]:
    """The environment of a command of the tests, where `app_models` can be imported."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
           **changes}  # fmt: skip
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    return env


_ENVIRONMENT = command_environment()  # the server's, whatever a test has set when it starts


def _fixed(environment: dict[str, str]) -> dict[str, str]:
    """What a process reads of ``environment`` before its command can change it."""
    fixed = {"TORCH_CPP_LOG_LEVEL": "ERROR", **environment}  # what the command sets
    return {name: value for name, value in fixed.items() if name.startswith(_FIXED) and name not in _LATER}


def can_fork(environment: dict[str, str]) -> bool:
    """Whether a process of ``environment`` can be a fork of the server's, which has read its own."""
    if not hasattr(os, "pidfd_open") or any(name.startswith("COVERAGE_") for name in environment):
        return False
    return _fixed(environment) == _fixed(_ENVIRONMENT) and not any(name in environment for name in _RANKS)


class Forked:
    """A process of `svi ARGUMENTS`. ``output``: `subprocess.PIPE` or `subprocess.DEVNULL`."""

    def __init__(
        self, arguments: Sequence[str], environment: dict[str, str], output: int, start_new_session: bool = False
    ):
        self.args = [sys.executable, "-m", "trainer", *arguments]
        self.returncode: int | None = None
        request = {
            "arguments": list(arguments), "environment": environment, "folder": os.getcwd(),
            "new_session": start_new_session,
        }  # fmt: skip
        self._status, told = os.pipe()
        null = os.open(os.devnull, os.O_RDWR)
        self.stdout, out = _reader(output, null)
        self.stderr, err = _reader(output, null)
        try:
            self.pid = _server().ask(request, [null, out, err, told])
        finally:
            for file in {null, out, err, told}:
                os.close(file)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, or minus the number of the signal that ended it."""
        if self.returncode is None:
            waiting = select.poll()
            waiting.register(self._status, select.POLLIN)
            if not waiting.poll(None if timeout is None else max(0.0, 1000 * timeout)):
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
            status = os.read(self._status, 20)
            os.close(self._status)
            if not status:
                raise RuntimeError("the fork server has ended before its child")
            self.returncode = os.waitstatus_to_exitcode(int(status))
        return self.returncode

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        try:
            return self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that is left to read of both pipes, once they are closed and it has ended."""
        until = None if timeout is None else time.monotonic() + timeout
        said: dict[str, str] = {}
        readers = [
            threading.Thread(target=_read, args=(said, name), kwargs={"file": file}, daemon=True)
            for name, file in (("stdout", self.stdout), ("stderr", self.stderr))
            if file is not None
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(None if until is None else max(0.0, until - time.monotonic()))
            if reader.is_alive():
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(None if until is None else max(0.0, until - time.monotonic()))
        return said.get("stdout", ""), said.get("stderr", "")

    def send_signal(self, number: int) -> None:
        """To the process, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def _reader(kind: int, null: int) -> tuple[IO[str] | None, int]:
    """What reads a pipe, if it is one, and what the process writes into."""
    if kind == subprocess.DEVNULL:
        return None, null
    assert kind == subprocess.PIPE
    reads, writes = os.pipe()
    return open(reads), writes


def _read(said: dict[str, str], name: str, file: IO[str]) -> None:
    with file:
        said[name] = file.read()


class _Server:
    """`fork_server.py`, which ends with this process."""

    def __init__(self) -> None:
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._turn = threading.Lock()
        with other:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("fork_server.py")), str(other.fileno())],
                env=_ENVIRONMENT, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
        atexit.register(self.end)
        self._socket.settimeout(_LIMIT)

    def ask(self, request: dict[str, Any], files: Sequence[int]) -> int:
        """The id of the process that was forked."""
        with self._turn:
            socket.send_fds(self._socket, [json.dumps(request).encode()], files)
            try:
                answer = self._socket.recv(20)
            except ConnectionResetError:
                answer = b""
            if not answer:
                assert self._process.stdout is not None
                raise RuntimeError(f"the fork server has ended: {self._process.stdout.read()}")
            return int(answer)

    def end(self) -> None:
        self._socket.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


@functools.cache
def _server() -> _Server:
    return _Server()
