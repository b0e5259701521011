"""The process that tests fork `svi ...` from: it has imported what the command needs, and does nothing else.

`python fork_server.py SOCKET` listens there (see `forked.py`) until its input ends. For each request it forks; the
child takes over the request's arguments, environment, folder and files, undoes what the fork has changed, and goes on
as `python -m MODULE ARGUMENTS` does, to its last line: the interpreter's own exit.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
import types
from typing import Any

PRELOADED = (
    *(f"trainer.verbs.{verb}" for verb in ("train", "predict", "latents", "export", "doctor", "shard", "runs", "sync")),
    "trainer.cli", "trainer.sweeps.sweep", "optuna.samplers", "optuna.storages", "antlr4.LL1Analyzer", "torch.profiler",
    "torch._inductor.compile_fx", "rich._emoji_codes",
)  # fmt: skip
LONGEST = 2**20
"""The bytes that a request may have."""


Children = dict[int, tuple[int, socket.socket]]
"""The descriptor of a process: its id, and the connection that asked for it."""


def serve(listener: socket.socket) -> dict:
    """Forks for each request, and answers with the child's id, then how it ended. Returns in a child only, with its
    request.
    """
    children: Children = {}
    poll = select.poll()
    for file in (sys.stdin, listener):
        poll.register(file, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready == sys.stdin.fileno():
                os._exit(0)
            elif ready == listener.fileno():
                connection, _ = listener.accept()
                content, files, _, _ = socket.recv_fds(connection, LONGEST, 3)
                pid = os.fork()
                if pid == 0:
                    take_over(files, children, listener, connection)
                    return json.loads(content)
                for file in files:
                    os.close(file)
                descriptor = os.pidfd_open(pid)
                children[descriptor] = (pid, connection)
                poll.register(descriptor, select.POLLIN)
                connection.send(str(pid).encode())
            else:
                poll.unregister(ready)
                tell(ready, *children.pop(ready))


def take_over(files: list[int], children: Children, *sockets: socket.socket) -> None:
    """Makes the request's files those of this child, and closes what is the server's."""
    for number, file in enumerate(files):
        os.dup2(file, number)
    for other in (*sockets, *(connection for _, connection in children.values())):
        other.close()
    for file in (*files, *children):
        os.close(file)


def tell(descriptor: int, pid: int, connection: socket.socket) -> None:
    """Tells who asked for the process how it has ended."""
    _, status = os.waitpid(pid, 0)
    os.close(descriptor)
    with connection, contextlib.suppress(BrokenPipeError):  # nobody waits for it
        connection.send(str(status).encode())


def become_fresh(request: dict, base: list[str], on_interrupt: Any) -> None:
    """Makes this fork what a process is that begins with the request; ``base``: the import path of any process."""
    signal.signal(signal.SIGINT, on_interrupt)
    if request["new_session"]:
        os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [os.getcwd(), *(os.path.abspath(place) for place in places if place), *base]
    sys.path_importer_cache.clear()
    sys.argv = ["-m", *request["arguments"]]
    sys.orig_argv[:] = [sys.executable, "-m", request["module"], *request["arguments"]]
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.modules["__main__"].__dict__["__builtins__"] = __builtins__
    tempfile.tempdir = None
    sys.modules["numpy"].random.seed()
    sys.modules["torch"].default_generator.seed()
    sys.modules["trainer.inference.isolation"]._is_fork = False  # no thread is missing: there was one


def preload() -> None:
    """Imports what the command needs, as a process whose first module is `trainer.cli`."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command does before it imports torch
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # pyarrow's allocator has a thread otherwise
    for name in PRELOADED:
        importlib.import_module(name)
    assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1, "a fork has no other thread"
    assert not sys.modules["torch"].cuda.is_initialized()
    gc.collect()
    gc.freeze()  # children do not copy its pages by looking at them


if __name__ == "__main__":
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests and their commands
    given = [os.path.abspath(place) for place in os.environ["PYTHONPATH"].split(os.pathsep)]
    rest = [place for place in sys.path[1:] if place not in given]
    sys.path[:] = [os.getcwd(), *rest]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(sys.argv[1])
        listening.listen()
        preload()
        asked = serve(listening)
    become_fresh(asked, rest, handler)
    runpy._run_module_as_main(asked["module"])
