"""`svi doctor`: what a machine or an allocation can do, and what is wrong with it, before hours are spent on it.

Under srun or torchrun every rank looks at its own node, and rank 0 tells of all.
"""

import importlib.util
import os
import platform
import shutil
import socket
import sys
import time
import uuid
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from trainer.cache import cache_folder
from trainer.distributed.launch import job_facts, usable_cores
from trainer.distributed.ranks import World, agree_on, of_all, on_cuda, world
from trainer.errors import counted, first_line
from trainer.options.verbs import Doctor
from trainer.runs.server import why_offline

_SKEW = 2.0  # seconds between clocks, beyond which times of files mislead
_ROOM = 5 * 2**30  # bytes that compiled steps and a few shards take
_SUMS = 20
State = Literal["ok", "note", "wrong"]
_MARKS = {"ok": "[green]✓[/]", "note": "[yellow]·[/]", "wrong": "[red]✗[/]"}


class Finding(NamedTuple):
    """One thing that was looked at; ``said``: what was found, and the remedy where it is wrong."""

    what: str
    state: State
    said: str


class Node(NamedTuple):
    """What a rank sees of its own process and machine."""

    host: str
    python: str
    torch: str
    trainer: str
    cores: int
    gpus: tuple[str, ...]
    compiler: str | None
    cache_room: int
    """Bytes that are free where compiled steps and fetched shards are kept; -1: it cannot be written."""


def run(cfg: Doctor, run_dir: Path) -> float:
    """Prints a table and returns the number of things that are wrong; exits with 1 if there are any."""
    del run_dir
    here, console = world(cfg.trainer), Console(highlight=False)
    found = findings(cfg, here)
    if here.rank:
        return 0.0
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in found:
        table.add_row(_MARKS[finding.state], finding.what, finding.said)
    console.print(table)
    wrong = sum(finding.state == "wrong" for finding in found)
    console.print(f"{wrong} of {len(found)} things are wrong" if wrong else "nothing is wrong")
    if wrong:
        sys.exit(1)
    return 0.0


def findings(cfg: Doctor, here: World) -> list[Finding]:
    """Everything that can be found out; the same list on every rank, but for what is rank 0's alone."""
    folder = Path(cfg.folder)
    if here.external and here.size > 1:
        nodes, group = _together(here, folder, cfg.timeout, on_cuda(cfg.trainer))
    else:
        nodes, group = [look()], [Finding("ranks", "ok", f"{here.size}, started by svi itself")]
        if not os.access(folder, os.W_OK):
            said = f"{folder.absolute()} cannot be written: give folder= and run_dir= another one."
            group.append(Finding("folder", "wrong", said))
    return [
        *_software(nodes),
        *_machines(nodes, here, cfg.threads),
        *group,
        *_slurm(here),
        _tracking(),
    ]


def look() -> Node:
    """This process and its machine."""
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++"))), None)
    gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return Node(
        socket.gethostname(),
        platform.python_version(),
        torch.__version__,
        version("svi-trainer"),
        usable_cores(),
        gpus,
        compiler,
        _room(cache_folder()),
    )


def _room(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{uuid.uuid4().hex}"
        probe.write_bytes(b"0")
        probe.unlink()
    except OSError:
        return -1
    return shutil.disk_usage(folder).free


def _software(nodes: list[Node]) -> list[Finding]:
    found = []
    for name in ("python", "torch", "trainer"):
        versions = {getattr(node, name): node.host for node in nodes}
        shown = {"trainer": "svi-trainer"}.get(name, name)
        if len(versions) == 1:
            found.append(Finding(shown, "ok", next(iter(versions))))
        else:
            differ = ", ".join(f"{each} on {host}" for each, host in sorted(versions.items()))
            found.append(Finding(shown, "wrong", f"{differ}: start all ranks from one environment."))
    without = sorted({node.host for node in nodes if node.compiler is None})
    if without:
        said = f"none on {', '.join(without)}: install g++, or train with program=eager (some 50 times slower)."
        found.append(Finding("compiler", "wrong", said))
    else:
        found.append(Finding("compiler", "ok", str(nodes[0].compiler)))
    for node in {node.host: node for node in nodes}.values():
        if node.cache_room < 0:
            said = f"{cache_folder()} on {node.host} cannot be written: set XDG_CACHE_HOME to a folder that can."
            found.append(Finding("cache", "wrong", said))
        elif node.cache_room < _ROOM:
            said = (
                f"{node.cache_room / 2**30:.1f} GiB are free in {cache_folder()} on {node.host}: free some, or set "
                "XDG_CACHE_HOME to a folder on another disk."
            )
            found.append(Finding("cache", "wrong", said))
        else:
            said = f"{cache_folder()}, {node.cache_room / 2**30:.0f} GiB free on {node.host}"
            found.append(Finding("cache", "ok", said))
    return found


def _machines(nodes: list[Node], here: World, threads: int | None) -> list[Finding]:
    """Cores and GPUs of each machine beside what its ranks take."""
    found = []
    for node in {node.host: node for node in nodes}.values():
        ranks = max(here.local_size, 1)
        each = threads or max(1, node.cores // ranks - 1)
        said = f"{counted(ranks, 'rank')} x {counted(each, 'thread')} on {counted(node.cores, 'core')} of {node.host}"
        if ranks * each > node.cores:
            said += (
                f": {ranks} x {each} > {node.cores}, and threads that share a core are up to 150 times slower; ask for "
                f"{ranks * each} cores (--cpus-per-task={each}), or give threads= fewer."
            )
            found.append(Finding("cores", "wrong", said))
        else:
            found.append(Finding("cores", "ok", said))
        if not node.gpus:
            found.append(Finding("GPUs", "note", f"none on {node.host}: training runs on its cores"))
        elif ranks > len(node.gpus):
            have = f"{counted(ranks, 'rank')} for {counted(len(node.gpus), 'GPU')} on {node.host}"
            said = f"{have}: ask for {ranks} GPUs, or start fewer ranks."
            found.append(Finding("GPUs", "wrong", said))
        else:
            nccl = "NCCL" if dist.is_available() and dist.is_nccl_available() else "no NCCL"
            found.append(Finding("GPUs", "ok", f"{len(node.gpus)} x {node.gpus[0]} on {node.host}, {nccl}"))
    return found


def _together(here: World, folder: Path, timeout: float, cuda: bool) -> tuple[list[Node], list[Finding]]:
    """What the ranks find out about each other: reach, clocks, and a folder that all have to see."""
    backend = "nccl" if cuda else "gloo"
    try:
        token = agree_on(uuid.uuid4().hex, here, backend, timedelta(seconds=timeout))
    except Exception as error:  # every backend has its own
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        said = (
            f"rank {here.rank} found the others by {backend} at {where} not within {timeout:.0f} s "
            f"({first_line(error)}): open that port between the nodes, or name the network with "
            "GLOO_SOCKET_IFNAME= or NCCL_SOCKET_IFNAME=."
        )
        return [look()], [Finding("ranks", "wrong", said)]
    try:
        nodes: list[Any] = of_all(look(), here)
        hosts = len({node.host for node in nodes})
        reached = Finding(
            "ranks", "ok", f"{here.size} on {counted(hosts, 'machine')}, a sum over them takes {_sum_ms(cuda):.2f} ms"
        )
        return nodes, [reached, _clocks(here), _shared(here, folder, token)]
    finally:
        dist.destroy_process_group()


def _sum_ms(cuda: bool) -> float:
    """The median milliseconds of an all-reduce of a small vector."""
    tensor, times = torch.zeros(64, device="cuda" if cuda else "cpu"), []
    for _ in range(_SUMS):
        start = time.perf_counter()
        dist.all_reduce(tensor)
        float(tensor[0])
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[_SUMS // 2]


def _clocks(here: World) -> Finding:
    dist.barrier()
    times = of_all((time.time(), socket.gethostname()), here)
    skew = max(times)[0] - min(times)[0]
    if skew > _SKEW:
        said = f"{skew:.1f} s between {min(times)[1]} and {max(times)[1]}: have both follow one time server."
        return Finding("clocks", "wrong", said)
    return Finding("clocks", "ok", f"within {skew:.1f} s of each other")


def _shared(here: World, folder: Path, token: str) -> Finding:
    """Whether every rank sees what rank 0 writes into ``folder``."""
    path, said = folder / f".svi-doctor-{token}", ""
    if here.rank == 0:
        try:
            path.write_text(token)
        except OSError as error:
            said = f"{folder.absolute()} cannot be written ({error.strerror}): give folder= and run_dir= another one."
    dist.barrier()
    saw = of_all((_sees(path, token), socket.gethostname(), said), here)
    dist.barrier()
    if here.rank == 0:
        path.unlink(missing_ok=True)
    blind = sorted({host for sees, host, _ in saw if not sees})
    if saw[0][2]:
        return Finding("folder", "wrong", saw[0][2])
    if blind:
        said = f"{folder.absolute()} is another one on {', '.join(blind)}: put runs on a file system that all share."
        return Finding("folder", "wrong", said)
    return Finding("folder", "ok", f"{folder.absolute()} is the same on all ranks")


def _sees(path: Path, token: str) -> bool:
    try:
        return path.read_text() == token
    except OSError:
        return False


def _slurm(here: World) -> list[Finding]:
    """The job that this runs in."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return [
            Finding("Slurm", "note", "no job; sbatch is there" if shutil.which("sbatch") else "not on this machine")
        ]
    if here.rank:
        return []
    facts = job_facts(job)
    found = [Finding("Slurm", "ok", f"job {job}, time limit {facts.get('TimeLimit', 'not known')}")]
    if facts.get("Requeue") == "0":
        found.append(Finding("requeue", "note", "off: the job ends with its time; sbatch --requeue resumes it"))
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if tasks > 1 and not here.external:
        said = (
            f"{tasks} tasks, and this is none of them: start svi with srun, or it runs once where {tasks} were meant."
        )
        found.append(Finding("srun", "wrong", said))
    return found


def _tracking() -> Finding:
    """Whether logger=wandb would be online."""
    if importlib.util.find_spec("wandb") is None:
        return Finding("W&B", "note", "not installed")
    import wandb

    settings = wandb.setup().settings
    if settings.mode != "online":
        return Finding("W&B", "note", f"{settings.mode}, by WANDB_MODE")
    reason = why_offline(str(settings.base_url), settings.api_key)
    return (
        Finding("W&B", "ok", "online") if reason is None else Finding("W&B", "note", f"{reason}: runs are kept offline")
    )
