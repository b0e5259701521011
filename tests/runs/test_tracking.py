"""Trackers, against a server: one run through all its launches, with its data, its code and its answer."""

import importlib.util
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from app_tools import config, svi
from wandb_server import Server, wandb_server

from trainer.data.shards.files import read_index
from trainer.errors import UserError
from trainer.runs.loggers import _group
from trainer.runs.tracking import keep_id, kept_id
from trainer.verbs import sync

RUN = ("train", "model._target_=app_models.linear", "trainer=cpu", "program=eager", "batch_size=256", "threads=1",
       "stop=budget", "recipe=plain", "schedule=constant", "ckpt_path=last", "slots=10")  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with wandb_server() as running:
        yield running


@pytest.mark.slow
def test_a_run_and_what_follows_it_are_one_run_of_the_server(server, shards, tmp_path):
    for steps in (10, 20):
        done = svi(*RUN, f"data.path={shards}", f"run_dir={tmp_path}/run", f"max_steps={steps}", "logger=wandb",
                   "checkpoint.track=true", SLURM_JOB_ID="77", **server.environment)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "takes no" not in done.stdout
    told = [run for run in server.runs if run["jobType"]]
    assert len(told) == 2
    assert {(run["name"], run["groupName"], run["jobType"]) for run in told} == {
        (json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"], "77", "train")
    }
    configs = [json.loads(run["config"]) for run in server.runs if run["config"]]
    assert any("svi-trainer" in each.get("code", {}).get("value", {}) for each in configs)
    digest = read_index(shards / "train").digest
    made = {each["artifactTypeName"]: each for each in server.artifacts}
    assert made.keys() == {"dataset", "posterior", "checkpoint"}
    assert json.loads(made["dataset"]["metadata"])["index"] == digest
    assert made["dataset"]["artifactCollectionName"] == f"data-{digest[:12]}"
    assert any("elbo_per_row" in figures for figures in server.figures)


@pytest.mark.slow
def test_what_was_logged_offline_is_sent_later_and_once(server, shards, tmp_path):
    for steps in (10, 20):
        done = svi(*RUN, f"data.path={shards}", f"run_dir={tmp_path}/run", f"max_steps={steps}", "logger=wandb",
                   WANDB_MODE="online", WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="a" * 40)  # fmt: skip
        assert f"svi sync {tmp_path}/run uploads it later" in done.stdout
    sent = len(server.runs)
    gone = svi("sync", f"{tmp_path}", WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="a" * 40)
    assert gone.returncode == 2
    assert "http://127.0.0.1:9 cannot be reached" in gone.stderr
    assert "nothing was sent, 2 wait" in gone.stderr
    done = svi("sync", f"{tmp_path}", **server.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["1 of 2", "2 of 2"]
    name = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    assert {run["name"] for run in server.runs[sent:]} == {name}
    assert sync.run(config("sync", f"dir={tmp_path}"), tmp_path) == 0


def test_what_wandb_marked_is_not_sent_again(tmp_path):
    for name in ("offline-run-2-b", "offline-run-1-a", "run-3-c"):
        path = tmp_path / "r" / "wandb" / name
        path.mkdir(parents=True)
        (path / f"run-{name[-1]}.wandb").touch()
    assert [path.name for path in sync.unsent(tmp_path)] == ["offline-run-1-a", "offline-run-2-b"]
    (tmp_path / "r" / "wandb" / "offline-run-1-a" / "run-a.wandb.synced").touch()
    assert [path.name for path in sync.unsent(tmp_path)] == ["offline-run-2-b"]
    with pytest.raises(UserError, match=r"dir=.*nowhere is not a folder"):
        sync.run(config("sync", f"dir={tmp_path}/nowhere"), tmp_path)


def test_the_group_is_the_sweep_or_the_job(tmp_path, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert _group(tmp_path / "run") is None
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert _group(tmp_path / "run") == "8"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    assert _group(tmp_path / "run") == "7"
    (tmp_path / "multirun.yaml").touch()
    assert _group(tmp_path / "run") == tmp_path.name


def test_names_of_a_run_are_kept(tmp_path):
    assert kept_id(tmp_path, "wandb") is None
    keep_id(tmp_path, "wandb", "a")
    keep_id(tmp_path, "mlflow", "b")
    assert (kept_id(tmp_path, "wandb"), kept_id(tmp_path, "mlflow")) == ("a", "b")


@pytest.fixture(scope="session")
def mlflow_python(pytestconfig: pytest.Config) -> Path:
    """The Python of an environment of its own, kept between runs: MLflow wants an older pyarrow than we test."""
    place = Path(pytestconfig.cache.mkdir("mlflow-" + version("mlflow-skinny")))  # type: ignore[union-attr]
    python = place / "bin" / "python"
    if not (place / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
        install = [python, "-m", "pip", "install", "-q", "--no-compile", f"mlflow=={version('mlflow-skinny')}"]
        subprocess.run(install, check=True, timeout=600)
        (place / "ready").touch()
    return python


@pytest.fixture
def mlflow_server(mlflow_python: Path, tmp_path: Path, free_port: int) -> Iterator[str]:
    """The address of an `mlflow server` on SQLite."""
    address = f"http://127.0.0.1:{free_port}"
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            [mlflow_python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(free_port),
             "--workers", "1", "--backend-store-uri", f"sqlite:///{tmp_path}/server.db",
             "--artifacts-destination", str(tmp_path / "kept")],
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        while True:
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mlflow_has_one_run_with_its_figures_data_and_answer(mlflow_server, shards, tmp_path):
    from mlflow.tracking import MlflowClient

    options = (f"data.path={shards}", f"run_dir={tmp_path}/run", "logger=mlflow",
               f"logger.mlflow.tracking_uri={mlflow_server}", "logger.mlflow.artifact_location=null")  # fmt: skip
    for steps in (10, 20):
        done = svi(*RUN, *options, f"max_steps={steps}")
        assert done.returncode == 0, done.stderr
        assert "takes no" not in done.stdout
    client = MlflowClient(mlflow_server)
    experiment = client.get_experiment_by_name("svi")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == kept_id(tmp_path / "run", "mlflow")
    assert run.info.status == "FINISHED"
    assert run.data.tags["data.index"] == read_index(shards / "train").digest
    assert run.data.params["batch_size"] == "256"
    assert [each.step for each in client.get_metric_history(run.info.run_id, "elbo_per_row")] == [10, 20]
    files = {each.path for each in client.list_artifacts(run.info.run_id, "posterior")}
    assert files == {"posterior/summary.csv", "posterior/metrics.json", "posterior/posterior.pt"}


def test_an_mlflow_server_that_does_not_answer_is_left_out(fit, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    fit("max_steps=5", "logger=mlflow", "logger.mlflow.tracking_uri=http://127.0.0.1:9")
    assert "MLflow: http://127.0.0.1:9 cannot be reached" in capsys.readouterr().out
