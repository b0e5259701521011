"""`svi verify`: every hash of a shard folder checked; exit code 1 where one is wrong."""

import sys
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from trainer.data.reader import open_split
from trainer.data.verify import verify
from trainer.errors import UserError


def run(cfg: DictConfig, run_dir: Path) -> float:
    """Checks both splits and returns the rows that were checked."""
    console, rows = Console(highlight=False), 0
    path = Path(str(cfg.data.path))
    found = [(split, open_split(path, split)) for split in ("train", "held_out")]
    if not any(folder for _, folder in found):
        raise UserError(f"data.path={path} is no shard folder: it holds no index.json.")
    for split, folder in found:
        if folder is None:
            continue
        try:
            report = verify(folder)
        except UserError as error:
            print(f"svi verify: {error}", file=sys.stderr)
            sys.exit(1)
        rows += report.rows
        console.print(
            f"{path} {split}: {report.shards} shards, {report.blocks:,} blocks, {report.rows:,} rows are intact"
        )
    return float(rows)
