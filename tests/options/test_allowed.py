"""What a config may have called: the known ways around a list of names are refused, before anything is called."""

import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from app_tools import HERE, config, svi
from omegaconf import OmegaConf

from trainer.errors import UserError
from trainer.options.allowed import LIST, imported, refuse_others, typed
from trainer.training.finished import posterior_of
from trainer.verbs import train

ESCAPES = (
    "os.system",
    "subprocess.Popen",
    "builtins.eval",
    "builtins.exec",
    "shutil.rmtree",
    "pickle.loads",
    "torch.load",
    "importlib.import_module",
    "hydra.utils.instantiate",
    "hydra.utils.get_method",
    "functools.partial",
    "trainer.inference.programs.native.subprocess.run",  # through what an allowed package has imported
    "trainer.inference.programs.fused.os.system",
    "trainer.inference.programs.program.time.sleep",
    "pyro.infer.autoguide.guides.warnings.warn",
    "pytorch_lightning.loggers.wandb.os.system",
    "pytorch_lightning.loggers.csv_logs.os.remove",
    "torch.optim.optimizer.functools.partial",
    "trainer.data.shards.gather._compile",  # runs a compiler of one's choice
    "trainer.models.linear.__builtins__",
    "trainer.modelsx.Evil",  # only begins like an allowed one
)


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("where", ["itself", "argument", "list"])
def test_an_escape_is_refused_wherever_it_stands(name, where):
    evil = {"_target_": name, "command": "true"}
    wrapped = {"itself": evil, "argument": {"_target_": "trainer.inference.optim.optimizers.Adam", "lr": evil},
               "list": {"_target_": "trainer.inference.optim.optimizers.Adam", "lr": [[evil]]}}  # fmt: skip
    with pytest.raises(UserError, match=r"which is not on the list of what a config may|cannot be imported"):
        refuse_others(OmegaConf.create({"model": wrapped[where]}))


def test_a_package_that_is_refused_is_not_even_imported(tmp_path, monkeypatch):
    (tmp_path / "crafted.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"names crafted\.model, which is not on the list"):
        refuse_others(OmegaConf.create({"_target_": "crafted.model"}))
    assert "crafted" not in sys.modules


def test_the_current_folder_is_found_as_by_an_installed_command_and_a_run_in_it_is_not_run(tmp_path, monkeypatch):
    """Which has no current folder on Python's path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", ".", str(tmp_path))])
    (tmp_path / "of_this_folder.py").write_text("def model(x):\n    pass\n")
    (tmp_path / "run").mkdir()
    refuse_others(OmegaConf.create({"_target_": "of_this_folder.model"}), run=tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not place.startswith(str(tmp_path))])
    Path("theirs.py").write_text("raise SystemExit('imported')")
    with pytest.raises(UserError, match=r"names theirs\.model, which is not on the list"):
        refuse_others(OmegaConf.create({"_target_": "theirs.model"}), run=Path())
    assert "theirs" not in sys.modules


def test_every_target_of_conf_is_on_the_list():
    root = Path(__file__).parent.parent.parent / "conf"
    paths = [path for path in root.rglob("*.yaml") if path.relative_to(root).parts[0] != "hydra"]  # Hydra's own affair
    found = (re.findall(r"_target_: (\S+)", path.read_text()) for path in paths)
    names = {name for each in found for name in each} - {"null"}
    assert len(names) > 15
    refuse_others(OmegaConf.create([{"_target_": name} for name in names]))


def test_code_of_the_current_folder_is_ones_own_but_not_that_of_a_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text("import os\ndef model(x): pass\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    own = OmegaConf.create({"_target_": "mine.model"})
    refuse_others(own)
    refuse_others(own, run=tmp_path / "run")
    with pytest.raises(UserError, match=r"names mine\.model, which is not on the list .*: if you trust it, add allow="):
        refuse_others(own, run=tmp_path)
    refuse_others(own, allow=["mine"], run=tmp_path)
    with pytest.raises(UserError, match="not on the list"):
        refuse_others(OmegaConf.create({"_target_": "mine.os.system"}))
    sys.modules.pop("mine")


def test_what_is_typed_is_allowed_and_nothing_else():
    overrides = ["model._target_=far.model", "+callbacks.x._target_='far.Other'", "optimizer.lr=1", "max_steps=2"]
    assert typed(overrides) == ["far.model", "far.Other"]


def test_a_run_folder_cannot_name_a_function_of_its_choice(tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / "posterior.pt").touch()
    evil = {"model": {"_target_": "os.mkdir", "path": str(tmp_path / "made")}, "guide": {}, "allow": ["os"]}
    OmegaConf.save(OmegaConf.create(evil), tmp_path / ".hydra" / "resolved.yaml")
    with pytest.raises(UserError, match=r"names os\.mkdir"):
        posterior_of(tmp_path)
    assert not (tmp_path / "made").exists()


def test_a_config_of_train_cannot_either(shards, tmp_path):
    cfg = config("train", "model=linear", f"data.path={shards}")
    cfg = replace(cfg, optimizer=OmegaConf.create({"_target_": "os.mkdir", "path": str(tmp_path / "made")}))
    with pytest.raises(UserError, match=r"names os\.mkdir"):
        train.run(cfg, tmp_path / "run")
    assert not (tmp_path / "made").exists()
    assert not any(prefix.partition(".")[0] in ("os", "builtins") for prefix in LIST)


@pytest.mark.slow
def test_an_installed_model_is_used_where_it_is_typed(shards, tmp_path):
    """It lies neither in the current folder nor on the list."""
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "faraway.py").write_text((HERE / "app_models.py").read_text())
    path = os.pathsep.join([str(tmp_path / "far"), str(Path(__file__).parent.parent.parent)])
    run = f"run_dir={tmp_path}/run"
    done = svi("train", "model._target_=faraway.linear", f"data.path={shards}", run, "max_steps=4", "program=eager",
               PYTHONPATH=path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    ask = ("predict", f"run={tmp_path}/run", f"data.path={shards}", f"out={tmp_path}/p.csv")
    refused = svi(*ask, PYTHONPATH=path)
    assert refused.returncode == 2
    assert "names faraway.linear, which is not on the list" in refused.stderr
    assert svi(*ask, "allow=[faraway]", PYTHONPATH=path).returncode == 0


@pytest.mark.parametrize(
    ("module", "name", "said"),
    [
        ("def model(x): ...", "own.modle", r"_target_=own\.modle: own has no modle \(do you mean model\?\)\.$"),
        ("class A: ...", "own.A.model", r"own\.A has no model\.$"),
        ("def model(x) ...", "own.model", r"_target_=own\.model: importing it raises SyntaxError: .*own\.py, line 1"),
        ("open(1 / 0)", "own.model", r"importing it raises ZeroDivisionError: division by zero$"),
        ("import nowhere_at_all", "own.model", r"raises ModuleNotFoundError: No module named 'nowhere_at_all'$"),
        (
            "",
            "onw.model",
            r"_target_=onw\.model cannot be imported \(No module named 'onw'\): write it as module\.name",
        ),
    ],
)
def test_a_name_that_cannot_be_imported_is_one_sentence_that_says_why(tmp_path, monkeypatch, module, name, said):
    (tmp_path / "own.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    with pytest.raises(UserError, match=said):
        imported(name)
    sys.modules.pop("own", None)
