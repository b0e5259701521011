"""The table of failures in docs/reliability.md: a row for each test that carries the mark `failure`."""

import ast
from pathlib import Path
from typing import NamedTuple

_HERE = Path(__file__).parent
_FOLDERS = ("failures", "cluster")
PAGE = _HERE.parent / "docs" / "reliability.md"
_HEAD = "| what happens | what the user sees | exit code | what is lost |\n|---|---|---|---|\n"


class Row(NamedTuple):
    what: str
    sees: str
    code: str
    lost: str


def marked() -> list[str]:
    """What each marked test stands for, in the order of the files."""
    found = []
    for path in [path for folder in _FOLDERS for path in sorted((_HERE / folder).glob("test_*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "failure":
                found += [ast.literal_eval(each.value) for each in node.keywords if each.arg == "what"]
    return found


def committed() -> list[Row]:
    """The rows of the page."""
    if _HEAD not in PAGE.read_text():
        return []
    lines = [line for line in PAGE.read_text().split(_HEAD)[1].split("\n\n")[0].splitlines() if line[:1] == "|"]
    return [Row(*(cell.strip().replace("\\|", "|") for cell in line.strip("|").split(" | "))) for line in lines]


def write(row: Row) -> None:
    """Puts ``row`` into the page, in the place of the one of the same name; what no test stands for goes."""
    rows = {each.what: each for each in committed()} | {row.what: row}
    lines = [
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in rows[what])} |"
        for what in marked()
        if what in rows
    ]
    before, after = PAGE.read_text().split(_HEAD)
    rest = after[after.index("\n## ") + 1 :]
    PAGE.write_text(f"{before}{_HEAD}" + "\n".join(lines) + f"\n\n{rest}")
