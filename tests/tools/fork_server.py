"""The process that tests fork `svi ...` from: it has imported what the command needs, and does nothing else.

`python fork_server.py FD` serves the Unix socket FD (see `forked.py`) until its other end closes. For each request it
forks; the child takes over the request's arguments, environment, folder and files, undoes what the fork has changed,
and goes on as `python -m trainer ARGUMENTS` does, to its last line: the interpreter's own exit.
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

PRELOADED = (
    *(f"trainer.verbs.{verb}" for verb in ("train", "predict", "export", "doctor", "shard", "runs", "sync")),
    "trainer.cli", "trainer.sweeps.sweep", "optuna.samplers", "optuna.storages", "antlr4.LL1Analyzer", "torch.profiler",
    "rich._emoji_codes",
)  # fmt: skip
LONGEST = 2**20
"""The bytes that a request may have."""


def serve(requests: socket.socket) -> dict:
    """Forks for each request, and tells how each child ended. Returns in a child only, with its request."""
    children: dict[int, tuple[int, int]] = {}  # the descriptor of a process: its id, and where to tell how it ended
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready == requests.fileno():
                content, files, _, _ = socket.recv_fds(requests, LONGEST, 5)
                if not content:
                    os._exit(0)
                *standard, told = files
                pid = os.fork()
                if pid == 0:
                    for number, file in enumerate(standard):
                        os.dup2(file, number)
                    requests.close()
                    for file in (*files, *children, *(other for _, other in children.values())):
                        os.close(file)
                    return json.loads(content)
                for file in standard:
                    os.close(file)
                descriptor = os.pidfd_open(pid)
                children[descriptor] = (pid, told)
                poll.register(descriptor, select.POLLIN)
                requests.send(str(pid).encode())
            else:
                poll.unregister(ready)
                pid, told = children.pop(ready)
                _, status = os.waitpid(pid, 0)
                os.close(ready)
                with contextlib.suppress(BrokenPipeError):  # nobody waits for it
                    os.write(told, str(status).encode())
                os.close(told)


def become_fresh(request: dict, base: list[str]) -> None:
    """Makes this fork what a process is that begins with the request; ``base``: the import path of any process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["new_session"]:
        os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [os.getcwd(), *(os.path.abspath(place) for place in places if place), *base]
    sys.path_importer_cache.clear()
    sys.argv = ["-m", *request["arguments"]]
    sys.orig_argv[:] = [sys.executable, "-m", "trainer", *request["arguments"]]
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.modules["__main__"].__dict__["__builtins__"] = __builtins__
    tempfile.tempdir = None
    sys.modules["numpy"].random.seed()
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests and their commands
    given = [os.path.abspath(place) for place in os.environ["PYTHONPATH"].split(os.pathsep)]
    rest = [place for place in sys.path[1:] if place not in given]
    sys.path[:] = [os.getcwd(), *rest]
    preload()
    become_fresh(serve(socket.socket(fileno=int(sys.argv[1]))), rest)
    runpy._run_module_as_main("trainer")
