"""The site is built without a complaint, from this checkout alone, and its reference has every option of conf/."""

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig
from test_docs import composed

from trainer import cli

ROOT = Path(__file__).parent.parent
GROUPS = sorted(path.relative_to(ROOT / "conf") for path in ROOT.glob("conf/[!h]*/*.yaml"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def text(markup: str) -> str:
    """What a reader sees of it, in single spaces."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup)).split())


@pytest.fixture(scope="module")
def rows(site) -> dict[str, list[tuple[str, str]]]:
    """Of each key in the reference, its defaults with what is said of it."""
    found: dict[str, list[tuple[str, str]]] = {}
    for row in re.findall(r"<tr>(.*?)</tr>", (site / "configuration.html").read_text(), re.DOTALL):
        if cells := [text(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)]:
            key, default, says = cells
            found.setdefault(key, []).append((default, says))
    return found


def leaves(cfg: DictConfig, above: str = "") -> list[str]:
    """The dotted names of all keys of a config that hold no others; not `_target_`, nor a part without options."""
    found = []
    for key in (key for key in cfg if not str(key).startswith("_")):
        node, name = cfg._get_node(key), f"{above}{key}"
        if isinstance(node, DictConfig) and not node._is_none() and len(node):
            found += leaves(node, f"{name}.")
        elif not (ROOT / "conf" / name).is_dir():
            found.append(name)
    return found


def test_the_reference_says_what_conf_says(rows):
    said = "or quarantine: check all blocks first, and train on those that are intact, with their N"
    assert rows["data.on_corrupt"] == [("error", said)]
    assert ("null", "3/16: read the third of 16 parts, each a job of its own ( packing.md )") in rows["part"]
    assert ("sqlite:///${run_dir}/mlflow.db", "or the address of a server") in rows["logger.mlflow.tracking_uri"]


@pytest.mark.parametrize("choice", [*cli.VERBS, *GROUPS], ids=str)
def test_the_reference_has_every_option(rows, choice):
    """By the names that Hydra gives them."""
    verb, overrides = (choice, []) if isinstance(choice, str) else ("train", [f"{choice.parent}={choice.stem}"])
    names = leaves(composed(verb, overrides))
    assert names
    for name in names:
        parts = name.split(".")  # a node that is written on one line is one row
        assert any(".".join(parts[:end]) in rows for end in range(1, len(parts) + 1)), name


@pytest.mark.parametrize("path", sorted(ROOT.glob("conf/**/*.yaml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_reference_has_every_comment(site, path):
    page = re.sub(r"\W", "", text((site / "configuration.html").read_text())).lower()
    source = path.read_text()
    source = source if "hydra" in path.parent.parts else source.split("\nhydra:")[0]
    for comment in re.findall(r"(?:^|\s)#(.*)", source):
        about = comment.strip().removeprefix(f"svi {path.stem}: ")
        if not about.startswith("@package"):
            about = about.removeprefix(f"{path.parent.relative_to(ROOT / 'conf')}={path.stem}: ").replace("docs/", "")
            assert re.sub(r"\W", "", about).lower() in page, comment


def test_pages_ask_nothing_of_other_servers(site):
    pages = sorted(site.glob("*.html"))
    assert len(pages) >= 16
    for page in pages:
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>", page.read_text())
    pictures = sorted(ROOT.glob("docs/*.svg"))
    assert pictures
    for picture in pictures:
        assert not re.findall(r"""(?:url\(|href=)["']?\w+:""", picture.read_text())


def test_the_site_begins_with_the_readme_and_has_the_files_that_pages_link_to(site):
    start = (site / "index.html").read_text()
    assert "Train it on a table of any size, on one process or many." in text(start)
    assert re.search(r'<img[^>]* src="?terminal\.svg', start)
    assert (site / "terminal.svg").read_bytes() == (ROOT / "docs/terminal.svg").read_bytes()
    assert re.search(r'href="?from-csv\.html', start)
    assert re.search(r'href="?contributing\.html', start)
    assert re.search(r'href="?files/slurm/train\.sbatch', (site / "cluster.html").read_text())
    assert (site / "files/slurm/train.sbatch").read_bytes() == (ROOT / "slurm/train.sbatch").read_bytes()
