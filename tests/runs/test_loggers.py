"""Where figures go: metrics.csv always, other loggers in the run's own folder, and W&B that keeps no run waiting."""

import csv
import importlib.util
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from app_tools import config, svi
from omegaconf import OmegaConf

from trainer.errors import UserError
from trainer.options import build
from trainer.runs import loggers, server

KEY = "a" * 40


def metrics(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without a W&B key, and without any setting of W&B."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def answering() -> Iterator[str]:
    """The address of a server that answers, if only "not found"."""
    with HTTPServer(("127.0.0.1", 0), type("NotFound", (BaseHTTPRequestHandler,), {"log_message": print})) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class Recorder:
    """Stands for build.make: keeps the nodes, fails where it is told to, and makes loggers that keep what they get."""

    def __init__(self, fails_online: bool = False):
        self.nodes: list = []
        self.facts: list = []
        self.fails_online = fails_online

    def __call__(self, node):
        self.nodes.append(OmegaConf.to_container(node, resolve=True))
        if self.fails_online and node.get("mode") != "offline":
            raise wandb.errors.CommError("Timed out.\nConsider increasing it.")
        client = SimpleNamespace(update_run=lambda *given, **named: None)
        return SimpleNamespace(
            experiment=client, log_hyperparams=self.facts.append, run_id="0", finalize=lambda status: None
        )


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(build, "make", recorder)
    return recorder


def begin(run_dir: Path, *overrides: str) -> None:
    loggers.make_loggers(config("train", "data.path=x", *overrides), run_dir)


def served_by(monkeypatch: pytest.MonkeyPatch, base_url: str, key: str | None = None, mode: str = "online") -> None:
    """W&B's settings of this process, which it reads once only."""
    settings = SimpleNamespace(base_url=base_url, api_key=key, mode=mode)
    monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=settings))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def test_metrics_are_in_a_csv_file_without_any_logger(fit):
    rows = metrics(fit("max_steps=30", "slots=10", "program=eager"))
    assert [int(row["step"]) for row in rows] == [10, 20, 30]
    assert {"seconds", "elbo", "elbo_per_row", "rows_per_second"} <= rows[0].keys()


def test_tensorboard_gets_the_figures_of_the_csv_file_at_the_same_steps(fit):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = fit("max_steps=30", "slots=10", "program=eager", "logger=tensorboard")
    rows = metrics(run_dir)
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    drawn = events.Scalars("elbo_per_row")
    assert [event.step for event in drawn] == [10, 20, 30]
    assert [event.value for event in drawn] == pytest.approx([float(row["elbo_per_row"]) for row in rows], rel=1e-6)
    assert events.Scalars("final/elbo")[0].step == 30


@pytest.mark.slow
def test_each_job_of_a_sweep_logs_into_its_own_folder(shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = svi(
        "train", "-m", "model._target_=app_models.linear", f"data.path={shards}", "trainer=cpu", "program=eager",
        "logger=tensorboard", "max_steps=4,8", "hydra.sweep.dir=sweep",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for job, steps in (("0", 4), ("1", 8)):
        assert len(list(tmp_path.glob(f"sweep/{job}/tensorboard/events.*"))) == 1
        assert int(metrics(tmp_path / "sweep" / job)[-1]["step"]) == steps
    assert {path.name for path in tmp_path.iterdir()} == {"sweep"}


@pytest.mark.parametrize("logger", ["tensorboard", "mlflow", "wandb"])
def test_what_a_logger_writes_is_under_the_folder_of_the_job(made, monkeypatch, no_key, tmp_path, logger):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    served_by(monkeypatch, "http://127.0.0.1:9")
    begin(tmp_path / "job", f"logger={logger}", "run_dir=elsewhere")
    places = {
        "tensorboard": {"save_dir": f"{tmp_path}/job"},
        "mlflow": {
            "tracking_uri": f"sqlite:///{tmp_path}/job/mlflow.db",
            "artifact_location": f"{tmp_path}/job/mlartifacts",
        },
        "wandb": {"save_dir": f"{tmp_path}/job"},
    }[logger]
    assert places.items() <= made.nodes[0].items()
    assert "elsewhere" not in str(made.nodes)
    assert made.facts[0]["run_dir"] == f"{tmp_path}/job"


@pytest.mark.parametrize(("logger", "package"), [("mlflow", "mlflow"), ("tensorboard", "tensorboard")])
def test_a_missing_package_is_one_sentence_with_the_remedy(monkeypatch, tmp_path, logger, package):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else there(name))
    with pytest.raises(UserError, match=rf"Logger needs the package {package}: pip install {package}\.$"):
        begin(tmp_path, f"logger={logger}")


def test_no_logger_is_no_logger(tmp_path):
    assert loggers.make_loggers(config("train", "data.path=x"), tmp_path) is False


def test_wandb_without_a_key_is_offline_and_asks_nobody(made, no_key, monkeypatch, capsys, silent):
    served_by(monkeypatch, silent)
    monkeypatch.setattr(server.urllib.request, "urlopen", lambda *a, **k: pytest.fail("asked the server"))
    begin(Path("job"), "logger=wandb")
    assert [node["mode"] for node in made.nodes] == ["offline"]
    assert capsys.readouterr().out == (
        "W&B: no API key is set, so this run is logged offline; svi sync job uploads it later.\n"
    )


@pytest.mark.parametrize("where", ["environment", "settings", "netrc"])
def test_a_key_is_found_wherever_wandb_looks(no_key, monkeypatch, tmp_path, answering, where):
    if where == "environment":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    if where == "netrc":
        address = answering.removeprefix("http://")
        (tmp_path / "netrc").write_text(f"machine {address}\n login user\n password {KEY}\n")
        (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setattr(wandb, "login", lambda prompt, verify: True)
    assert server.why_offline(answering, KEY if where == "settings" else None) is None
    monkeypatch.setattr(wandb, "login", lambda prompt, verify: prompt)
    assert server.why_offline(answering, KEY) == "no API key is set"


def test_a_server_that_refuses_or_never_answers_is_given_up(made, no_key, monkeypatch, capsys, silent, free_port):
    monkeypatch.setattr(server, "WAIT", 0.2)
    monkeypatch.setattr(loggers, "WAIT", 0.2)
    monkeypatch.setattr(wandb, "login", lambda **_: pytest.fail("went on to log in"))
    for url, reason in ((silent, "timed out"), (f"http://127.0.0.1:{free_port}", "Connection refused")):
        served_by(monkeypatch, url, KEY)
        begin(Path("job"), "logger=wandb")
        said = capsys.readouterr().out
        assert said.startswith(f"W&B: {url} cannot be reached (")
        assert reason in said
    assert [node["mode"] for node in made.nodes] == ["offline", "offline"]


def test_wandb_itself_is_told_not_to_wait(made, no_key, monkeypatch, answering):
    served_by(monkeypatch, answering, KEY)
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    begin(Path("job"), "logger=wandb")
    assert len(made.nodes) == 1
    assert "mode" not in made.nodes[0]
    assert made.nodes[0]["settings"] == {"init_timeout": loggers.WAIT, "finish_timeout": loggers._FINISH}
    assert 2 * loggers.WAIT <= 10 >= loggers._FINISH
    begin(Path("job"), "logger=wandb", "logger.wandb.settings.init_timeout=60")
    assert made.nodes[1]["settings"] == {"init_timeout": 60, "finish_timeout": loggers._FINISH}
    options = wandb.Settings(**made.nodes[1]["settings"])  # names that this version of W&B knows
    assert options.init_timeout == 60


def test_a_server_that_does_not_take_the_run_means_offline(no_key, monkeypatch, capsys, answering):
    recorder = Recorder(fails_online=True)
    monkeypatch.setattr(build, "make", recorder)
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    served_by(monkeypatch, answering, KEY)
    begin(Path("job"), "logger=wandb")
    assert [node.get("mode") for node in recorder.nodes] == [None, "offline"]
    assert "the server did not take the run (Timed out.), so this run is logged offline" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_the_users_own_mode_is_kept_in_silence(made, no_key, monkeypatch, capsys, silent, mode):
    served_by(monkeypatch, silent, KEY, mode)
    begin(Path("job"), "logger=wandb")
    assert "mode" not in made.nodes[0]
    served_by(monkeypatch, silent, KEY)
    begin(Path("job"), "logger=wandb", f"+logger.wandb.mode={mode}")
    begin(Path("job"), "logger=wandb", "+logger.wandb.offline=true")
    assert made.nodes[1]["mode"] == mode
    assert made.nodes[2]["offline"]
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_run_whose_server_is_silent_ends_with_its_figures_in_its_folder(shards, tmp_path, no_key, silent):
    """The real W&B: nothing but the 5 s that the server has to answer may keep the run."""
    done = svi(
        "train", "model._target_=app_models.linear", f"data.path={shards}", "trainer=cpu", "program=eager",
        "logger=wandb", "max_steps=4", f"run_dir={tmp_path}/run", WANDB_API_KEY=KEY, WANDB_BASE_URL=silent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"W&B: {silent} cannot be reached (timed out), so this run is logged offline" in done.stdout
    assert f"wandb sync {tmp_path}/run/wandb/offline-run-" in done.stdout + done.stderr
    (log,) = tmp_path.glob("run/wandb/offline-run-*/run-*.wandb")
    assert b"elbo_per_row" in log.read_bytes()
    assert len(metrics(tmp_path / "run")) >= 1


@pytest.mark.slow
def test_jobs_of_a_sweep_are_runs_of_their_own_at_wandb(shards, tmp_path, no_key):
    done = svi(
        "train", "-m", "model._target_=app_models.linear", f"data.path={shards}", "trainer=cpu", "program=eager",
        "logger=wandb", "max_steps=4", "seed=1,2", f"hydra.sweep.dir={tmp_path}/sweep",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("W&B: no API key is set, so this run is logged offline") == 2
    for job in "01":
        assert len(list(tmp_path.glob(f"sweep/{job}/wandb/offline-run-*/run-*.wandb"))) == 1
