"""`svi shard`: a table (or a synthetic model) in, a shard folder out."""

import contextlib
import json
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from trainer.data.packing.columns import source_columns
from trainer.data.packing.pack import pack
from trainer.data.packing.parts import PartOf, Parts
from trainer.data.sources.mixed import refuse_mixed
from trainer.data.sources.source import Source, open_source
from trainer.data.sources.synthetic import SyntheticSource
from trainer.data.store import atomic_write
from trainer.errors import UserError, counted
from trainer.options.allowed import refuse_others
from trainer.options.verbs import Shard
from trainer.training.columns_line import columns_line
from trainer.training.data import places
from trainer.training.row_progress import RowProgress


def run(cfg: Shard, run_dir: Path) -> float:
    """Packs and returns the number of training rows."""
    del run_dir
    if not cfg.out:
        raise UserError("no output folder was given: add out=DIR.")
    out = Path(cfg.out)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if cfg.finish:
        if cfg.part is not None:
            raise UserError("part= and finish=true are two steps: run every part first, then finish=true once.")
        with _stopping_on_signals("run it again: what was made is kept"), RowProgress(console, "writing") as watch:
            train, held_out = Parts(out).finish(**_resources(cfg), progress=watch.show)
    elif cfg.part is not None:
        return _part(cfg, Parts(out), console)
    else:
        with _stopping_on_signals("nothing was packed"), RowProgress(console, "packing") as watch:
            source, truth = _source(cfg)
            train, held_out = pack(source, out, progress=watch.show, **_options(cfg), **_resources(cfg))
            if truth is not None:
                _write_truth(out, truth)
    dropped = train.meta.get("dropped", 0)
    console.print(
        f"{cfg.out}: {counted(train.num_rows, 'row')} to train on, {held_out.num_rows if held_out else 0:,} held out"
        + (f", {dropped:,} dropped for missing values" if dropped else "")
    )
    console.print(columns_line(train))
    return float(train.num_rows)


def _part(cfg: Shard, parts: Parts, console: Console) -> float:
    """Reads one part; where all are read already, makes its share of the shards. Returns the rows read."""
    part = _part_of(str(cfg.part))
    number, of = part
    resources = _resources(cfg)
    with _stopping_on_signals(f"start part={number}/{of} again: it does what is left of it"):
        with RowProgress(console, f"reading part {number} of {of}") as watch:
            source, truth = _source(cfg)
            rows = parts.read(source, part, progress=watch.show, **_options(cfg), **resources)
            if truth is not None and not (parts.packed / "truth.json").exists():
                _write_truth(parts.packed, truth)
        missing, made = parts.missing(), 0
        if not missing:
            del resources["overwrite"]
            with RowProgress(console, f"writing part {number} of {of}") as watch:
                made = parts.write(part, progress=watch.show, **resources)
    console.print(
        f"part {number} of {of}: "
        + ("read before" if rows is None else f"{counted(rows, 'row')} read")
        + (
            f" · {len(missing)} of {of} parts to come"
            if missing
            else f" · {counted(made, 'shard')} made; now finish=true"
        )
    )
    return float(rows or 0)


def _part_of(text: str) -> PartOf:
    """Read "3/16" as part 3 of 16."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None:
        raise UserError(f"part={text} is not a part: write part=1/16 for the first of 16.")
    return PartOf(int(found[1]), int(found[2]))


def _options(cfg: Shard) -> dict[str, Any]:
    """The arguments of `pack`."""
    return {
        "columns": {name: value if isinstance(value, str) else list(value) for name, value in cfg.columns.items()}
        or None,
        "held_out": cfg.split.held_out,
        "seed": cfg.seed,
        "shard_bytes": cfg.shard_bytes,
        "block_rows": cfg.block_rows,
        "missing": cfg.missing,
        "standardize": cfg.standardize,
        "categories": cfg.categories,
        "group_by": cfg.group_by,
        "split_by": cfg.split.by,
        "split_time": cfg.split.time,
        "split_after": cfg.split.after,
        "like": None if cfg.like is None else places(cfg.like),
    }


def _resources(cfg: Shard) -> dict[str, Any]:
    """What changes no byte of what is packed."""
    return {"memory_bytes": cfg.memory_bytes, "workers": cfg.workers, "overwrite": cfg.overwrite}


@contextlib.contextmanager
def _stopping_on_signals(left: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM unwind the stack, which clears what is half-written, and exit with 128 + n."""

    def stop(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one does not interrupt the clearing up
        print(f"svi shard: stopped by {signal.Signals(number).name}; {left}.", file=sys.stderr)
        sys.exit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _source(cfg: Shard) -> tuple[Source, dict[str, Any] | None]:
    """The table, and what a synthetic one was made with."""
    if cfg.source == "synthetic":
        return _synthetic(cfg)
    if cfg.source:
        source = open_source(cfg.source)
        columns = _options(cfg)["columns"]
        if cfg.like is None:  # else its columns say what these are
            refuse_mixed(source, source_columns(columns) if columns else source.fields, cfg.categories)
        return source, None
    raise UserError("no table was given: add source=PATH (Parquet, CSV or .npz; a glob works too) or source=synthetic.")


def _synthetic(cfg: Shard) -> tuple[SyntheticSource, dict[str, Any]]:
    if not cfg.rows:
        raise UserError("a synthetic table needs a size: add rows=1000000.")
    rows, seed = cfg.rows, cfg.seed
    refuse_others(cfg.model, cfg.allow)
    from trainer.options import build  # torch and Pyro, which tables do without

    model = build.model(cfg.model)
    if not hasattr(model, "truth") or not hasattr(model, "rows"):
        raise UserError(
            f"{type(model).__name__} cannot make rows: source=synthetic needs a model of the zoo, model=linear."
        )
    truth = model.truth(np.random.default_rng(seed))

    def sample(generator: np.random.Generator, first: int, count: int) -> dict[str, np.ndarray]:
        made: dict[str, np.ndarray] = model.rows(truth, generator, first, count)
        return made

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
