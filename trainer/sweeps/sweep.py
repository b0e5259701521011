"""A search over configs: trials of an Optuna study, each a job of Hydra's launcher in a run folder of its own."""

import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table

from trainer.errors import counted, first_line
from trainer.runs.folder import cut_short
from trainer.runs.secrets import redact_files, redacted
from trainer.sweeps import search_space as space
from trainer.sweeps.study import Grid, Search, Worker

_SHOWN = 10  # trials of the closing table


def sweep(plugin: Any, arguments: Sequence[str]) -> float:
    """Runs trials until the study has ``plugin.n_trials``, and returns the best value.

    ``plugin``: the sweeper that Hydra made. A signal puts what had not ended back into the queue.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    console = Console(highlight=False, soft_wrap=True)
    parser = OverridesParser.create(plugin.hydra_context.config_loader)
    words = [f"{key}={value}" for key, value in plugin.params.items()] + list(arguments)
    dimensions, fixed = space.parted(parser.parse_overrides(words))
    plugin.validate_batch_is_legal([[*fixed, *space.overrides_of({n: space.first(d) for n, d in dimensions.items()})]])
    folder, n_trials = Path(str(plugin.config.hydra.sweep.dir)), int(plugin.n_trials)
    command = redacted(sorted(word for word in words if not word.startswith("sweep_dir=")))
    search = Search(dimensions, plugin.sampler, plugin.pruner, command)
    worker = Worker(folder, str(plugin.storage), str(plugin.study_name), search)
    if plugin.sampler._target_ == f"{Grid.__module__}.{Grid.__name__}":
        n_trials = min(n_trials, space.count(dimensions))
    OmegaConf.save(plugin.config, folder / "multirun.yaml")  # as Hydra's own sweeper does
    redact_files(folder)
    console.print(
        f"study {worker.study.study_name} in {redacted(str(plugin.storage))} · {counted(n_trials, 'trial')} · {folder}"
    )
    try:
        while trials := worker.ask(n_trials, int(plugin.n_jobs)):
            _run(plugin, worker, trials, fixed, console)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        worker.leave()
        _close(worker.study, folder, n_trials, console)
    done = [trial.value for trial in worker.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
    return max((value for value in done if value is not None), default=math.nan)


def _run(plugin: Any, worker: Worker, trials: Sequence[optuna.Trial], fixed: list[str], console: Console) -> None:
    """Launches a batch and tells the study what became of it; what a signal cut short waits again."""
    jobs = []
    for trial in trials:
        words = [*fixed, *space.overrides_of(trial.params)]
        trial.set_user_attr("overrides", redacted(words))
        jobs.append([*words, *_of_trial(plugin, worker, trial.number, words)])
    before = {trial.number: cut_short(worker.folder / str(trial.number)) for trial in trials}
    try:
        returns = plugin.launcher.launch(jobs, initial_job_idx=trials[0].number)
    except Exception as error:  # of the launcher: a job that was killed, a config that does not compose
        for trial in trials:
            worker.fail(trial, redacted(first_line(error)))
            console.print(f"trial {trial.number} failed: {redacted(first_line(error))}")
        return
    except BaseException:
        for trial in trials:
            worker.give_back(trial.number)
        console.print("stopped; run the same command to resume the sweep")
        raise
    for trial, job in zip(trials, returns, strict=True):
        if job.status != JobStatus.COMPLETED and cut_short(worker.folder / str(trial.number)) > before[trial.number]:
            worker.give_back(trial.number)
            console.print(f"trial {trial.number} was stopped before its end, and waits")
            continue
        why = _tell(worker, trial, job)
        if why:
            console.print(f"trial {trial.number} failed: {why}")


def _of_trial(plugin: Any, worker: Worker, number: int, words: list[str]) -> list[str]:
    """What a job is told beside its config: its folder, to resume where it was, and whom to report to."""
    place, name = (QuotedString(text, Quote.single).with_quotes() for text in (worker.address, worker.study.study_name))
    resume = [] if any(word.startswith("ckpt_path=") for word in words) else ["ckpt_path=last"]
    pruned = plugin.pruner is not None and not str(plugin.pruner._target_).endswith(".NopPruner")
    report = [f"trial={{storage:{place},study:{name},number:{number}}}"] if pruned else []
    return [*resume, f"hydra.sweep.subdir={number}", *report]


def _tell(worker: Worker, trial: optuna.Trial, job: JobReturn) -> str | None:
    """Why a job failed, None if it did not."""
    if job.status == JobStatus.COMPLETED:
        try:
            value = float(job.return_value)
        except (TypeError, ValueError):
            value = math.nan
        if math.isfinite(value):
            worker.complete(trial.number, value)
            return None
        why = f"its value is {job.return_value}"
    else:
        why = redacted(first_line(job._return_value))
    worker.fail(trial, why)
    return why


def _close(study: optuna.Study, folder: Path, n_trials: int, console: Console) -> None:
    """The closing table and the plots of what the study holds."""
    trials = study.get_trials(deepcopy=False)
    if not trials:
        return
    done = sorted((t for t in trials if t.state == TrialState.COMPLETE), key=lambda t: -(t.value or 0.0))
    if done:
        console.print(_table(done[:_SHOWN]))
    counts = {state.name.lower(): sum(t.state == state for t in trials) for state in TrialState}
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    console.print(f"{len(trials)} of {counted(n_trials, 'trial')}: {said} · {folder}")
    if done:
        console.print(f"the best: svi runs {folder} best=true")
        _plot(study, folder, console)


def _table(trials: Sequence[FrozenTrial]) -> Table:
    table = Table("trial", "ELBO per row", *(names := sorted({key for t in trials for key in t.params})), "seconds")
    for trial in trials:
        values = (trial.params.get(name) for name in names)
        shown = (f"{v:.4g}" if isinstance(v, float) else "" if v is None else str(v) for v in values)
        seconds = trial.duration.total_seconds() if trial.duration else math.nan
        table.add_row(str(trial.number), f"{trial.value:.6g}", *shown, f"{seconds:.1f}")
    return table


def _plot(study: optuna.Study, folder: Path, console: Console) -> None:
    """history.png and slices.png."""
    try:
        import matplotlib
    except ImportError:
        console.print("no plots: pip install matplotlib")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls its plots experimental
        for name, plot in (("history", plots.plot_optimization_history), ("slices", plots.plot_slice)):
            plot(study, target_name="ELBO per row")
            pyplot.gcf().savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
            pyplot.close("all")
