"""The command of the best trial of a study; that of the best run of a folder is in tests/verbs/test_runs.py."""

import shlex

import optuna
import pytest
from omegaconf import OmegaConf
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from trainer.errors import UserError
from trainer.sweeps.study import open_storage
from trainer.sweeps.winner import print_best


@pytest.fixture
def journal(tmp_path):
    """The address of a storage with a study of three trials, the best of which failed."""
    address = str(tmp_path / "journal")
    study = optuna.create_study(storage=open_storage(address), study_name="lr", direction="maximize")
    for lr, value in ((0.1, -0.75), (0.2, -0.5), (0.3, None)):
        words = [f"optimizer.lr={lr}", "columns.x=[a, b]", "trial={number:1}", "run_dir=r", "sweep_dir=s",
                 "ckpt_path=last", "seed=3"]  # fmt: skip
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if value else TrialState.FAIL,
                value=value,
                params={"lr": lr},
                distributions={"lr": FloatDistribution(0, 1)},
                user_attrs={"overrides": words},
            )
        )
    optuna.create_study(storage=open_storage(address), study_name="empty")
    return address


def test_the_best_complete_trial_is_a_command_without_what_was_the_sweeps(journal, tmp_path, capsys):
    assert print_best(tmp_path, journal, "lr") == -0.5
    said = capsys.readouterr()
    assert shlex.split(said.out) == ["svi", "train", "optimizer.lr=0.2", "columns.x=[a, b]", "seed=3"]
    assert said.err == "trial 1 of lr: -0.5 nats per row\n"


def test_a_storage_is_found_from_where_one_stands(journal, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert print_best(tmp_path / "nowhere", "journal", "lr") == -0.5
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(
    ("study", "said"),
    [("other", "holds no study other, but .*lr"), ("empty", "no trial of study empty is complete"),
     (None, "a study is found by both: storage=ADDRESS study=NAME")],
)  # fmt: skip
def test_a_study_that_has_none_is_named(journal, tmp_path, study, said):
    with pytest.raises(UserError, match=said):
        print_best(tmp_path, journal, study)


def test_without_a_storage_the_folder_is_looked_through(tmp_path):
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(["model=wide"]), tmp_path / "run" / ".hydra" / "overrides.yaml")
    with pytest.raises(UserError, match=r"no run at or below .* is done"):
        print_best(tmp_path, None, None)
    with pytest.raises(UserError, match="a study is found by both"):
        print_best(tmp_path, None, "lr")
