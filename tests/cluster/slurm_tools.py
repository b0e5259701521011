"""A real Slurm on this machine, and jobs that are submitted to it as a user would."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir, mkdtemp

import pytest
from filelock import FileLock

ROOT = Path(__file__).parent.parent.parent
TOOLS = ROOT.parent / "shared" / "slurm"
WAIT = 400  # seconds for a job


class Cluster:
    """Two nodes of four declared cores, with accounting; jobs run in ``folder``."""

    def __init__(self, environment: dict[str, str], folder: Path):
        self.environment, self.folder = environment, folder

    def run(self, *command: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=WAIT, check=False
        )

    def submit(self, *arguments: str) -> str:
        """The number of the job that `sbatch ARGUMENTS` queues."""
        done = self.run("sbatch", "--parsable", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def facts(self, job: str) -> dict[str, str]:
        """What Slurm says of a job (of the last task of an array)."""
        out = self.run("scontrol", "show", "job", "-o", job).stdout.splitlines()[-1]
        return dict(part.split("=", 1) for part in out.split() if "=" in part)

    def states(self, job: str) -> set[str]:
        """Those of a job, or of all tasks of an array."""
        return {
            part.removeprefix("JobState=")
            for part in self.run("scontrol", "show", "job", "-o", job).stdout.split()
            if part.startswith("JobState=")
        }

    def pid(self, job: str, node: str, rank: int) -> int:
        """The process of a rank of the first step of a job."""
        lines = [line.split() for line in self.run("scontrol", "listpids", f"{job}.0", node).stdout.splitlines()]
        (pid,) = (int(line[0]) for line in lines if line[4] == str(rank))
        return pid

    def ended(self, job: str) -> set[str]:
        """Its states, once none of its tasks will run any more."""
        until(lambda: not self.states(job) & {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"}, f"job {job}")
        return self.states(job)


def until(done, what: str) -> None:
    """Waits for ``done()``; fails after a time that means that it will never be."""
    for _ in range(2 * WAIT):
        if done():
            return
        time.sleep(0.5)
    raise AssertionError(f"{what} did not come to an end within {WAIT} s")


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A `Cluster` that is gone after the block. Skips where there can be none."""
    if not (TOOLS / "slurm-up").is_file():
        pytest.skip("a script that brings up Slurm on one machine is not beside this repository")
    if os.geteuid() or not shutil.which("apt-get"):
        pytest.skip("Slurm needs root here, and Debian's packages")
    place = mkdtemp(prefix="slurm-")  # short: a socket lies in it
    with FileLock(Path(gettempdir()) / "svi-slurm.lock"):  # one at a time: the ports of a job follow from its number
        up = subprocess.run(
            [TOOLS / "slurm-up", "-a", "-d", place], capture_output=True, text=True, timeout=400, check=False
        )
        try:
            assert up.returncode == 0, up.stderr
            bin_folder = Path(sys.executable).parent
            environment = {
                **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
                "SLURM_CONF": f"{place}/slurm.conf",
                "GLOO_SOCKET_IFNAME": "lo",
                "PATH": f"{bin_folder}:{os.environ['PATH']}",
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
                "PYTHONWARNINGS": "ignore",
                "OMP_NUM_THREADS": "1",
                "WANDB_MODE": "offline",
            }
            yield Cluster(environment, folder)
        finally:
            subprocess.run([TOOLS / "slurm-down", "-d", place], capture_output=True, timeout=120, check=False)
            shutil.rmtree(place, ignore_errors=True)
