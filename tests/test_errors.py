"""What is told of an error that others raise."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from trainer import cache
from trainer.errors import UserError, first_line
from trainer.options import build

TRAINER = Path(__file__).parent.parent / "trainer"


class Wordless:
    """A model whose constructor asserts without a word."""

    def __init__(self, size: int = 0):
        if not size > 0:
            raise AssertionError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one\ntwo"), "one"),
        (ValueError(), "ValueError"),
        (AssertionError(), "AssertionError"),
        (ValueError("\n"), "ValueError"),
        (KeyError("name"), "'name'"),
    ],
)
def test_the_first_line_of_an_error(error, line):
    assert first_line(error) == line


def test_it_is_taken_by_that_function_alone():
    own = re.compile(r"str\(\w+\)(\.strip\(\))?\.splitlines\(\)(\)| or)?.*\[0\]")
    found = [path.name for path in TRAINER.rglob("*.py") if own.search(path.read_text())]
    assert found == ["errors.py"]


def test_a_constructor_that_asserts_without_words():
    node = OmegaConf.create({"_target_": f"{__name__}.Wordless"})
    with pytest.raises(UserError, match=r"Wordless cannot be made from the config: AssertionError"):
        build.model(node)


def test_a_user_without_a_home(monkeypatch, capsys):
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", none)
    cache._without_home.cache_clear()
    folder = cache.cache_folder()
    assert folder.parent.is_dir()
    assert cache.cache_folder() == folder
    assert capsys.readouterr().err.count("set XDG_CACHE_HOME") == 1
    cache._without_home.cache_clear()
