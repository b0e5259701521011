"""What the documentation shows is so: commands compose and run, models run, links and paths lead somewhere."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import forked
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked import can_fork, command_environment
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from trainer import cli
from trainer.sweeps import search_space as space

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
]
NOT_OURS = {  # of torch.load, TarWriter, Lightning's trainer and our Python classes
    *("weights_only=True", "mtime=0", "mode=0o644", 'devices=2, strategy="ddp"', "options=", "num_obs="),
}
OVERRIDE = re.compile(r"[a-z_]+(\._?[a-z_]+)*=[^ ]*")
SVI = """#!/usr/bin/env bash
# The command on a smaller scale.
case $1 in
  shard) set -- "$@" rows=3000 ;;
  train) set -- "$@" max_steps=3 program=eager ;;
esac
case "$*" in *sweeper=optuna*) set -- "$@" hydra.sweeper.n_trials=2 ;; esac
exec "$PYTHON" TRAINER "$@"
"""
STAND_INS = {"svi": SVI, "pip": "#!/usr/bin/env bash\n", "python": '#!/usr/bin/env bash\nexec "$PYTHON" "$@"\n'}


class Block(NamedTuple):
    """A fenced block of code."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(page, text[: found.start()].count("\n") + 1, *found.groups()) for found in fences]


def spans(page: Path) -> list[str]:
    """The `code` within sentences."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def svi_commands(text: str) -> list[list[str]]:
    """The arguments of every `svi` line of a shell script."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("svi ")]


def cluster_commands(text: str) -> list[list[str]]:
    """The arguments that svi gets from every line of a shell script that begins with `sbatch` or `srun`."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        begun = re.match(r"(?:\w+=\S+ )*(?:sbatch|srun) .*?(slurm/\S+\.sbatch|\"\$SVI\") (.*)", line)
        if begun:
            verb = [] if "SVI" in begun[1] else ["shard" if "shard" in begun[1] else "train"]
            found.append([*verb, *shlex.split(begun[2], comments=True)])
    return found


def composed(verb: str, overrides: list[str]) -> DictConfig:
    """The config that the overrides make, a point of them where they sweep. Raises for a key, a group or a choice that
    does not exist."""
    for part, choice in (("sweeper", "optuna"), ("launcher", "slurm")):
        if f"hydra.{part}." in " ".join(overrides) and f"hydra/{part}=" not in " ".join(overrides):
            overrides = [f"hydra/{part}={choice}", *overrides]  # whose options a sentence speaks of
    parsed = OverridesParser.create().parse_overrides(overrides)
    overrides = [
        f"{each.get_key_element()}={space.first(space.distribution(each))}" if each.is_sweep_override() else word
        for each, word in zip(parsed, overrides, strict=True)
    ]
    cli.register_open_nodes()
    with initialize_config_dir(str(cli.config_folder()), version_base="1.3"):
        return compose(verb, overrides)


BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = [
    *((str(block), command) for block in BLOCKS for command in svi_commands(block.text)),
    *((str(block), command) for block in BLOCKS for command in cluster_commands(block.text)),
    *((page.name, shlex.split(span)[1:]) for page in PAGES for span in spans(page) if span.startswith("svi ")),
]
OVERRIDES = [
    (page.name, span)
    for page in PAGES
    for span in spans(page)
    if span not in NOT_OURS and all(OVERRIDE.fullmatch(word) for word in span.split())
]
PYTHON = [block for block in BLOCKS if block.language == "python"]
SCRIPTS = [block for block in BLOCKS if svi_commands(block.text)]


def of_a_page(chosen: list[Block]) -> list:
    """The blocks of each page that has any, as the cases of a test."""
    pages = {block.page: [other for other in chosen if other.page == block.page] for block in chosen}
    return [pytest.param(found, id=str(page.relative_to(ROOT))) for page, found in pages.items()]


def file_name(block: Block) -> str | None:
    """The name of the file that a block of Python begins with, as `# NAME.py:`."""
    name = re.match(r"# (\w+\.py):", block.text)
    return name[1] if name else None


def test_the_pages_were_read():
    assert {block.language for block in BLOCKS} >= {"bash", "python"}
    assert len(SCRIPTS) >= 3
    assert len(COMMANDS) >= 10
    assert len(OVERRIDES) >= 5


@pytest.mark.parametrize(("place", "command"), COMMANDS, ids=lambda value: str(value))
def test_a_command_composes(place, command):
    verb, *arguments = command
    if verb == "VERB":
        return
    assert verb in cli.VERBS
    overrides = [word for word in arguments if not word.startswith("-")]
    assert all("=" in word for word in overrides), f"{place}: a word of {overrides} is no override"
    composed(verb, ["model=linear" if word == "model=NAME" else word for word in overrides])


@pytest.mark.parametrize(("place", "span"), OVERRIDES, ids=lambda value: str(value))
def test_options_in_a_sentence_exist(place, span):
    errors = []
    for verb in cli.VERBS:
        words = [
            word for word in span.split() if not (word.endswith("=") and (cli.config_folder() / word[:-1]).is_dir())
        ]
        try:
            composed(verb, [word + "''" if word.endswith("=") else word for word in words])
            return
        except HydraException as error:
            errors.append(str(error))
    pytest.fail(f"{place}: `{span}` is an option of no verb: {errors}")


def test_the_commands_of_a_cluster_are_found():
    found = cluster_commands(
        'A=b sbatch -N2 slurm/train.sbatch \\\n  seed=1\nsrun -n2 "$SVI" doctor threads=1\nsvi runs'
    )
    assert found == [["train", "seed=1"], ["doctor", "threads=1"]]
    page = (ROOT / "docs" / "cluster.md").read_text()
    assert len(cluster_commands(page)) == page.count("\nsbatch ") + page.count(" sbatch --") + page.count("\nsrun ")


def test_an_option_that_does_not_exist_is_noticed():
    with pytest.raises(HydraException):
        composed("train", ["data.path=x", "batchsize=10"])
    with pytest.raises(HydraException):
        composed("train", ["data.path=x", "optimizer=adamx"])


def test_the_readme_lists_every_verb():
    listed = {command[0] for place, command in COMMANDS if place == "README.md"}
    assert listed >= set(cli.VERBS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"
    tops = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"bench"}  # scripts/bench writes it
    for word in [word for span in spans(page) for word in span.split()]:
        path = word.removeprefix("./").partition("::")[0]
        if path.split("/")[0] in tops and "/" in path and not re.search(r"[A-Z]{4}", path):
            assert list(ROOT.glob(path)), f"{page.name} speaks of {word}"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "bash"], ids=str)
def test_a_script_of_a_block_can_be_run(block):
    for line in block.text.splitlines():
        if line.startswith("./"):
            assert os.access(ROOT / shlex.split(line, comments=True)[0], os.X_OK), line
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of Lightning, to its users
@pytest.mark.parametrize("shown", of_a_page(PYTHON))
def test_the_python_of_a_page_runs(shown, tmp_path, monkeypatch):
    """In order, in one folder; a block can import those before it by the names of their files."""
    monkeypatch.chdir(tmp_path)
    for block in shown:
        name = (file_name(block) or "shown.py").removesuffix(".py")
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(block.text, str(block), "exec"), module.__dict__)


def written(text: str) -> list[str]:
    """What a source has between quotes, "…" for what is filled in."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(re.sub(r"\{.*?\}", "…", node.value))
    return found


def test_the_messages_of_the_gotchas_are_the_programs():
    """Each is in *italics*, with "…" for what is filled in or left out."""
    known = [text for path in ROOT.glob("trainer/**/*.py") for text in written(path.read_text())]
    quoted = re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", (ROOT / "docs" / "gotchas.md").read_text())
    assert len(quoted) >= 10
    for message in (" ".join(each.split()) for each in quoted):
        pattern = ".*".join(re.escape(part.strip()) for part in message.split("…"))
        assert any(re.search(pattern, text) for text in known), message


def write_table(path: Path, seed: int = 0) -> None:
    """The table of the README."""
    generator = np.random.default_rng(seed)
    columns = {name: generator.normal(size=500) for name in ("age", "income", "height")}
    score = sum(columns.values()) + 0.5 * generator.normal(size=500)
    pq.write_table(pa.table({**columns, "score": score}), path)


def copy_example(example: Path, to: Path) -> None:
    """An example with the first 5,000 rows of its table."""
    shutil.copytree(example, to, ignore=shutil.ignore_patterns("data.parquet"))
    pq.write_table(pq.read_table(example / "data.parquet").slice(0, 5000), to / "data.parquet")


@pytest.mark.slow
@pytest.mark.parametrize("scripts", of_a_page(SCRIPTS))
def test_the_commands_of_a_page_run(scripts, tmp_path):
    """As they stand, in order, in one folder, with `svi` on a smaller scale and `pip` left out."""
    for seed, name in enumerate(("table", "monday", "tuesday")):
        write_table(tmp_path / f"{name}.parquet", seed)
    for python in (block for block in PYTHON if block.page == scripts[0].page):
        name = file_name(python)
        assert name, f"{python} does not say its file's name"
        (tmp_path / name).write_text(python.text)
    for example in ROOT.glob("examples/*/README.md"):
        if any(f"cd examples/{example.parent.name}\n" in block.text for block in scripts):
            copy_example(example.parent, tmp_path / "examples" / example.parent.name)
    commands = tmp_path / "commands"
    commands.mkdir()
    env = command_environment(PATH=f"{commands}:{os.environ['PATH']}", PYTHON=sys.executable, PYTHONPATH=str(ROOT))
    trainer = "-m trainer"
    if can_fork(env):
        env[forked.ADDRESS], trainer = forked.server().address, shlex.quote(forked.__file__)
    for name, text in STAND_INS.items():
        (commands / name).write_text(text.replace("TRAINER", trainer))
        (commands / name).chmod(0o755)
    elbos = 0
    for block in scripts:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
        elbos += done.stdout.count(" nats (")
    commands_shown = [command for block in scripts for command in svi_commands(block.text)]
    trained = [command for command in commands_shown if command[0] == "train"]
    runs = len(list(tmp_path.rglob("summary.csv")))
    assert runs == elbos
    assert runs > len(trained) if any("-m" in command for command in trained) else runs == len(trained)
