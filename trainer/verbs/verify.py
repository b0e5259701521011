"""`svi verify`: every hash of a shard folder checked; exit code 1 where one is wrong."""

import sys
from pathlib import Path

from rich.console import Console

from trainer.data.shards.folder import open_split
from trainer.data.shards.splits import split_files
from trainer.data.shards.verify import verify
from trainer.errors import counted
from trainer.options.verbs import Verify
from trainer.training.data import cache_of, places
from trainer.training.row_progress import RowProgress


def run(cfg: Verify, run_dir: Path) -> float:
    """Checks both splits and returns the rows that were checked; exits with 1 after naming every damaged shard.

    Raises UserError for several folders that are intact but do not go together.
    """
    del run_dir
    console, rows, damaged = Console(highlight=False, soft_wrap=True), 0, 0
    several = places(cfg.data.path)
    for files in (each for place in several for each in split_files(place, cache_of(cfg.data))):
        with RowProgress(console, "checking") as watch:
            report = verify(files, watch.show)
        for sentence in report.damaged:
            print(f"svi verify: {sentence}", file=sys.stderr)
        console.print(
            f"{files.place}: {counted(report.shards, 'shard')}, {counted(report.blocks, 'block')}, "
            f"{counted(report.rows, 'row')} are intact" + (f"; {len(report.damaged)} damaged" if report.damaged else "")
        )
        rows, damaged = rows + report.rows, damaged + len(report.damaged)
    if damaged:
        sys.exit(1)
    if len(several) > 1:
        open_split(several, "train", cache_of(cfg.data), check=False)
    return float(rows)
