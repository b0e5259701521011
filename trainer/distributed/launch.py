"""What a process can tell before anything heavy is imported: its launcher, its rank, its share of the machine."""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
from pathlib import Path

_NO_STEP = 0xFFFFFFF0  # from here on: the batch script, the interactive step and their kin (slurm.h)


def launched_rank() -> int:
    """The rank that a launcher gave this process, 0 where none did; needs no config."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        return int(env["RANK"])
    return int(env["SLURM_PROCID"]) if in_slurm_step() else int(env.get("LOCAL_RANK", "0"))


def in_slurm_step() -> bool:
    """Whether srun started this process as one of several tasks: not where it was typed into a shell that has the
    allocation's variables.
    """
    step = os.environ.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in os.environ and step.isdigit() and int(step) < _NO_STEP and slurm_tasks() > 1


def slurm_tasks() -> int:
    """The tasks of this process's step, else those of its job."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or "1")


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes: node3 of ``node[3-5,9],other``."""
    name = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodes)
    assert name is not None  # every part may be empty
    return "".join(part or "" for part in name.groups())


def port_of_job(job: str) -> int:
    """The port at which ranks of Slurm's job ``job`` meet, unless MASTER_PORT is set; Lightning's choice."""
    return 15000 + int(job[-4:])


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_share(local_size: int) -> int:
    """The bytes of rows that a rank may hold: a quarter of its share of what this machine, or our cgroup, has."""
    limit = Path("/sys/fs/cgroup/memory.max")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        memory = min(memory, int(limit.read_text()))
    return memory // 4 // local_size


def is_restarted() -> bool:
    """Whether torchrun, after a failure, or Slurm, after a requeue, started this job again."""
    return any(int(os.environ.get(name) or 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def die_with_parent() -> None:
    """Has Linux send this process SIGTERM when its parent ends."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        set_parent_death_signal = 1
        prctl(set_parent_death_signal, signal.SIGTERM)


def job_facts(job: str) -> dict[str, str]:
    """What Slurm knows of a job; nothing where it cannot be asked."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "job", "-o", job], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(part.split("=", 1) for part in done.stdout.split() if "=" in part)
