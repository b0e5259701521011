"""`svi runs` on made-up run folders, and what a run leaves behind of its end."""

import json
import os
import re
import signal
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from app_tools import config, svi
from filelock import FileLock
from omegaconf import OmegaConf

from trainer import cli
from trainer.engine.signals import Stopped
from trainer.errors import UserError
from trainer.runs import folder as run_folder
from trainer.verbs import train

DONE = {"elbo": -500.0, "elbo_per_row": -0.5, "held_out_elbo_per_row": -0.6, "rows": 1000, "held_out_rows": 100,
        "steps": 40, "rows_per_second": 1234.5, "stop_reason": "converged"}  # fmt: skip
SLOPE = """
import pyro, pyro.distributions as dist

def model(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x * w, 1.0), obs=y)
"""


def made(folder: Path, *overrides: str, metrics: dict | None = None, steps: tuple[int, ...] = (20, 40),
         saved: int | None = None, clock: float = 1000.0) -> Path:  # fmt: skip
    """A run folder; its files were written at ``clock``, and metrics.json a second later."""
    (folder / ".hydra").mkdir(parents=True)
    resolved = {
        "model": {"_target_": "models.Wide"},
        "guide": {"_target_": "trainer.inference.guides.mean_field.MeanField"},
    }
    OmegaConf.save(OmegaConf.create(resolved), folder / ".hydra" / "resolved.yaml")
    OmegaConf.save(OmegaConf.create(["model=wide", *overrides]), folder / ".hydra" / "overrides.yaml")
    rows = [f"{step},{step / 10},512,900.0,{-20_000 / step},{-20 / step}" for step in steps]
    header = "step,seconds,rows,rows_per_second,elbo,elbo_per_row"
    (folder / "metrics.csv").write_text("\n".join([header, *rows, ""]))
    os.utime(folder / "metrics.csv", (clock, clock))
    if saved is not None:
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / f"step_{saved}.ckpt.json").write_text(json.dumps({"step": saved}))
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
        os.utime(folder / "metrics.json", (clock + 1, clock + 1))
    return folder


@pytest.fixture
def verb(tmp_path, monkeypatch):
    """`verb("runs", "dir=x")` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["svi"])
    monkeypatch.setenv("COLUMNS", "300")
    return lambda *arguments: cli.main(list(arguments))


def ended(folder: Path, error: BaseException) -> None:
    """A run that ends with ``error``, after some figures unless it is refused."""

    def run() -> None:
        with run_folder.end_noted(config("train", "data.path=x"), folder):
            if folder.name != "refused":
                (folder / "metrics.csv").touch()
            raise error

    with pytest.raises(type(error)):
        run()


def test_the_status_of_a_run_is_what_its_files_show(tmp_path):
    statuses = {}
    made(tmp_path / "done", metrics=DONE, saved=40)
    made(tmp_path / "pruned", metrics={**DONE, "stop_reason": "pruned"}, saved=40)
    made(tmp_path / "killed", saved=20)
    made(tmp_path / "went_on_and_was_killed", metrics=DONE, saved=60)
    ended(made(tmp_path / "failed"), FloatingPointError("site w is not finite.\nmore"))
    ended(made(tmp_path / "stopped", saved=40), Stopped(signal.SIGTERM))
    ended(made(tmp_path / "interrupted"), KeyboardInterrupt())
    ended(made(tmp_path / "refused", metrics=DONE, saved=40), UserError("holds a run already"))
    again = made(tmp_path / "stopped_then_killed", saved=40)
    ended(again, Stopped(signal.SIGTERM))
    os.utime(again / "end.json", (500, 500))
    (tmp_path / "refused_at_once" / ".hydra").mkdir(parents=True)
    ended(tmp_path / "refused_at_once", UserError("no such data."))
    running = made(tmp_path / "running")
    with FileLock(running / ".lock"):
        for run in run_folder.find(tmp_path):
            statuses[run.folder.name] = (run.status, run.why)
    silent = "no word of how it ended"
    assert statuses == {
        "done": ("done", "converged"),
        "pruned": ("pruned", "pruned"),
        "killed": ("killed", silent),
        "went_on_and_was_killed": ("killed", silent),
        "failed": ("failed", "site w is not finite."),
        "stopped": ("stopped", "stopped by SIGTERM before training; continue with ckpt_path=last"),
        "interrupted": ("stopped", "KeyboardInterrupt"),
        "refused": ("done", "converged"),
        "stopped_then_killed": ("killed", silent),
        "refused_at_once": ("failed", "no such data."),
        "running": ("running", ""),
    }


def test_a_run_that_was_refused_the_folder_leaves_no_word_in_it(tmp_path):
    run = made(tmp_path / "run")
    with FileLock(run / ".lock"):
        ended(run, UserError("is in use by another run"))
        assert not (run / "end.json").exists()


def test_the_table_has_a_line_a_run_and_a_sentence_a_sweep(verb, tmp_path, capsys):
    made(tmp_path / "sweep" / "0", "seed=1", metrics=DONE, saved=40)
    made(tmp_path / "sweep" / "1", "seed=[2,3]", "trial={number:1}", metrics={**DONE, "held_out_elbo_per_row": -0.55})
    (tmp_path / "sweep" / "multirun.yaml").touch()
    made(tmp_path / "alone", "seed=4", steps=(10, 30))
    verb("runs", ".")
    lines = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["run", "status", "model", "guide", "N", "steps", "rows/s", "ELBO", "per row", "held out",
                        "why", "age", "options"]  # fmt: skip
    assert lines[1][:9] == ["alone", "killed", "Wide", "MeanField", "1,000", "30", "900", "~-666.67", "~-0.666667"]
    assert lines[1][-1] == "seed=4"
    assert lines[2][:11] == ["sweep/0", "done", "Wide", "MeanField", "1,000", "40", "1,234", "-500.00", "-0.5", "-0.6",
                             "converged"]  # fmt: skip
    assert lines[3][-1] == "seed=[2,3]"
    assert lines[4] == ["sweep sweep: 2 jobs, 2 done; the best, -0.55: sweep/1"]


def test_rows_left_out_are_told_beside_the_others(verb, tmp_path, capsys):
    made(tmp_path / "run", metrics={**DONE, "rows_left_out": 24})
    verb("runs", ".")
    assert "  1,000 of 1,024  " in capsys.readouterr().out


def test_no_run_and_no_folder_are_said(verb, tmp_path, capsys):
    cases = ((("runs",), "no run was found below ."), (("runs", "nowhere"), "dir=nowhere is not a folder"))
    for words, sentence in cases:
        with pytest.raises(SystemExit) as end:
            verb(*words)
        assert end.value.code == 2
        assert sentence in capsys.readouterr().err


class Page(HTMLParser):
    """What a page shows and what it would load."""

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [v for k, v in attributes if k in ("src", "href", "xlink:href") and not v.startswith("#")]

    def handle_data(self, data):
        self.words += data.split()


def test_the_page_shows_the_runs_and_loads_nothing(verb, tmp_path):
    made(tmp_path / "one", "seed=1", metrics=DONE)
    made(tmp_path / "<b>two", "seed=2", steps=tuple(range(10, 400, 10)))
    made(tmp_path / "three", steps=())
    verb("runs", "--html")
    text = (tmp_path / "runs.html").read_text()
    page = Page(text)
    assert page.loads == []
    assert "@import" not in text
    assert not re.search(r"url\(\s*['\"]?(?!#)", text)
    assert page.tags.count("svg") == 1
    assert page.tags.count("tr") == 4
    assert {"one", "<b>two", "three", "seed=2", "converged"} <= set(page.words)
    assert "b" not in page.tags
    assert 'data-value="-0.6"' in text


def test_best_prints_the_command_of_the_winner_and_nothing_else(verb, tmp_path, capsys):
    made(tmp_path / "s" / "0", "seed=1", metrics=DONE)
    made(tmp_path / "s" / "1", "columns.x=[a, b]", "trial={number:1}", "ckpt_path=last", "sweep_dir=s", "run_dir=r",
         metrics={**DONE, "held_out_elbo_per_row": -0.55})  # fmt: skip
    made(tmp_path / "s" / "2", metrics={**DONE, "held_out_elbo_per_row": -0.1, "stop_reason": "pruned"})
    made(tmp_path / "s" / "3")
    verb("runs", "s", "best=true")
    said = capsys.readouterr()
    assert said.out == "svi train model=wide 'columns.x=[a, b]'\n"
    assert said.err == "s/1: -0.55 nats per row\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("study=x",), "a study is found by both: storage=ADDRESS study=NAME."),
        (("storage=x",), "a study is found by both"),
        (("killed",), "no run at or below killed is done"),
        (("mixed",), "have different rows, 1000 (held out 100) and 17 (held out 100)"),
    ],
)
def test_best_says_what_it_cannot_compare(verb, tmp_path, capsys, words, sentence):
    made(tmp_path / "killed" / "0")
    made(tmp_path / "mixed" / "0", metrics=DONE)
    made(tmp_path / "mixed" / "1", metrics={**DONE, "rows": 17})
    with pytest.raises(SystemExit) as end:
        verb("runs", *words, "best=true")
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_run_leaves_word_of_its_end(verb, tmp_path, monkeypatch, capsys):
    def fails(cfg, run_dir):
        raise UserError("no such data.")

    monkeypatch.setattr(train, "run", fails)
    with pytest.raises(SystemExit) as end:
        verb("train", "data.path=x", "run_dir=run")
    assert end.value.code == 2
    (run,) = run_folder.find(tmp_path)
    assert (run.status, run.why, run.model, run.headline) == ("failed", "no such data.", "", None)
    verb("runs")
    assert "no such data." in capsys.readouterr().out


@pytest.mark.slow
def test_a_stopped_a_killed_and_a_finished_run_are_told_apart(shards, tmp_path):
    common = ("train", f"data.path={shards}", "trainer=cpu", "program=eager", "slots=5", "recipe=plain")
    dying = ("model._target_=app_models.dying", "model.at=60", "max_steps=400")
    svi(*common, *dying, f"run_dir={tmp_path}/killed")
    svi(*common, *dying, f"model.number={int(signal.SIGTERM)}", f"run_dir={tmp_path}/stopped")
    svi(*common, "model._target_=app_models.exploding", "max_steps=400", f"run_dir={tmp_path}/failed")
    svi(*common, "model._target_=app_models.linear", "max_steps=5", f"run_dir={tmp_path}/done")
    runs = {run.folder.name: run for run in run_folder.find(tmp_path)}
    assert {name: run.status for name, run in runs.items()} == {name: name for name in runs}
    assert runs["stopped"].why.startswith("stopped by SIGTERM at step")
    assert runs["failed"].why.startswith("not finite at step")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("model._target_=own_model.model", "data.path=none.csv"), "there is no shard folder at none.csv"),
        (("model._target_=own_model.nothing", "data.path=t.csv"), "own_model has no nothing"),
        (("model._target_=own_model.model", "data.path=t.csv"), "holds text and numbers"),
    ],
)
def test_a_start_that_is_refused_leaves_no_folder_that_nobody_named(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("x,y\n1,2\n?,3\n4,5\n")
    (tmp_path / "own_model.py").write_text(SLOPE)
    done = svi("train", *words)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "runs").exists()
    if "none.csv" in words[1]:
        svi("train", *words, "run_dir=named")
        assert run_folder.read(tmp_path / "named").status == "failed"
