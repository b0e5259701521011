"""`svi ...` forked from a process that has imported all it needs: what tests use of `subprocess.Popen`, at a tenth of
its time.

Tests of what a process loads, of launchers, of caches between processes and of packages start real ones. In a script
of a test `python forked.py ARGUMENTS` is `svi ARGUMENTS`.
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
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

_FIXED = ("PYTHON", "OMP_", "MKL_", "OPENBLAS_", "TORCH", "PYRO", "CUDA", "GLOO", "NCCL")
"""How the names of variables begin that a process reads as it starts or imports."""
_LATER = ("PYTHON", "PYTHONPATH", "TORCHINDUCTOR_CACHE_DIR")  # read by scripts, set anew, read when needed
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID")  # Lightning reads them as it is imported
ADDRESS = "SVI_FORK_SERVER"  # names the socket of a server to `python forked.py`
_SHORT = 20  # bytes of an answer


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
    """A process of `python -m MODULE ARGUMENTS`. ``output``: `subprocess.PIPE` or `subprocess.DEVNULL`."""

    def __init__(
        self, module: str, arguments: Sequence[str], environment: dict[str, str], output: int,
        start_new_session: bool = False,
    ):  # fmt: skip
        self.args = [sys.executable, "-m", module, *arguments]
        self.returncode: int | None = None
        null = os.open(os.devnull, os.O_RDWR)
        self.stdout, out = _reader(output, null)
        self.stderr, err = _reader(output, null)
        request = _request(module, arguments, environment, start_new_session)
        try:
            self.pid, self._connection = server().ask(request, [null, out, err])
        finally:
            for file in {null, out, err}:
                os.close(file)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, or minus the number of the signal that ended it."""
        if self.returncode is None:
            waiting = select.poll()
            waiting.register(self._connection, select.POLLIN)
            if not waiting.poll(None if timeout is None else max(0.0, 1000 * timeout)):
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
            with self._connection:
                self.returncode = _ended(self._connection)
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


def _request(module: str, arguments: Sequence[str], environment: dict[str, str], new_session: bool) -> bytes:
    request = {"module": module, "arguments": list(arguments), "environment": environment, "folder": os.getcwd(),
               "new_session": new_session}  # fmt: skip
    return json.dumps(request).encode()


def _asked(address: str, request: bytes, files: Sequence[int]) -> socket.socket:
    """The connection on which the server at ``address`` tells the process's id, then how it has ended."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(address)
        socket.send_fds(connection, [request], files)
    except OSError:
        connection.close()
        raise
    return connection


def _ended(connection: socket.socket) -> int:
    status = connection.recv(_SHORT)
    if not status:
        raise RuntimeError("the fork server has ended before its child")
    return os.waitstatus_to_exitcode(int(status))


class _Server:
    """`fork_server.py`, which ends with this process."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fork-")
        self.address = f"{self._folder.name}/server"
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py")), self.address],
            env=_ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        atexit.register(self.end)

    def ask(self, request: bytes, files: Sequence[int]) -> tuple[int, socket.socket]:
        """The id of a new process, and the connection that tells how it has ended."""
        while self._process.poll() is None:
            try:
                connection = _asked(self.address, request, files)
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.05)  # it does not listen yet
                continue
            if answer := connection.recv(_SHORT):
                return int(answer), connection
            self._process.wait()
        assert self._process.stdout is not None
        raise RuntimeError(f"the fork server has ended: {self._process.stdout.read()}")

    def end(self) -> None:
        self._process.communicate()
        self._folder.cleanup()


@functools.cache
def server() -> _Server:
    """The one of this process, which starts at the first call."""
    return _Server()


def main() -> None:
    """`svi ARGUMENTS` with the environment, the folder and the files of this process, by the server that it names."""
    environment = dict(os.environ)
    address = environment.pop(ADDRESS)
    with _asked(address, _request("trainer", sys.argv[1:], environment, False), [0, 1, 2]) as connection:
        connection.recv(_SHORT)
        code = _ended(connection)
    sys.exit(code if code >= 0 else 128 - code)  # as a shell says it


if __name__ == "__main__":
    main()
