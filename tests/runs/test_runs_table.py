"""Runs side by side: the words of each cell, of what differs, and of sweeps."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from trainer.runs.folder import Run
from trainer.runs.table import COLUMNS, age, cells, differences, sweeps

FOLDER = Path("all")
CONFIG = OmegaConf.create({"model": {"_target_": "models.Wide"}, "guide": {"_target_": "a.b.MeanField"}})
METRICS = {"elbo": -1234.567, "elbo_per_row": -0.12345678, "rows": 10_000, "steps": 4000, "rows_per_second": 98765.4}


def run(name: str = "one", status: str = "done", words: list[str] | None = None, **metrics: float) -> Run:
    class Made(Run):
        overrides = words or []  # type: ignore[assignment]

    return Made(FOLDER / name, status, "why not", CONFIG, metrics, [], 1000.0)


def named(made: Run, now: float = 1090.0) -> dict[str, str]:
    found = cells(made, FOLDER, now)
    assert len(found) == len(COLUMNS) - 1  # the last are the options, which need all runs
    return dict(zip(COLUMNS, found))


def test_a_run_that_is_done():
    assert named(run(**METRICS, held_out_elbo_per_row=-0.5)) == {
        "run": "one", "status": "done", "model": "Wide", "guide": "MeanField", "N": "10,000", "steps": "4,000",
        "rows/s": "98,765", "ELBO": "-1,234.57", "per row": "-0.123457", "held out": "-0.5", "why": "why not",
        "age": "90 s",
    }  # fmt: skip


@pytest.mark.parametrize("status", ["running", "killed", "stopped", "failed"])
def test_figures_of_a_run_without_a_result_are_about(status):
    found = named(run(status=status, **METRICS))
    assert (found["ELBO"], found["per row"]) == ("~-1,234.57", "~-0.123457")
    assert (found["N"], found["steps"], found["held out"]) == ("10,000", "4,000", "")


def test_what_is_not_known_is_blank():
    found = named(run(status="failed"))
    assert {found[name] for name in ("N", "steps", "rows/s", "ELBO", "per row", "held out")} == {""}


def test_rows_that_were_left_out_are_told():
    assert named(run(**{**METRICS, "rows_left_out": 250}))["N"] == "10,000 of 10,250"


def test_words_that_not_all_were_given_differ():
    own = ["run_dir=a", "trial=3", "ckpt_path=last", "sweep_dir=s"]
    runs = [run(words=["model=wide", "seed=1", *own]), run(words=["seed=2", "model=wide"]), run(words=["model=wide"])]
    assert differences(runs) == ["seed=1", "seed=2", ""]
    assert differences(runs[:1]) == [""]
    assert differences([]) == []


def test_a_sweep_is_told_with_its_best(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("s", "t", "plain"):
        (FOLDER / name).mkdir(parents=True)
    (FOLDER / "s" / "multirun.yaml").touch()
    (FOLDER / "t" / "multirun.yaml").touch()
    runs = [
        run("s/0", elbo_per_row=-0.75),
        run("s/1", elbo_per_row=-0.9, held_out_elbo_per_row=-0.5),
        run("s/2", "failed", elbo_per_row=-0.1),
        run("t/0", "killed"),
        run("plain/0", elbo_per_row=-0.1),
    ]
    assert sweeps(runs, FOLDER) == [
        "sweep s: 3 jobs, 2 done, 1 failed; the best, -0.5: s/1",
        "sweep t: 1 jobs, 1 killed",
    ]
    assert sweeps([], FOLDER) == []


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-1, "0 s"),
        (90, "90 s"),
        (119, "119 s"),
        (120, "2 min"),
        (600, "10 min"),
        (7199, "120 min"),
        (7200, "2 h"),
        (9000, "2 h"),
        (172_800, "2 d"),
        (1e6, "12 d"),
    ],
)
def test_an_age_is_in_its_largest_unit(seconds, words):
    assert age(seconds) == words
