"""`svi verify`: every hash of a shard folder checked; exit code 1 where one is wrong."""

import sys
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from trainer.data.index import INDEX_NAME
from trainer.data.verify import verify
from trainer.errors import UserError


def run(cfg: DictConfig, run_dir: Path) -> float:
    """Checks both splits and returns the rows that were checked; exits with 1 after naming every damaged shard."""
    console, rows, damaged = Console(highlight=False, soft_wrap=True), 0, 0
    for folder in _splits(Path(str(cfg.data.path))):
        report = verify(folder)
        for sentence in report.damaged:
            print(f"svi verify: {sentence}", file=sys.stderr)
        console.print(
            f"{folder}: {report.shards} shards, {report.blocks:,} blocks, {report.rows:,} rows are intact"
            + (f"; {len(report.damaged)} damaged" if report.damaged else "")
        )
        rows, damaged = rows + report.rows, damaged + len(report.damaged)
    if damaged:
        sys.exit(1)
    return float(rows)


def _splits(path: Path) -> list[Path]:
    """The split folders of ``path``, or itself. Raises UserError where there is no index at all."""
    splits = [path / split for split in ("train", "held_out") if (path / split).is_dir()]
    if (path / INDEX_NAME).is_file():
        return [path]
    if not any((split / INDEX_NAME).is_file() for split in splits):
        raise UserError(f"data.path={path} is no shard folder: it holds no {INDEX_NAME}.")
    return splits
