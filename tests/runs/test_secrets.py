"""Secrets are handed from rank to rank and written nowhere."""

import sys

import pytest
from app_tools import config, svi
from omegaconf import OmegaConf

from trainer import cli
from trainer.options.entrance import resolved
from trainer.runs import secrets
from trainer.runs.secrets import HIDDEN, redacted


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"wandb": {"api_key": "k", "project": "p"}}, {"wandb": {"api_key": HIDDEN, "project": "p"}}),
        ({"secret_access_key": "k", "tokens": ["a", "b"]}, {"secret_access_key": HIDDEN, "tokens": [HIDDEN, HIDDEN]}),
        ({"password": None, "seed": 0, "keys": 3}, {"password": None, "seed": 0, "keys": 3}),
        (["wandb.api_key=k", "+data.token=t", "lr=1"], ["wandb.api_key=***", "+data.token=***", "lr=1"]),
        ("data.path=https://me:pass@host/x", "data.path=https://***@host/x"),
        ("postgresql://me:p%40ss@host:5432/db", "postgresql://***@host:5432/db"),
        ("https://host:8080/a@b", "https://host:8080/a@b"),
        ("s3://bucket/key", "s3://bucket/key"),
    ],
)
def test_what_is_hidden_and_what_is_not(given, kept):
    assert redacted(given) == kept


@pytest.mark.slow
def test_what_ends_a_run_is_told_without_its_secrets(tmp_path, free_port):
    address = f"http://user:hunter2@127.0.0.1:{free_port}/x"
    done = svi("train", "model=linear", f"data.path={address}", f"run_dir={tmp_path}/run")
    assert done.returncode == 2
    assert "http://***@127.0.0.1" in done.stderr
    assert "hunter2" not in done.stderr + (tmp_path / "run" / "end.json").read_text()


def test_the_command_that_trackers_note_has_none(fit, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["svi"])
    words = ["runs", f"dir={tmp_path}", f"hydra.run.dir={tmp_path}", "html=https://me:hunter2@host/x"]
    with pytest.raises(SystemExit):  # there are none
        cli.main(words)
    assert sys.argv == ["svi runs", *words[1:3], "html=https://***@host/x"]


def test_ranks_are_given_what_the_saved_config_hides(monkeypatch):
    cfg = resolved(config("train", "model=linear", "data.path=https://me:pass@host/x", "+model.api_key=k"))
    monkeypatch.setenv("SVI_SECRETS", "")
    secrets.hand_on(cfg)
    saved = OmegaConf.create(redacted(OmegaConf.to_container(cfg, resolve=True)))
    assert saved != cfg
    assert saved.data.path == "https://***@host/x"
    given = secrets.handed_on(saved)
    assert (given.data.path, given.model.api_key) == ("https://me:pass@host/x", "k")


@pytest.mark.slow
def test_no_file_of_a_run_and_no_line_of_it_holds_a_secret(shards, tmp_path):
    run_dir = tmp_path / "run"
    done = svi("train", "model._target_=app_models.with_token", f"data.path={shards}", f"run_dir={run_dir}",
               "max_steps=4", "program=eager", "model.token=hunter2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = [path for path in run_dir.rglob("*") if path.is_file()]
    assert not [path for path in written if b"hunter2" in path.read_bytes()]
    assert "hunter2" not in done.stdout + done.stderr
    for name in ("config", "resolved"):
        assert OmegaConf.load(run_dir / ".hydra" / f"{name}.yaml").model.token == HIDDEN
