"""What the site has besides docs/: pages from elsewhere in the checkout, linked files, a reference of conf/.

A hook of mkdocs (mkdocs.yml names it). None of these pages is kept: they are made from their sources at every build.
"""

import html
import posixpath
import re
from pathlib import Path
from typing import NamedTuple

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from trainer.options.config import node_of

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
OF_THE_ROOT = {
    "index.md": "README.md",
    "flights.md": "examples/flights200k/README.md",
    "babynames.md": "examples/babynames/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
REFERENCE = "configuration.md"
LINK = re.compile(r"\]\(([^)\s]+)\)")
NOT_SHOWN = ("defaults", "hydra", "_target_", "_recursive_")


class Option(NamedTuple):
    """A key of a YAML file, from its root, with its default and its comment as they are written there."""

    key: str
    default: str
    says: str


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/, and what any page links to."""
    for uri, name in OF_THE_ROOT.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    files.append(File.generated(config, REFERENCE, content=reference()))
    for page in files.documentation_pages():
        for target in LINK.findall(page.content_string):
            uri = uri_of(target, page.src_uri)
            if uri and uri.startswith("files/") and uri not in files.src_uris:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / uri.removeprefix("files/"))))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The text with its links as they are on the site."""
    del config, files
    here = page.file.src_uri
    return LINK.sub(lambda found: f"]({site_link(found[1], here)})", markdown)


def site_link(target: str, page: str) -> str:
    """What ``page`` of the site links to, where it links to ``target`` in the checkout."""
    uri = uri_of(target, page)
    _, mark, anchor = target.partition("#")
    return target if uri is None else posixpath.relpath(uri, posixpath.dirname(page) or ".") + mark + anchor


def uri_of(target: str, page: str) -> str | None:
    """Where the site has the file that ``page`` links to as ``target``, in files/ where that is outside docs/; None
    for what is no file of the checkout.
    """
    path, _, _ = target.partition("#")
    if "://" in target or not path or page == REFERENCE:
        return None
    file = ((ROOT / OF_THE_ROOT.get(page, f"docs/{page}")).parent / path).resolve()
    if not file.is_file() or not file.is_relative_to(ROOT):
        return None  # --strict says that it leads nowhere
    name = file.relative_to(ROOT).as_posix()
    uris = {of_the_root: uri for uri, of_the_root in OF_THE_ROOT.items()}
    return uris.get(name, name.removeprefix("docs/") if name.startswith("docs/") else f"files/{name}")


def reference() -> str:
    """A page of Markdown: each verb, then each group, with the keys of its files."""
    parts = [
        "# Configuration",
        "Every option of every verb, with its default and its description from `conf/`. Give an option as `KEY=VALUE` "
        "and choose a part as `GROUP=NAME`. Unknown keys are refused. An option whose default is `???` is required; "
        "`null` leaves the choice to the program.",
        *(verb(path) for path in sorted(CONF.glob("*.yaml"))),
    ]
    folders = sorted({path.parent for path in CONF.glob("*/**/*.yaml")})
    return "\n\n".join(parts + [group(folder) for folder in folders]) + "\n"


def verb(path: Path) -> str:
    """The section of a verb."""
    said = head(path).removeprefix(f"svi {path.stem}: ")
    parts = [f"## svi {path.stem}", prose(said[:1].upper() + said[1:])]
    chosen = [f"[`{name}={choice}`](#{anchor(name)})" for name, choice in choices(path).items()]
    if chosen:
        parts.append(f"Parts, as they are chosen by default: {', '.join(chosen)}.")
    return "\n\n".join([*parts, table(options(path))])


def group(folder: Path) -> str:
    """The section of a group: its choices, with the keys of each as they are on the command line."""
    name = folder.relative_to(CONF).as_posix()
    defaults = choices(CONF / "train.yaml") | choices(CONF / "hydra" / "sweeper" / "optuna.yaml", "hydra/sweeper/")
    parts = [f"## {name}= {{#{anchor(name)}}}"]
    for path in sorted(folder.glob("*.yaml")):
        target = (yaml.safe_load(path.read_text()) or {}).get("_target_")
        said = [f"**`{name}={path.stem}`**" + (", the default" if defaults.get(name) == path.stem else "")]
        said += [f"`{target}`"] if target else []
        about = prose(head(path).removeprefix(f"{name}={path.stem}: "))
        said += [about] if about else []
        parts += [": ".join(said), table(options(path, node_of(path, name)))]
    return "\n\n".join(filter(None, parts))


def anchor(name: str) -> str:
    return "of-" + name.replace("/", "-")


def choices(path: Path, above: str = "") -> dict[str, str]:
    """The group and the choice of each part in the defaults list of ``path``."""
    listed = [each for each in yaml.safe_load(path.read_text())["defaults"] if isinstance(each, dict)]
    return {above + name: choice for each in listed for name, choice in each.items() if (CONF / above / name).is_dir()}


def head(path: Path) -> str:
    """The comment with which a file begins, and that of its ``_target_``."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines + re.findall(r"^_target_: \S+ +# (.*)", path.read_text(), re.MULTILINE))


def options(path: Path, above: str = "") -> list[Option]:
    """The keys of a file in its order, those of nodes with dots; ``above`` is the node that the file fills."""
    text = path.read_text()
    lines = text.splitlines()

    def comment(line: int, column: int) -> str:
        """What follows on the line, and the comments that stand alone below it."""
        _, mark, said = lines[line][column:].partition("#")
        below = line + 1
        while mark and below < len(lines) and lines[below].lstrip().startswith("#"):
            said += " " + lines[below].lstrip(" #")
            below += 1
        return said.strip()

    def below(node: yaml.MappingNode, above: str) -> list[Option]:
        found = []
        for key, value in node.value:
            name = f"{above}.{key.value}" if above else key.value
            if key.value in NOT_SHOWN:
                continue
            if isinstance(value, yaml.MappingNode) and not value.flow_style:
                said = comment(key.end_mark.line, key.end_mark.column)
                found += [Option(name, "", said)] if said else []
                found += below(value, name)
            else:
                written = text[value.start_mark.index : value.end_mark.index]
                found.append(Option(name, written, comment(value.end_mark.line, value.end_mark.column)))
        return found

    root = yaml.compose(text)
    return below(root, above) if isinstance(root, yaml.MappingNode) else []


def table(found: list[Option]) -> str:
    """The options as a table; "" without any."""
    if not found:
        return ""
    rows = [f"| `{key}` | {f'`{default}`' if default else ''} | {prose(says)} |" for key, default, says in found]
    return "\n".join(["| key | default | |", "|---|---|---|", *rows])


def prose(comment: str) -> str:
    """A comment as Markdown: its signs are no markup, and the pages that it names are links."""
    escaped = re.sub(r"([\\`*_|\[\]])", r"\\\1", html.escape(comment, quote=False))
    return re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", escaped)
