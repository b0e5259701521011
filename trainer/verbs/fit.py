"""`fit`: from a table in memory, on disk or in shards to a posterior, in one call."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from rich.console import Console

from trainer.data.packing.columns import ColumnMap
from trainer.data.packing.pack import pack
from trainer.data.shards.folder import ShardFolder
from trainer.data.shards.splits import is_packed
from trainer.data.sources.memory import MemorySource, MemoryTable
from trainer.data.sources.source import Source, open_source
from trainer.distributed.ranks import world
from trainer.engine.signals import StopOnSignal
from trainer.errors import Stopped, UserError
from trainer.inference.isolation import own_state
from trainer.inference.model.arguments import arguments
from trainer.inference.model.plates import WEIGHT
from trainer.inference.rows.entries import LENGTH
from trainer.options.allowed import typed
from trainer.options.entrance import of_call, option
from trainer.options.kinds import Count, Names, Seed, Share
from trainer.options.verbs import Missing, Precision, Train
from trainer.posterior.posterior import Posterior
from trainer.posterior.summary import between_seeds
from trainer.training.columns import columns_taken
from trainer.training.columns_line import columns_line
from trainer.training.prepare import Context, Given
from trainer.training.run import quiet_lightning, train
from trainer.training.threads import share_threads
from trainer.training.weights import packed_for

_AGREE = 1.05


def fit(  # noqa: PLR0913  what its user gives, by name
    model: Any,
    data: MemoryTable | ShardFolder | str | Path | Sequence[str | Path],
    guide: Any = "mean_field",
    *,
    columns: ColumnMap | None = None,
    standardize: Sequence[str] = (),
    standardise: Sequence[str] = (),
    categories: Sequence[str] = (),
    missing: str = "error",
    held_out: float = 0.0,
    weight: str | None = None,
    group_by: str | None = None,
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
    ``guide``: a name ("mean_field", "full_rank", "block", "low_rank", "arrow", "by_site", "point", "laplace"), one of
        `pyro.infer.autoguide`'s classes, or a guide of your own; ``options`` has a named one's, as {"guide.rank": 3}.
    ``columns``, ``standardize`` (or ``standardise``), ``categories``, ``missing``, ``held_out``: as for `svi shard`
        (not with a shard folder, which is packed); without ``columns`` those of the data that the model takes.
    ``weight``: the column that says how many observations a row stands for; in a dict of arrays the key "weight" does
        without it (docs/data.md).
    ``group_by``: the column whose values make rows one, as for `svi shard`: a person with all their answers.
    ``seeds``: how many fits to make, from ``seed`` on; the one of the highest ELBO is returned, with ``rhat`` between
        them.
    ``run_dir``: keep checkpoints, metrics and summary there (a folder for each of several seeds); None: no file is left
        behind.
    ``options``: anything else that `svi train` takes, as {"optimizer.lr": 0.01, "schedule": "constant"}.

    Raises UserError for what cannot be right, with the remedy; KeyboardInterrupt when it is interrupted.
    """
    seed, seeds = option(Seed, seed, "seed"), option(Count, seeds, "seeds")
    weight, dtype = option(str | None, weight, "weight"), option(Precision, dtype, "dtype")
    packing = {
        "standardize": (
            *option(Names, standardize, "standardize"),
            *option(Names, standardise, "standardise"),
        ),
        "categories": option(Names, categories, "categories"),
        "missing": option(Missing, missing, "missing"),
        "held_out": option(Share, held_out, "held_out"),
        "group_by": option(str | None, group_by, "group_by"),
    }
    given = {"batch_size": batch_size, "max_epochs": max_epochs, "max_steps": max_steps, "dtype": dtype}
    chosen = {**{name: value for name, value in given.items() if value is not None}, **(options or {})}
    names = typed([f"{name}={value}" for name, value in chosen.items()])
    console = Console(quiet=not progress, highlight=False)
    with own_state(), contextlib.ExitStack() as opened:
        keep = run_dir is not None
        folder = Path(run_dir or opened.enter_context(TemporaryDirectory(prefix="svi-run-")))
        path = _packed(data, _Packing(columns, weight, dtype, packing), (model, guide), opened, console)
        if weight is not None and _is_packed(data):
            chosen["weight"] = weight
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
            "look for strongly correlated latents."
        )
    return replace(best, rhat=rhat)


class _Packing(NamedTuple):
    """How a table is to be packed."""

    columns: ColumnMap | None
    weight: str | None
    dtype: str | None
    options: Mapping[str, Any]
    """The others of `pack`, which a packed table does without."""


def _packed(
    data: Any, asked: _Packing, takers: tuple[Any, ...], opened: contextlib.ExitStack, console: Console
) -> str | list[str]:
    """The shard folder of ``data``, or several: its own, or one that is removed with ``opened``."""
    columns, weight, dtype, packing = asked
    if _is_packed(data):
        if columns or any(value not in ((), 0.0, "error", None) for value in packing.values()):
            raise UserError(f"columns, {', '.join(packing)} belong to packing: this data is packed already.")
        return [str(each) for each in data] if isinstance(data, list | tuple) else str(getattr(data, "place", data))
    path = Path(opened.enter_context(TemporaryDirectory(prefix="svi-data-"))) / "shards"
    source = open_source(data) if isinstance(data, (str, Path)) else MemorySource(data)
    if columns is None:
        if weight is None and callable(takers[0]) and not isinstance(takers[0], type):
            arguments(takers[0], _names(source, packing))  # where one is absent, the sentence has all of the table
        columns = packed_for(data, source.fields, columns_taken(takers, source.fields), weight, console.print) or None
    elif weight is not None:
        if columns.get(WEIGHT, weight) not in (weight, columns.get(weight)):
            raise UserError(f"weight={weight}, but columns has {WEIGHT}={columns[WEIGHT]}: give one of them.")
        columns = {**columns, WEIGHT: columns.get(weight, weight)}
    wide = "float64" if dtype == "float64" else None
    train, _ = pack(source, path, columns=columns, float_dtype=wide, **packing)
    console.print(columns_line(train))
    return str(path)


def _names(source: Source, packing: Mapping[str, Any]) -> list[str]:
    """The columns of a table once it is packed."""
    return [*source.fields, *([LENGTH] if packing["group_by"] is not None else [])]


def _is_packed(data: Any) -> bool:
    """Whether it is a shard folder, or a list of several."""
    if isinstance(data, list | tuple):
        return all(isinstance(each, str | Path) for each in data)
    return isinstance(data, ShardFolder) or (isinstance(data, (str, Path)) and is_packed(data))


def _fitted(cfg: Train, run_dir: Path, console: Console, given: Given) -> Posterior:
    """One run."""
    here = world(cfg.trainer)
    if here.size > 1:
        raise UserError("fit works in this process alone: for several ranks, use svi train.")
    with own_state(cfg.seed):
        threads = share_threads(1, cfg.threads)
        quiet_lightning()
        try:
            with StopOnSignal() as signals:
                module, finish = train(cfg, Context(run_dir, here, threads, console, signals), given)
                signals.check()
        except Stopped:
            raise KeyboardInterrupt from None
        return finish.posterior(module)
