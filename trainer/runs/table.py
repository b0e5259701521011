"""Runs side by side, in words."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from trainer.runs.folder import Run

COLUMNS = (
    "run",
    "status",
    "model",
    "guide",
    "N",
    "steps",
    "rows/s",
    "ELBO",
    "per row",
    "held out",
    "why",
    "age",
    "options",
)
_OWN = ("run_dir=", "sweep_dir=", "trial=", "ckpt_path=")  # that each run has for itself


def cells(run: Run, folder: Path, now: float) -> list[str]:
    """What `COLUMNS` name, but the last. Metrics of a run without a result are of its latest chunk, with a ``~``."""
    about = "" if run.headline is not None else "~"

    def figure(name: str, form: str) -> str:
        value = run.metrics.get(name)
        return "" if value is None else f"{value:{form}}"

    def estimate(name: str, form: str) -> str:
        text = figure(name, form)
        return about + text if text else ""

    lost = run.metrics.get("rows_left_out", 0)
    return [
        str(run.folder.relative_to(folder)),
        run.status,
        run.model,
        run.guide,
        figure("rows", ",.0f") + (f" of {run.metrics['rows'] + lost:,}" if lost else ""),
        figure("steps", ",.0f"),
        figure("rows_per_second", ",.0f"),
        estimate("elbo", ",.2f"),
        estimate("elbo_per_row", ".6g"),
        figure("held_out_elbo_per_row", ".6g"),
        run.why,
        age(now - run.written),
    ]


def differences(runs: Sequence[Run]) -> list[str]:
    """The words of each run's command that not all of them were given, as far as they matter to its result."""
    words = [[word for word in run.overrides if not word.startswith(_OWN)] for run in runs]
    return [" ".join(word for word in mine if not all(word in other for other in words)) for mine in words]


def sweeps(runs: Sequence[Run], folder: Path) -> list[str]:
    """A sentence for each folder that holds several runs as its jobs."""
    said = []
    for place in sorted({run.folder.parent for run in runs if (run.folder.parent / "multirun.yaml").exists()}):
        jobs = [run for run in runs if run.folder.parent == place]
        counts = ", ".join(f"{count} {status}" for status, count in Counter(run.status for run in jobs).items())
        best = max((run for run in jobs if run.headline is not None), key=lambda run: run.headline or 0.0, default=None)
        of_best = f"; the best, {best.headline:.6g}: {best.folder.relative_to(folder)}" if best else ""
        said.append(f"sweep {place.relative_to(folder)}: {len(jobs)} jobs, {counts}{of_best}")
    return said


def age(seconds: float) -> str:
    """A length of time in its largest unit."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
