"""`svi train -m hydra/sweeper=optuna` on a function in place of training: spaces, failures, workers, restarts."""

import math
import re
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from app_tools import HERE, start, svi
from forked import Forked

from trainer import cli
from trainer.errors import UserError
from trainer.runs import folder as run_folder
from trainer.sweeps.study import open_storage
from trainer.verbs import train

LR = "optimizer.lr=tag(log,interval(0.001,1))"


def toy(cfg, run_dir: Path) -> float:
    """Highest at optimizer.lr = 0.1 and batch_size = 64."""
    return -(math.log10(cfg.optimizer.lr / 0.1) ** 2) - abs(cfg.batch_size - 64) / 64


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """`sweep(objective, *overrides)` runs the command in this process and returns the study."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["svi"])

    def run(objective, *overrides: str, n_trials: int, name: str = "sweep"):
        monkeypatch.setattr(train, "run", objective)
        cli.main(["train", "-m", "hydra/sweeper=optuna", "data.path=x", f"sweep_dir={name}", LR,
                  f"hydra.sweeper.n_trials={n_trials}", *overrides])  # fmt: skip
        return study(tmp_path, name)

    return run


def study(folder: Path, name: str = "sweep"):
    return optuna.load_study(storage=open_storage(f"sqlite:///{folder}/{name}/study.db"), study_name=name)


def states(study) -> list[str]:
    return [trial.state.name for trial in study.trials]


def test_many_trials_find_the_highest_value_and_end_in_a_table_and_plots(sweep, tmp_path, capsys):
    found = sweep(toy, "batch_size=32,64,128", "hydra.sweeper.sampler.seed=0", n_trials=40)
    assert states(found) == ["COMPLETE"] * 40
    best = found.best_trial
    assert best.params["batch_size"] == 64
    assert 0.05 < best.params["optimizer.lr"] < 0.2
    text = capsys.readouterr().out
    assert f"│ {best.number} " in text
    assert "40 of 40 trials: 40 complete · sweep" in text
    assert (tmp_path / "sweep" / "39").is_dir()
    for name in ("history", "slices"):
        assert (tmp_path / "sweep" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_seed_gives_the_same_trials(sweep, sampler):
    common = (f"hydra/sweeper/sampler={sampler}", "hydra.sweeper.sampler.seed=3", "hydra/sweeper/pruner=none")
    params = []
    for name in ("one", "two"):
        found = sweep(toy, *common, n_trials=4, name=name)
        params.append([trial.params["optimizer.lr"] for trial in found.trials])
    assert params[0] == params[1]
    assert len(set(params[0])) == 4


def test_a_grid_goes_through_every_point_once_also_over_restarts(sweep):
    grid = ("hydra/sweeper/sampler=grid", "optimizer.lr=0.01,0.1", "batch_size=range(32,129,32)")
    assert len(sweep(toy, *grid, n_trials=3).trials) == 3
    found = sweep(toy, *grid, n_trials=100)
    points = {(trial.params["optimizer.lr"], trial.params["batch_size"]) for trial in found.trials}
    assert len(found.trials) == 8
    assert points == {(lr, size) for lr in (0.01, 0.1) for size in (32, 64, 96, 128)}


def test_a_grid_of_an_interval_is_refused(sweep, capsys):
    with pytest.raises(SystemExit):
        sweep(toy, "hydra/sweeper/sampler=grid", n_trials=3)
    assert "a grid needs values to go through" in capsys.readouterr().err


def test_failed_nan_and_crashed_trials_do_not_end_it(sweep, capsys):
    values = iter([UserError("no such column."), float("nan"), RuntimeError("out of memory"), None, -1.0])

    def unlucky(cfg, run_dir):
        value = next(values)
        if isinstance(value, Exception):
            raise value
        return value

    found = sweep(unlucky, n_trials=5)
    assert states(found) == ["FAIL"] * 4 + ["COMPLETE"]
    why = [trial.user_attrs.get("failure") for trial in found.trials]
    assert why == ["no such column.", "its value is nan", "out of memory", "its value is None", None]
    assert found.best_value == -1.0
    assert "trial 0 failed: no such column." in capsys.readouterr().out
    sweep(toy, n_trials=6)
    assert states(found) == ["FAIL"] * 4 + ["COMPLETE"] * 2


def test_the_same_command_goes_on_to_more_trials_and_another_is_refused(sweep, capsys):
    sweep(toy, n_trials=3)
    assert len(sweep(toy, n_trials=5).trials) == 5
    assert len(sweep(toy, n_trials=5).trials) == 5
    with pytest.raises(SystemExit):
        sweep(toy, "seed=1", n_trials=6)
    assert "study sweep was begun by another command (seed=1)" in capsys.readouterr().err


def test_a_signal_puts_the_trial_back_where_it_continues(sweep, tmp_path):
    """Ctrl-C in a training is SystemExit(130) when it has saved; the trial keeps its number, folder and values."""
    told = []

    def stopped(cfg, run_dir):
        told.append((run_dir, cfg.optimizer.lr, cfg.ckpt_path))
        if len(told) == 2:
            sys.exit(130)
        return toy(cfg, run_dir)

    with pytest.raises(SystemExit) as end:
        sweep(stopped, n_trials=3)
    assert end.value.code == 130
    assert states(study(tmp_path)) == ["COMPLETE", "WAITING"]
    assert states(sweep(stopped, n_trials=3)) == ["COMPLETE"] * 3
    assert told[1] == told[2]
    assert told[2] == (tmp_path / "sweep" / "1", told[2][1], "last")


def test_a_journal_file_can_hold_the_study(sweep, tmp_path):
    with pytest.raises(KeyError):  # nothing in the default database
        sweep(toy, f"hydra.sweeper.storage={tmp_path}/study.journal", "hydra.sweeper.study_name=mine", n_trials=3)
    found = optuna.load_study(storage=open_storage(f"{tmp_path}/study.journal"), study_name="mine")
    assert states(found) == ["COMPLETE"] * 3


def test_what_does_not_compose_is_said_before_the_first_trial(sweep, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sweep(toy, "optimizer=nowhere", n_trials=3)
    assert "optimizer=nowhere is unknown: write adam, " in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_point_that_does_not_compose_fails_alone(sweep):
    found = sweep(toy, "optimizer=adam,nowhere", "hydra/sweeper/sampler=grid", "optimizer.lr=0.1,0.2", n_trials=9)
    assert sorted(states(found)) == ["COMPLETE", "COMPLETE", "FAIL", "FAIL"]


def worker(n_trials: int) -> "subprocess.Popen[str] | Forked":
    """A process in the current folder whose trainings take no time."""
    return start("train", "-m", "hydra/sweeper=optuna", "data.path=x", "sweep_dir=sweep", LR,
                 f"hydra.sweeper.n_trials={n_trials}", "hydra/sweeper/pruner=none",
                 launcher=("-m", "sweep_worker"))  # fmt: skip


@pytest.mark.slow
def test_two_workers_share_a_study_and_take_over_from_one_that_was_killed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both = [worker(12) for _ in range(2)]
    assert [each.wait(120) for each in both] == [0, 0]
    found = study(tmp_path)
    assert states(found) == ["COMPLETE"] * 12
    assert [trial.number for trial in found.trials] == list(range(12))
    assert {trial.user_attrs["worker"] for trial in found.trials} == {0, 1}
    (tmp_path / "die").touch()
    assert worker(14).wait(120) == -signal.SIGKILL
    assert states(study(tmp_path))[12:] == ["RUNNING"]
    assert worker(14).wait(120) == 0
    assert states(study(tmp_path)) == ["COMPLETE"] * 14


def test_the_options_of_the_sweeper_and_its_parts_are_parameters_of_their_targets():
    import inspect

    from hydra.utils import get_object
    from omegaconf import OmegaConf

    folder = cli.config_folder() / "hydra" / "sweeper"
    for path in [*folder.glob("*.yaml"), *folder.glob("*/*.yaml")]:
        node = OmegaConf.to_container(OmegaConf.load(path))
        parameters = {"sampler", "pruner", *inspect.signature(get_object(node["_target_"])).parameters}
        assert set(node) <= {"_target_", "_recursive_", "defaults", *parameters}, path


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "submitit_slurm", "slurm"])
def test_a_sweep_composes_with_every_launcher(launcher):
    from hydra import compose, initialize_config_dir

    cli.register_open_nodes()
    with initialize_config_dir(str(cli.config_folder()), version_base="1.3"):
        words = ["data.path=x", "hydra/sweeper=optuna", f"hydra/launcher={launcher}", "sweep_dir=s"]
        cfg = compose("train", words, return_hydra_config=True)
    assert cfg.hydra.sweep.dir == "s"
    if launcher == "slurm":
        assert cfg.hydra.launcher.additional_parameters.signal == "SIGUSR1@90"
        assert cfg.hydra.launcher._target_.endswith("SlurmLauncher")
        assert cfg.hydra.launcher.submitit_folder == "s/.submitit/%j"


@pytest.mark.slow
def test_a_search_over_trainings_with_a_failed_and_a_nan_one_goes_on(shards, tmp_path):
    """The command in processes of its own: three points of a grid in two goes, then the best of them."""
    folder = tmp_path / "sweep"
    common = (
        "train", "-m", "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "model._target_=app_models.luck",
        "model.prior_sd=0.5,1.5,3", f"data.path={shards}", "trainer=cpu", "program=eager", "recipe=plain",
        "max_steps=30", "slots=10", "batch_size=256", f"sweep_dir={folder}",
    )  # fmt: skip
    first = svi(*common, "hydra.sweeper.n_trials=2")
    assert first.returncode == 0, first.stderr
    second = svi(*common, "hydra.sweeper.n_trials=3")
    assert second.returncode == 0, second.stderr
    found = optuna.load_study(storage=open_storage(f"sqlite:///{folder}/study.db"), study_name=str(folder))
    by_prior = {trial.params["model.prior_sd"]: trial for trial in found.trials}
    assert {prior: trial.state.name for prior, trial in by_prior.items()} == {0.5: "COMPLETE", 1.5: "FAIL", 3: "FAIL"}
    assert by_prior[1.5].user_attrs["failure"].startswith("not finite at step")
    assert "no luck" in by_prior[3].user_attrs["failure"]
    assert len(by_prior[0.5].intermediate_values) == 14
    winner = by_prior[0.5]
    runs = {run.folder.name: run for run in run_folder.find(folder)}
    assert {name: run.status for name, run in runs.items()} == {
        str(trial.number): "done" if trial.number == winner.number else "failed" for trial in found.trials
    }
    assert runs[str(winner.number)].headline == winner.value
    last = winner.intermediate_values[14]
    assert last == pytest.approx(winner.value, abs=0.2)
    best = svi("runs", f"dir={folder}", "best=true")
    assert best.stdout.endswith("model.prior_sd=0.5\n")
    again = svi(*best.stdout.split()[1:], f"run_dir={tmp_path}/again")
    assert again.returncode == 0, again.stderr
    assert run_folder.read(tmp_path / "again").headline == winner.value


@pytest.mark.slow
def test_trials_in_processes_of_joblib_report_and_are_pruned(shards, tmp_path):
    """Two at a time, of two ranks each; rates too low to come anywhere are pruned."""
    done = svi(
        "train", "-m", "hydra/sweeper=optuna", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
        "hydra.sweeper.n_jobs=2", "hydra/sweeper/sampler=random", "hydra.sweeper.n_trials=4",
        "hydra/sweeper/pruner=halving", "hydra.sweeper.sampler.seed=0", "hydra.sweeper.study_name=two",
        f"hydra.sweeper.storage={tmp_path}/journal", "model._target_=app_models.linear", f"data.path={shards}",
        "trainer=ddp_sim", "program=eager", "recipe=plain", "max_steps=60", "batch_size=256", "slots=10",
        "optimizer.lr=tag(log,interval(1e-6,0.1))", "stop=budget", f"sweep_dir={tmp_path}/sweep",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = optuna.load_study(storage=open_storage(f"{tmp_path}/journal"), study_name="two")
    assert {trial.state.name for trial in found.trials} == {"COMPLETE", "PRUNED"}
    assert found.best_trial.params["optimizer.lr"] == max(trial.params["optimizer.lr"] for trial in found.trials)
    statuses = {run.folder.name: run.status for run in run_folder.find(tmp_path / "sweep")}
    expected = {"COMPLETE": "done", "PRUNED": "pruned"}
    assert statuses == {str(trial.number): expected[trial.state.name] for trial in found.trials}


@pytest.mark.slow
def test_a_job_that_kills_its_process_fails_under_joblib_and_the_search_goes_on(shards, tmp_path):
    done = svi(
        "train", "-m", "hydra/sweeper=optuna", "hydra/launcher=joblib", "hydra/sweeper/sampler=grid",
        "hydra/sweeper/pruner=none", "model._target_=app_models.dying", "model.at=-1,60", f"data.path={shards}",
        "trainer=cpu", "program=eager", "recipe=plain", "max_steps=30", "batch_size=256", "slots=10",
        f"sweep_dir={tmp_path}/sweep",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = optuna.load_study(
        storage=open_storage(f"sqlite:///{tmp_path}/sweep/study.db"), study_name=f"{tmp_path}/sweep"
    )
    assert {trial.params["model.at"]: trial.state.name for trial in found.trials} == {-1: "COMPLETE", 60: "FAIL"}


def test_the_command_of_a_wandb_agent_composes():
    """The documented sweep.yaml, its words made by W&B's own agent code."""
    import yaml
    from app_tools import config
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    (text,) = re.findall(r"```yaml\n(.*?)```", (HERE.parent.parent / "docs" / "sweeps.md").read_text(), re.DOTALL)
    given = yaml.safe_load(text)
    assert given["command"] == ["svi", "train", "${args_no_hyphens}"]
    values = {
        name: {"value": each.get("value", each.get("min", (each.get("values") or [None])[0]))}
        for name, each in given["parameters"].items()
    }
    words = create_sweep_command_args({"args": values})["args_no_hyphens"]
    cfg = config("train", *words)
    assert (cfg.optimizer.lr, cfg.batch_size, cfg.data.path) == (0.0001, 256, "shards")
    assert cfg.logger.wandb._target_.endswith("WandbLogger")


def test_a_job_of_a_plain_sweep_that_fails_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    ran = []

    def unlucky(cfg, run_dir):
        ran.append(cfg.seed)
        if cfg.seed == 1:
            raise UserError("no such column.")
        return -1.0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["svi"])
    monkeypatch.setattr(train, "run", unlucky)
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "-m", "data.path=x", "seed=1,2", "sweep_dir=sweep"])
    assert end.value.code == 1
    assert ran == [1, 2]
    said = capsys.readouterr().err
    assert "'seed=1', 'sweep_dir=sweep']\nno such column.\n" in said
    assert "Traceback" not in said
    statuses = {run.folder.name: (run.status, run.why) for run in run_folder.find(tmp_path)}
    assert statuses["0"] == ("failed", "no such column.")
