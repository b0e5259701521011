"""`svi runs`: the runs and sweeps below a folder, as a table and as a page, or the command of the best one."""

import os
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trainer.errors import UserError
from trainer.options.verbs import Runs
from trainer.runs.folder import find
from trainer.runs.table import COLUMNS, cells, differences, sweeps
from trainer.sweeps.winner import print_best

_COLOURS = {"running": "cyan", "done": "green", "failed": "red", "killed": "red", "stopped": "yellow"}
_WIDE = 220  # characters, where nobody's terminal says


def run(cfg: Runs, run_dir: Path) -> float:
    """Prints the table, writes the page where one is asked for, and returns the number of runs.

    With ``best`` it prints the best run's command and returns its ELBO per row.
    """
    del run_dir
    folder = Path(cfg.dir)
    if cfg.best or cfg.storage is not None or cfg.study is not None:
        return print_best(folder, cfg.storage, cfg.study)
    if not folder.is_dir():
        raise UserError(f"dir={folder} is not a folder.")
    found, now = find(folder), time.time()
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(highlight=False, width=_WIDE)
    if not found:
        raise UserError(f"no run was found below {folder}: svi train writes one into run_dir=.")
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for each, options in zip(found, differences(found), strict=True):
        name, status, *rest = (*cells(each, folder, now), options)
        table.add_row(escape(name), f"[{_COLOURS.get(status, 'default')}]{status}[/]", *map(escape, rest))
    console.print(table)
    for sentence in sweeps(found, folder):
        console.print(sentence, markup=False)
    if cfg.html is not None:
        from trainer.runs.page import page  # matplotlib, which the table does without

        path = Path(cfg.html)
        path.write_text(page(found, folder, now), encoding="utf-8")
        console.print(f"wrote {path}", markup=False)
    return float(len(found))
