"""`fit`: from a table in memory, on disk or in shards to a posterior, in one call."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from trainer.app.allowed import typed
from trainer.app.columns import columns_line, columns_taken
from trainer.app.options.entrance import of_call
from trainer.app.options.verbs import Train
from trainer.app.ranks import share_threads, world
from trainer.app.train import Given, quiet_lightning, train
from trainer.data.packing.columns import ColumnMap
from trainer.data.packing.pack import pack
from trainer.data.shards.folder import ShardFolder, is_packed
from trainer.data.sources.memory import MemorySource, MemoryTable
from trainer.data.sources.source import open_source
from trainer.errors import Stopped, UserError
from trainer.lit.signals import StopOnSignal
from trainer.posterior.posterior import Posterior, between_seeds
from trainer.svi.process import own_state

_AGREE = 1.05


def fit(
    model: Any,
    data: MemoryTable | ShardFolder | str | Path | Sequence[str | Path],
    guide: Any = "mean_field",
    *,
    columns: ColumnMap | None = None,
    standardise: Sequence[str] = (),
    categories: Sequence[str] = (),
    missing: str = "error",
    held_out: float = 0.0,
    batch_size: int | None = None,
    max_epochs: float | None = None,
    max_steps: int | None = None,
    dtype: str | None = None,
    seed: int = 0,
    seeds: int = 1,
    run_dir: str | Path | None = None,
    progress: bool = True,
    options: Mapping[str, Any] | None = None,
) -> Posterior:
    """Fits ``guide`` to the posterior of a Pyro ``model`` given ``data``, in this process.

    ``data``: a pandas or polars data frame, an Arrow table, a dict of arrays [N, ...], the path of a file that
        `svi shard` reads, or a shard folder, or a list of several. A table is packed into a folder of its own that is
        removed at the end.
    ``guide``: "mean_field", one of `pyro.infer.autoguide`'s classes, or a guide of your own.
    ``columns``, ``standardise``, ``categories``, ``missing``, ``held_out``: as for `svi shard` (not with a shard
        folder, which is packed); without ``columns`` those of the data that the model takes.
    ``seeds``: how many fits to make, from ``seed`` on; the one of the highest ELBO is returned, with ``rhat`` between
        them.
    ``run_dir``: keep checkpoints, metrics and summary there (a folder for each of several seeds); None: no file is left
        behind.
    ``options``: anything else that `svi train` takes, as {"optimizer.lr": 0.01, "schedule": "constant"}.

    Raises UserError for what cannot be right, with the remedy; KeyboardInterrupt when it is interrupted.
    """
    if seeds < 1:
        raise UserError(f"seeds={seeds} must be at least 1.")
    given = {"batch_size": batch_size, "max_epochs": max_epochs, "max_steps": max_steps, "dtype": dtype}
    chosen = {**{name: value for name, value in given.items() if value is not None}, **(options or {})}
    names = typed([f"{name}={value}" for name, value in chosen.items()])
    console = Console(quiet=not progress, highlight=False)
    with own_state(), contextlib.ExitStack() as opened:
        keep = run_dir is not None
        folder = Path(run_dir or opened.enter_context(TemporaryDirectory(prefix="svi-run-")))
        packing = {"standardise": standardise, "categories": categories, "missing": missing, "held_out": held_out}
        path = _packed(data, columns, packing, dtype, (model, guide), opened, console)
        fits = []
        for each in range(seed, seed + seeds):
            own = folder if seeds == 1 else folder / f"seed-{each}"
            options = {"allow": names, **chosen, "seed": each, "data.path": path, "run_dir": str(own)}
            fits.append(_fitted(of_call("train", options), own, console, Given(model, guide, keep)))
    best = max(fits, key=lambda posterior: posterior.metrics["elbo"])
    if seeds == 1:
        return best
    rhat = between_seeds([posterior.summary() for posterior in fits])
    worst = max(rhat, key=lambda name: float(rhat[name].max()))
    if rhat[worst].max() > _AGREE:
        console.print(
            f'the {seeds} seeds disagree: R-hat {rhat[worst].max():.2f} at "{worst}"; train longer (max_epochs=), or '
            "look for latents that can stand in for each other."
        )
    return replace(best, rhat=rhat)


def _packed(
    data: Any,
    columns: ColumnMap | None,
    packing: Mapping[str, Any],
    dtype: str | None,
    takers: tuple[Any, ...],
    opened: contextlib.ExitStack,
    console: Console,
) -> str | list[str]:
    """The shard folder of ``data``, or several: its own, or one that is removed with ``opened``."""
    several = isinstance(data, list | tuple) and all(isinstance(each, str | Path) for each in data)
    if several or isinstance(data, ShardFolder) or (isinstance(data, (str, Path)) and is_packed(data)):
        if columns or any(value not in ((), [], 0.0, "error") for value in packing.values()):
            raise UserError(f"columns, {', '.join(packing)} belong to packing: this data is packed already.")
        return [str(each) for each in data] if several else str(getattr(data, "place", data))
    path = Path(opened.enter_context(TemporaryDirectory(prefix="svi-data-"))) / "shards"
    source = open_source(data) if isinstance(data, (str, Path)) else MemorySource(data)
    if columns is None:
        taken = columns_taken(takers, source.fields)
        columns = {name: name for name in source.fields if name in taken} or None
    wide = "float64" if dtype == "float64" else None
    train, _ = pack(source, path, columns=columns, float_dtype=wide, **packing)
    console.print(columns_line(train))
    return str(path)


def _fitted(cfg: Train, run_dir: Path, console: Console, given: Given) -> Posterior:
    """One run."""
    here = world(cfg.trainer)
    if here.size > 1:
        raise UserError("fit works in this process alone: for several ranks, use svi train.")
    with own_state(int(cfg.seed)):
        threads = share_threads(1, cfg.threads)
        quiet_lightning()
        try:
            with StopOnSignal() as signals:
                module, finish = train(cfg, run_dir, here, threads, console, signals, given)
                signals.check()
        except Stopped:
            raise KeyboardInterrupt from None
        return finish.posterior(module)
