"""The table, the ratios that matter, and the line that says what runs and how long it will take."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from scripts.benchmark.problems import Setting
from scripts.benchmark.turns import Result

LABELS = {
    "copy": "straight copy",
    "pyro": "Pyro, as in its tutorials",
    "pyro-indices": "Pyro, indices given",
    "pyro-jit": "Pyro JitTrace, indices given",
    "numpyro": "NumPyro, a step a call",
    "numpyro-scan": "NumPyro, lax.scan in memory",
    "eager": "ours, eager",
    "fused": "ours, fused in memory",
    "fused-shards": "ours, fused from shards",
    "fused-pair": "ours, fused, antithetic pair",
    "recipe": "ours, fit with its defaults",
}
RATIOS = (
    ("fused / NumPyro scan", "fused", "numpyro-scan"),
    ("fused / Pyro tutorial", "fused", "pyro"),
    ("fused / Pyro indices given", "fused", "pyro-indices"),
    ("shards / in memory", "fused-shards", "fused"),
)


@dataclass(frozen=True)
class Ratio:
    """How many times as fast ``over`` the other, the median over rounds (whose turns lie next to each other)."""

    label: str
    setting: Setting
    value: float


def name_of(setting: Setting) -> str:
    return f"{setting.model}, B = {setting.batch:,}, N = {setting.num_obs:,}"


def ratios(results: Sequence[Result]) -> list[Ratio]:
    """The ratios between the results of one setting, where both sides ran."""
    speeds = {result.contender: result.rows_per_second for result in results if not result.error}
    return [
        Ratio(label, results[0].setting, median(a / b for a, b in zip(speeds[ours], speeds[other])))
        for label, ours, other in RATIOS
        if ours in speeds and other in speeds
    ]


def results_table(settings: Sequence[Sequence[Result]]) -> Table:
    """A section for each setting."""
    table = Table(title="one optimization step: medians over rounds taken in turns", title_justify="left")
    table.add_column("contender", no_wrap=True, min_width=32)
    for heading in ("M rows/s", "µs/step", "of a copy", "peak MB", "compile s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for results in settings:
        table.add_row(f"[bold]{name_of(results[0].setting)}[/]")
        copies = [result.speed for result in results if result.contender == "copy" and not result.error]
        for result in results:
            label = "  " + LABELS[result.contender]
            if result.error:
                table.add_row(label, *["–"] * 4, f"({result.error[:24]})")
                continue
            table.add_row(
                label,
                f"{result.speed / 1e6:.3g}",
                "" if result.contender == "copy" else f"{median(result.step_seconds) * 1e6:,.1f}",
                f"{result.speed / copies[0]:.1%}" if copies else "",
                f"{(result.gpu_bytes or result.peak_bytes) / 1e6:,.0f}",
                f"{result.compile_seconds:.1f}",
            )
        table.add_section()
    return table


def ratios_table(every: Sequence[Ratio]) -> Table:
    table = Table(title="how many times as fast", title_justify="left")
    table.add_column("setting", no_wrap=True)
    for label, _, _ in RATIOS:
        table.add_column(label, justify="right")
    for setting in dict.fromkeys(ratio.setting for ratio in every):
        here = {ratio.label: ratio.value for ratio in every if ratio.setting == setting}
        table.add_row(name_of(setting), *(f"{here[label]:.2f}" if label in here else "–" for label, _, _ in RATIOS))
    return table


class ProgressLine:
    """What runs and the time left; where there is no terminal, a line for each setting."""

    def __init__(self, console: Console, total: float):
        self.console, self.where, self._due = console, "", 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(20),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            transient=True,
            speed_estimate_period=600,
            disable=not console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("", total=total)
        self._bar.start()

    def enter(self, where: str) -> None:
        self.where = where
        if not self.console.is_terminal:
            task = self._bar.tasks[0]
            left = (task.total or 0) - task.completed
            self.console.print(f"{where} · about {left / 60:.0f} min left")

    def tick(self, what: str, seconds: float) -> None:
        """``what`` begins, and may take ``seconds``; what went before is done."""
        self._bar.update(self._task, advance=self._due, description=f"{self.where} · {what}")
        self._due = seconds

    def close(self) -> None:
        self._bar.stop()
