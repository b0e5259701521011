"""`svi shard`: a table (or a synthetic model) in, a shard folder out."""

import contextlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.app import build
from trainer.data.columns import source_columns
from trainer.data.index import Column
from trainer.data.mixed import refuse_mixed
from trainer.data.pack import pack
from trainer.data.sources import Source, open_source
from trainer.data.store import atomic_write
from trainer.data.synthetic import SyntheticSource
from trainer.errors import UserError

_LINES = 10  # in a log file: about one for each tenth of the table


def run(cfg: DictConfig, run_dir: Path) -> float:
    """Packs and returns the number of training rows."""
    del run_dir
    if not cfg.out:
        raise UserError("no output folder was given: add out=DIR.")
    out, options = Path(str(cfg.out)), _options(cfg)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    with _stopping_on_signals(), _Watch(console) as watch:
        source, truth = _source(cfg)
        train, held_out = pack(source, out, progress=watch.show, **options)
        if truth is not None:
            _write_truth(out, truth)
    dropped = train.meta.get("dropped", 0)
    console.print(
        f"{cfg.out}: {train.num_rows:,} rows to train on, {held_out.num_rows if held_out else 0:,} held out"
        + (f", {dropped:,} dropped for missing values" if dropped else "")
        + f" · columns {', '.join(_named(column) for column in train.columns if column.name != 'row_id')}"
    )
    return float(train.num_rows)


def shards_of(path: str, console: Console) -> str:
    """``path`` if it is a shard folder, else the folder beside it into which its table is packed, once.

    Raises UserError where the table has changed since.
    """
    remote, here = "://" in path, Path(path)
    if not remote and not here.is_file() and not any(here.rglob("*.parquet")):
        return path  # a shard folder, or nothing: whoever opens it says so
    out = Path(f"{path.rstrip('/').rpartition('/')[2]}.shards") if remote else here.with_name(f"{here.name}.shards")
    with FileLock(f"{out}.lock"):
        if not out.is_dir():
            source = open_source(path)
            refuse_mixed(source, source.fields, ())
            console.print(f"packing {path} into {out}, this once (svi shard chooses columns, splits and more)")
            pack(source, out)
        elif not remote and here.stat().st_mtime > out.stat().st_mtime:
            raise UserError(
                f"{path} has changed since it was packed: remove {out} to pack it again, or train on {out}."
            )
    return str(out)


def _options(cfg: DictConfig) -> dict[str, Any]:
    """The arguments of `pack`. Raises UserError for one of another type."""
    columns: Any = OmegaConf.to_container(cfg.columns, resolve=True)
    return {
        "columns": {name: _source_columns(name, value) for name, value in columns.items()} or None,
        "held_out": _number("split.held_out", cfg.split.held_out),
        "seed": _integer("seed", cfg.seed),
        "shard_bytes": _integer("shard_bytes", cfg.shard_bytes),
        "block_rows": _integer("block_rows", cfg.block_rows),
        "memory_bytes": _integer("memory_bytes", cfg.memory_bytes),
        "missing": str(cfg.missing),
        "standardise": _names(cfg.standardise),
        "group_by": None if cfg.group_by is None else str(cfg.group_by),
        "split_by": None if cfg.split.by is None else str(cfg.split.by),
        "split_time": None if cfg.split.time is None else str(cfg.split.time),
        "split_after": cfg.split.after,
        "overwrite": _truth_value("overwrite", cfg.overwrite),
    }


def _source_columns(name: str, value: Any) -> str | list[str]:
    """One name or several: a name of digits (columns.x=5) arrives as a number."""
    if isinstance(value, list) and not any(isinstance(part, list | dict) for part in value):
        return [str(part) for part in value]
    if isinstance(value, str | int | float):
        return str(value)
    raise UserError(f"columns.{name} names no source column: write columns.{name}=a or columns.{name}=[a,b].")


def _names(value: Any) -> tuple[str, ...]:
    """The names in a list, or the only one."""
    return (value,) if isinstance(value, str) else tuple(str(name) for name in value or ())


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{key}={value} is no number.")
    return float(value)


def _integer(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise UserError(f"{key}={value} is no whole number.")
    return int(value)


def _truth_value(key: str, value: Any) -> bool:
    if not isinstance(value, bool):  # bool("no") is True
        raise UserError(f"{key}={value} is unknown: write {key}=true or {key}=false.")
    return value


@contextlib.contextmanager
def _stopping_on_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM unwind the stack, which clears what is half-written, and exit with 128 + n."""

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one does not interrupt the clearing up
        print(f"svi shard: stopped by {signal.Signals(number).name}; nothing was packed.", file=sys.stderr)
        sys.exit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Watch:
    """What a watcher sees: a bar with rows, rows/s and time left on a terminal, a line now and then in a log file."""

    def __init__(self, console: Console):
        self.console, self.next_line, self.start = console, 0, time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} rows"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("reading", total=None, rate="")

    def __enter__(self) -> "_Watch":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def show(self, done: int, total: int | None) -> None:
        """``done`` of ``total`` rows."""
        rate = f"{done / max(time.monotonic() - self.start, 1e-9):,.0f} rows/s"
        self.bar.update(self.task, description="packing", completed=done, total=total, rate=rate)
        if not self.console.is_terminal and (done >= self.next_line or done == total):
            self.console.print(f"packing {done:,}" + (f"/{total:,} rows" if total else " rows") + f"  {rate}")
            self.next_line = done + max(1, (total or 0) // _LINES)


def _named(column: Column) -> str:
    categories = f" ({len(column.vocabulary):,} categories)" if column.vocabulary is not None else ""
    return (f"{column.name}{list(column.shape)}" if column.shape else column.name) + categories


def _source(cfg: DictConfig) -> tuple[Source, dict[str, Any] | None]:
    """The table, and what a synthetic one was made with."""
    if cfg.source == "synthetic":
        return _synthetic(cfg)
    if cfg.source:
        source = open_source(str(cfg.source))
        columns = _options(cfg)["columns"]
        refuse_mixed(source, source_columns(columns) if columns else source.fields, _names(cfg.categories))
        return source, None
    raise UserError("no table was given: add source=PATH (Parquet, CSV or .npz; a glob works too) or source=synthetic.")


def _synthetic(cfg: DictConfig) -> tuple[SyntheticSource, dict[str, Any]]:
    if not cfg.rows:
        raise UserError("a synthetic table needs a size: add rows=1000000.")
    rows, seed = _integer("rows", cfg.rows), _integer("seed", cfg.seed)
    if seed < 0:
        raise UserError(f"seed={seed} is out of range: give an integer from 0 to 2**63 - 1.")
    model = build.model(cfg.model)
    if not hasattr(model, "truth") or not hasattr(model, "rows"):
        raise UserError(
            f"{type(model).__name__} cannot make rows: source=synthetic needs a model of the zoo, model=linear."
        )
    truth = model.truth(np.random.default_rng(seed))

    def sample(generator: np.random.Generator, first: int, count: int) -> dict[str, np.ndarray]:
        return model.rows(truth, generator, first, count)

    return SyntheticSource(sample, rows, seed=seed), truth


def _write_truth(out: Path, truth: dict[str, Any]) -> None:
    """Writes out/truth.json; without it ``out`` is not finished, and goes."""
    text = json.dumps({name: np.asarray(value).tolist() for name, value in truth.items()}, indent=1)
    try:
        with atomic_write(out / "truth.json") as file:
            file.write(text.encode())
    except BaseException as error:
        shutil.rmtree(out, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write '{out}': {error.strerror or error}; choose another out=.") from error
        raise
