"""What the shell offers after `svi`, asked of the shell."""

import shutil
import subprocess
import sys

import pytest

from trainer import cli
from trainer.options.completion import script


def offered(line: str, breaks: str = " =") -> list[str]:
    """Bash's answers at the end of ``line``; ``breaks``: the characters at which it takes words apart."""
    text = script(cli.config_folder(), cli.VERBS) + (
        f"COMP_WORDBREAKS='{breaks}'; COMP_LINE='{line}'; COMP_POINT={len(line)}; _svi; "
        '[ ${#COMPREPLY[@]} = 0 ] || printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-u", "-c", text], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_verbs_first():
    assert set(offered("svi ")) == {*cli.VERBS, "completion"}
    assert offered("svi tr") == ["train"]


def test_keys_and_choices_of_the_verb():
    assert offered("svi train data.on_c") == ["data.on_corrupt="]
    assert set(offered("svi train x=1 optimizer=", " ")) > {"optimizer=adam"}
    assert "hydra/sweeper=optuna" in offered("svi train -m hydra/s", " ")
    assert offered("svi verify optim") == []
    assert "optimizer.lr=" in offered("svi train optimizer.")
    assert offered("svi train hydra.sweeper.n_tr") == ["hydra.sweeper.n_trials="]
    assert offered("svi verify data.cache.b") == ["data.cache.bytes="]
    assert "rounds=" in offered("svi train ro")
    assert "split.by=" in offered("svi shard split.")


def test_after_the_equals_sign_bash_wants_the_rest_alone():
    assert offered("svi train program=fu") == ["fused"]
    assert offered("svi train program=fu", " ") == ["program=fused"]


def test_files_where_no_choice_is_known(tmp_path):
    (tmp_path / "shards").mkdir()
    assert offered(f"svi train data.path={tmp_path}/sh") == [f"{tmp_path}/shards"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh (apt-get install zsh)")
def test_zsh_takes_it():
    text = script(cli.config_folder(), cli.VERBS)
    subprocess.run(["zsh", "-f", "-c", f"autoload -Uz compinit && compinit -D\n{text}"], check=True)


@pytest.mark.slow
def test_the_command_prints_it():
    done = subprocess.run([sys.executable, "-m", "trainer", "completion"], capture_output=True, text=True, check=True)
    assert done.stdout == script(cli.config_folder(), cli.VERBS)
