"""`svi shard`: a table (or a synthetic model) in, a shard folder out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.app import build
from trainer.data.index import Column
from trainer.data.pack import pack
from trainer.data.sources import open_source
from trainer.data.store import atomic_write
from trainer.data.synthetic import SyntheticSource
from trainer.errors import UserError


def run(cfg: DictConfig, run_dir: Path) -> float:
    """Packs and returns the number of training rows."""
    if not cfg.out:
        raise UserError("no output folder was given: add out=DIR.")
    console = Console(highlight=False)
    truth = None
    source: Any
    columns: Any = OmegaConf.to_container(cfg.columns, resolve=True)
    if cfg.source == "synthetic":
        source, truth = _synthetic(cfg)
    elif cfg.source:
        source = open_source(str(cfg.source))
    else:
        raise UserError(
            "no table was given: add source=PATH (Parquet, CSV or .npz; a glob works too) or source=synthetic."
        )
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} rows"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("packing", total=source.num_rows, rate="")

        def progress(done: int, total: int | None) -> None:
            speed = bar.tasks[0].speed or 0.0
            bar.update(task, completed=done, total=total, rate=f"{speed / 1e6:.2f} M rows/s")

        train, held_out = pack(
            source,
            Path(str(cfg.out)),
            columns=columns or None,
            held_out=float(cfg.split.held_out),
            seed=int(cfg.seed),
            shard_bytes=int(cfg.shard_bytes),
            block_rows=int(cfg.block_rows),
            memory_bytes=int(cfg.memory_bytes),
            missing=str(cfg.missing),
            standardise=tuple(cfg.standardise),
            group_by=cfg.group_by,
            overwrite=bool(cfg.overwrite),
            progress=progress,
        )
    if truth is not None:
        with atomic_write(Path(str(cfg.out)) / "truth.json") as file:
            file.write(
                json.dumps({name: np.asarray(value).tolist() for name, value in truth.items()}, indent=1).encode()
            )
    dropped = train.meta.get("dropped", 0)
    console.print(
        f"{cfg.out}: {train.num_rows:,} rows to train on, {held_out.num_rows if held_out else 0:,} held out"
        + (f", {dropped:,} dropped for missing values" if dropped else "")
        + f" · columns {', '.join(_named(column) for column in train.columns if column.name != 'row_id')}"
    )
    return float(train.num_rows)


def _named(column: Column) -> str:
    return f"{column.name}{list(column.shape)}" if column.shape else column.name


def _synthetic(cfg: DictConfig) -> tuple[SyntheticSource, dict[str, Any]]:
    if not cfg.rows:
        raise UserError("a synthetic table needs a size: add rows=1000000.")
    model = build.model(cfg.model)
    if not hasattr(model, "truth") or not hasattr(model, "rows"):
        raise UserError(
            f"{type(model).__name__} cannot make rows: source=synthetic needs a model of the zoo, model=linear."
        )
    truth = model.truth(np.random.default_rng(int(cfg.seed)))

    def rows(generator: np.random.Generator, first: int, count: int) -> dict[str, np.ndarray]:
        return model.rows(truth, generator, first, count)

    return SyntheticSource(rows, int(cfg.rows), seed=int(cfg.seed)), truth
