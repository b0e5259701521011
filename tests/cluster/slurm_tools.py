"""Jobs that are submitted to a Slurm as a user would."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
WAIT = 400  # seconds for a job


class Cluster:
    """The Slurm that slurm_up brought up; jobs run in ``folder``."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {
            **os.environ,
            "GLOO_SOCKET_IFNAME": "lo",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
        }

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
