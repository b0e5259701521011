"""Sweeps on a real Slurm: workers of slurm/sweep.sbatch on one study, and jobs of submitit's, stopped and killed."""

import re
import shlex
import subprocess
from pathlib import Path

import optuna
import pytest
from slurm_tools import ROOT, Cluster, until

from trainer.runs import folder as run_folder
from trainer.sweeps.study import open_storage

SEARCH = ("model._target_=cluster_models.Held", "data.path=shards", "batch_size=512", "max_steps=300", "program=eager",
          "slots=10", "recipe=plain", "stop=budget", "optimizer.lr=tag(log,interval(0.01,0.3))",
          "hydra.sweeper.sampler.seed=0")  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm"), pytest.mark.timeout(1200)]


def trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(storage=open_storage(str(folder / "journal")), study_name=folder.name).trials


def have_begun(folder: Path, *numbers: int) -> None:
    until(lambda: all((folder / str(each) / "metrics.csv").exists() for each in numbers), f"the start of {numbers}")


def assert_best(slurm: Cluster, folder: Path, found: list[optuna.trial.FrozenTrial]) -> None:
    """`svi runs best=true` prints the winner's command and nothing else."""
    winner = max((trial for trial in found if trial.value is not None), key=lambda trial: trial.value)
    best = slurm.run("svi", "runs", folder.name, "best=true")
    words = [word for word in winner.user_attrs["overrides"] if not word.startswith("sweep_dir=")]
    assert best.stdout == shlex.join(["svi", "train", *words]) + "\n"


@pytest.mark.failure(
    what="workers of `slurm/sweep.sbatch`: one is told that its time is up, another is killed",
    lost="nothing of the one, the steps since the last checkpoint of the other; the next worker resumes both trials",
)
def test_a_sweep_goes_on_when_a_worker_is_stopped_and_another_killed(slurm: Cluster, seen):
    script, folder = str(ROOT / "slurm" / "sweep.sbatch"), slurm.folder / "search"
    job = slurm.submit("--array=1-2", script, *SEARCH, "model.go=go-1", "sweep_dir=search", "hydra.sweeper.n_trials=3")
    have_begun(folder, 0, 1)
    slurm.run("scancel", "--signal=KILL", f"{job}_2.0")
    slurm.run("scancel", "--signal=USR1", f"{job}_1")
    until(lambda: slurm.states(f"{job}_1") != {"RUNNING"}, "the stop of a worker")
    (slurm.folder / "go-1").touch()
    assert slurm.ended(job) == {"COMPLETED", "FAILED"}
    assert slurm.facts(f"{job}_1")["Restarts"] == "1"
    assert slurm.facts(f"{job}_2")["ExitCode"] == "137:0"
    logs = [(slurm.folder / f"svi-sweep-{job}-{task}.log").read_text() for task in (1, 2)]
    assert "worker 1 is queued again" in logs[0]
    assert logs[0].count("continuing from step") == 1
    assert "3 of 3 trials: 3 complete" in logs[0]
    found = trials(folder)
    assert [trial.state.name for trial in found] == ["COMPLETE"] * 3
    assert_best(slurm, folder, found)
    said = re.search(r"stopped by SIGUSR1 at step.*", logs[0])
    assert said is not None
    seen(said[0], "138, queued again; 137")


def test_a_sweep_without_a_place_to_meet_is_refused(slurm: Cluster):
    job = slurm.submit("--array=1", str(ROOT / "slurm" / "sweep.sbatch"), *SEARCH)
    assert slurm.ended(job) == {"FAILED"}
    assert "say where the workers meet: sweep_dir=DIR" in (slurm.folder / f"svi-sweep-{job}-1.log").read_text()


@pytest.mark.failure(
    what="jobs of `hydra/launcher=slurm`: one is told that its time is up, another is killed",
    lost="nothing of the one, which is queued again; the killed one is a trial that failed",
)
def test_a_search_of_jobs_goes_on_when_one_is_stopped_and_one_killed(slurm: Cluster, seen):
    """Submitit asks Slurm's accounting what became of them."""
    folder = slurm.folder / "jobs"
    with (slurm.folder / "jobs.log").open("w") as log:
        command = [
            "svi", "train", "-m", "hydra/sweeper=optuna", "hydra/launcher=slurm", "hydra.sweeper.n_jobs=2",
            "hydra.sweeper.n_trials=2", "hydra.sweeper.storage=jobs/journal", "sweep_dir=jobs", "model.go=go-2",
            *SEARCH,
        ]  # fmt: skip
        search = subprocess.Popen(command, env=slurm.environment, cwd=slurm.folder, stdout=log, stderr=log)
    try:
        have_begun(folder, 0, 1)
        (place,) = folder.glob(".submitit/*_0")
        job = place.name.removesuffix("_0")
        slurm.run("scancel", "--signal=KILL", f"{job}_0.0")
        slurm.run("scancel", "--signal=USR1", f"{job}_1")
        until(lambda: not slurm.states(job) & {"RUNNING", "COMPLETING"}, "the end of both jobs")
        (slurm.folder / "go-2").touch()
        code = search.wait(300)
    finally:
        search.kill()
    said = (slurm.folder / "jobs.log").read_text()
    assert code == 0, said
    found = trials(folder)
    assert [trial.state.name for trial in found] == ["FAIL", "COMPLETE"]
    assert [run.status for run in run_folder.find(folder)] == ["killed", "done"]
    assert "trial 1 was stopped before its end, and waits" in said
    assert_best(slurm, folder, found)
    failed = re.search(r"trial 0 failed: .*", said)
    assert failed is not None
    seen(failed[0].replace(f"{slurm.folder}/", "").replace(job, "JOB"), code)
