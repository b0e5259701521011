"""Runs whose ranks are forked from a process that has imported everything, and what is done to them at a step.

A rank is given what torchrun gives it, so `svi train` takes it for one of its own.
"""

import io
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
_LIMIT = 60.0  # seconds that a run may take before it counts as hanging
ARGUMENTS = ("model._target_=app_models.linear", "batch_size=256", "max_steps=40", "slots=2", "draws=2",
             "checkpoint.every_n_steps=8", "recipe=plain", "stop=budget", "program=eager", "dtype=float64",
             "trainer=cpu", "threads=1", "ckpt_path=last")  # fmt: skip

_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Fault:
    """What happens to ``rank`` at ``step``, or at the ``step``th call of what ``place`` names."""

    rank: int
    step: int
    kind: str
    """Names of signals, in a row; "raise"; "drift" flips a bit of the state; "sh COMMAND" runs it."""
    place: str = "step"
    """"step", "prepare", "block" (of a pass over all rows, or of the final evaluation)."""


@dataclass
class Run:
    """The ranks of one `svi train`."""

    processes: list[BaseProcess]
    folder: Path
    logs: Path
    codes: list[int | None] = field(default_factory=list)

    def wait(self, leave: Sequence[int] = (), within: float = _LIMIT) -> "Run":
        """Until all ranks have ended but those in ``leave``, which are then ended; a run that hangs fails the test."""
        until = time.monotonic() + within
        for rank, process in enumerate(self.processes):
            if rank not in leave:
                process.join(max(0.0, until - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive() and rank not in leave]
        self.end()
        assert not hanging, f"rank {hanging} hangs; {self.said(hanging[0])}"
        return self

    def end(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
        self.codes = [process.exitcode for process in self.processes]

    def out(self, rank: int) -> str:
        path = self.logs / f"{rank}.out"
        return path.read_text() if path.exists() else ""

    def err(self, rank: int) -> str:
        return (self.logs / f"{rank}.err").read_text()

    def said(self, rank: int) -> str:
        return self.out(rank) + self.err(rank)

    def until(self, rank: int, text: str) -> None:
        """Waits until ``rank`` has printed ``text``."""
        until = time.monotonic() + _LIMIT
        while text not in self.out(rank):
            assert time.monotonic() < until, self.said(rank)
            assert self.processes[rank].is_alive(), self.said(rank)
            time.sleep(0.02)


def start(
    shards: Path, run_dir: Path, *overrides: str, ranks: int = 2, faults: Sequence[Fault] = (), port: int | None = None,
    hosts: Sequence[str] = (), cache: Path | None = None,
) -> Run:  # fmt: skip
    """Starts `svi train` on so many ranks; ``hosts``: the network namespace and address of each rank's machine."""
    logs = run_dir.with_name(f"{run_dir.name}-logs-{time.monotonic_ns()}")
    logs.mkdir(parents=True)
    chosen = dict(each.split("=", 1) for each in (*ARGUMENTS, f"data.path={shards}", f"run_dir={run_dir}", *overrides))
    arguments = [f"{name}={value}" for name, value in chosen.items()]
    fork_server()
    port = port or free_port()
    processes: list[BaseProcess] = []
    for rank in range(ranks):
        host = hosts[rank] if hosts else ""
        given = (ranks, rank, port, hosts[0] if hosts else "", host, arguments, logs, list(faults), cache)
        processes.append(_context.Process(target=_rank, args=given, daemon=True))
        processes[-1].start()
    return Run(processes, run_dir, logs)


def fork_server() -> Any:
    """The context of processes that are forked from one in which all is imported."""
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(HERE), str(HERE.parent / "tools"), os.environ.get("PYTHONPATH", "")]
    )
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the command sets it, before torch is imported
    _context.set_forkserver_preload(["preloaded"])
    return _context


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _rank(
    size: int, rank: int, port: int, main: str, host: str, arguments: list[str], logs: Path, faults: list[Fault],
    cache: Path | None,
) -> None:  # fmt: skip
    """One rank, from its first line to its last."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(logs / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, "w", closefd=False), line_buffering=True) for number in (1, 2)
    )
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if size > 1:
        os.environ.update(
            TORCHELASTIC_RUN_ID="test", RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(size), MASTER_ADDR=main.partition("=")[2] or "127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
    if cache:
        os.environ["XDG_CACHE_HOME"] = str(cache)
    if host:
        os.environ["GLOO_SOCKET_IFNAME"] = "host"
        enter_network(host.partition("=")[0])
    from trainer import cli

    for fault in faults:
        if fault.rank == rank:
            inject(fault)
    cli.main(["train", *arguments])


def enter_network(name: str) -> None:
    """Moves this process into the network namespace ``name``."""
    import ctypes

    clone_newnet = 0x40000000
    with open(f"/run/netns/{name}") as file:
        assert ctypes.CDLL(None, use_errno=True).setns(file.fileno(), clone_newnet) == 0


def inject(fault: Fault) -> None:
    """Has ``fault`` happen in this process."""
    from trainer.engine.module import ChunkModule
    from trainer.posterior.full_data import FullData

    calls = 0

    def before(original: Callable[..., Any]) -> Callable[..., Any]:
        def replaced(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if (args[0].step if fault.place == "step" else calls) == fault.step:
                _happen(fault.kind, args[0])
            return original(*args, **kwargs)

        return replaced

    if fault.place == "block":
        FullData._made = before(FullData._made)
    else:
        name = {"step": "training_step", "prepare": "_prepare"}[fault.place]
        setattr(ChunkModule, name, before(getattr(ChunkModule, name)))


def _happen(kind: str, module: Any) -> None:
    if kind == "raise":
        raise ValueError("a fault of rank's own")
    if kind == "drift":
        theta = module.state.theta.clone()
        theta.view(torch.int64)[0] ^= 1
        module.state = module.state._replace(theta=theta)
        return
    if kind.startswith("sh "):
        subprocess.run(kind.removeprefix("sh "), shell=True, check=False)
        return
    for name in kind.split():
        os.kill(os.getpid(), getattr(signal, name))
