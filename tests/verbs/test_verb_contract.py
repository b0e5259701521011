"""What every verb keeps to: a record with its config, a line of help, and one sentence for what it does not know."""

import inspect
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest

from trainer.cli import main
from trainer.options.config import config_folder
from trainer.options.verbs import VERBS

FOLDER = Path(__file__).parents[2] / "trainer" / "verbs"


@pytest.fixture(params=VERBS)
def verb(request):
    return request.param


def test_each_file_of_the_folder_is_a_verb_and_fit():
    assert {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "fit"} == VERBS.keys()


def test_its_run_takes_its_record_and_a_folder_and_gives_a_number(verb):
    run = import_module(f"trainer.verbs.{verb}").run
    hints = get_type_hints(run)
    assert list(inspect.signature(run).parameters) == ["cfg", "run_dir"]
    assert hints == {"cfg": VERBS[verb].record, "run_dir": Path, "return": float}
    assert run.__doc__


def test_its_record_is_frozen_and_has_a_config(verb):
    record = VERBS[verb].record
    assert is_dataclass(record)
    assert record.__dataclass_params__.frozen
    assert (config_folder() / f"{verb}.yaml").is_file()
    assert VERBS[verb].bare in {None, *record.__dataclass_fields__}


def test_its_line_of_help_is_listed_and_short(verb, capsys):
    main(["--help"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[:2] == ["svi", verb]]
    assert line.endswith(VERBS[verb].help)
    assert len(line) <= 88


def test_an_option_that_it_does_not_know_is_one_sentence(verb, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([verb, "nonsense=3"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"svi {verb}: option nonsense is unknown: svi {verb} --help lists them.")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_with_debug_the_traceback_is_shown(verb, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match="nonsense"):
        main([verb, "nonsense=3", "debug=true"])
