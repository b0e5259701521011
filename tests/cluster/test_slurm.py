"""On a real Slurm: two nodes of two ranks, preempted or short of a rank, and bit for bit the same at the end."""

import os
import signal
from pathlib import Path

import pytest
import torch
from slurm_tools import ROOT, Cluster, until

from trainer.engine import checkpoint

TRAIN = ("--nodes=2", "--ntasks-per-node=2", str(ROOT / "slurm" / "train.sbatch"), "model=logistic", "data.path=shards",
         "batch_size=512", "max_steps=300", "checkpoint.every_n_steps=50", "program=eager", "slots=10",
         "stop=budget", "recipe=plain")  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm"), pytest.mark.timeout(1200)]


def final(run_dir: Path):
    path = checkpoint.newest(run_dir / "checkpoints")
    assert path is not None, f"{run_dir} has no checkpoint"
    return checkpoint.load(path)


@pytest.fixture(scope="module")
def uninterrupted(slurm: Cluster):
    job = slurm.submit(*TRAIN, "run_dir=straight")
    assert slurm.ended(job) == {"COMPLETED"}, (slurm.folder / f"svi-train-{job}.log").read_text()
    assert (slurm.folder / "svi-logs" / job / "rank-3.log").exists()
    state, facts = final(slurm.folder / "straight")
    assert facts["world_size"] == 4
    assert int(state.step) == 300
    return state


@pytest.mark.failure(what="a job of `slurm/train.sbatch`, 2 nodes of 2 ranks, is preempted", lost="nothing")
def test_a_preempted_job_goes_on_and_ends_with_the_same_bits(slurm: Cluster, uninterrupted, seen):
    job = slurm.submit("--partition=low", *TRAIN, "run_dir=preempted")
    until(lambda: list((slurm.folder / "preempted" / "checkpoints").glob("*.json")), "the first checkpoint")
    urgent = slurm.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap", "true")
    assert slurm.ended(urgent) == {"COMPLETED"}
    assert slurm.ended(job) == {"COMPLETED"}
    assert slurm.facts(job)["Restarts"] == "1"
    log = (slurm.folder / "svi-logs" / job / "rank-0.log").read_text()
    stopped = [line for line in log.splitlines() if line.startswith("stopped by SIGUSR1 at step")]
    assert "continuing from step" in log
    state, _ = final(slurm.folder / "preempted")
    for name in ("theta", "average"):
        assert torch.equal(getattr(state, name), getattr(uninterrupted, name)), name
    summaries = [(slurm.folder / run / "summary.csv").read_bytes() for run in ("straight", "preempted")]
    assert summaries[0] == summaries[1]
    seen(stopped[0], "138, queued again")


@pytest.mark.failure(
    what="a rank of such a job is killed",
    lost="at most the steps since the last checkpoint; submitted again, it resumes",
)
def test_a_job_that_lost_a_rank_ends_and_goes_on_when_it_is_submitted_again(slurm: Cluster, uninterrupted, seen):
    held = [word for word in TRAIN if not word.startswith("model=")]
    line = (*held, "model._target_=cluster_models.Held", "model.go=go-0", "slots=5", "checkpoint.every_n_steps=5")
    job = slurm.submit(*line, "run_dir=lost")
    until(lambda: list((slurm.folder / "lost" / "checkpoints").glob("*.json")), "the first checkpoint")
    os.kill(slurm.pid(job, "node2", 3), signal.SIGKILL)
    assert slurm.ended(job) == {"FAILED"}
    assert slurm.facts(job)["ExitCode"] == "137:0"
    assert slurm.facts(job)["Restarts"] == "0"
    killed = "srun: error: node2: task 3: Killed"
    assert killed in (slurm.folder / f"svi-train-{job}.log").read_text()
    (slurm.folder / "go-0").touch()
    again = slurm.submit(*line, "run_dir=lost")
    assert slurm.ended(again) == {"COMPLETED"}
    assert "continuing from step" in (slurm.folder / "svi-logs" / again / "rank-0.log").read_text()
    assert torch.equal(final(slurm.folder / "lost")[0].theta, uninterrupted.theta)
    seen(killed, 137)


def test_the_doctor_sees_all_ranks_of_an_allocation_and_one_that_srun_did_not_start(slurm: Cluster):
    well = slurm.run("srun", "--nodes=2", "--ntasks-per-node=2", "svi", "doctor", "threads=1")
    said = " ".join(well.stdout.split())  # in lines that break where a path is long
    assert "4 on 2 machines, a sum over them takes" in said
    assert "is the same on all ranks" in said
    job = slurm.submit("--ntasks=2", "--output=doctor.log", "--wrap", "svi doctor threads=1")
    assert slurm.ended(job) == {"FAILED"}
    assert "2 tasks, and this is none of them" in (slurm.folder / "doctor.log").read_text()
