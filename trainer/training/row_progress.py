"""What a watcher sees while rows go by."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_LINES = 10  # in a log file: about one for each tenth of the table


class RowProgress:
    """A bar with rows, rows/s and time left on a terminal, a line now and then in a log file; ``doing``: "packing"."""

    def __init__(self, console: Console, doing: str):
        self.console, self.doing, self.next_line, self.start = console, doing, 0, time.monotonic()
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

    def __enter__(self) -> "RowProgress":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def show(self, done: int, total: int | None) -> None:
        """``done`` of ``total`` rows."""
        rate = f"{done / max(time.monotonic() - self.start, 1e-9):,.0f} rows/s"
        self.bar.update(self.task, description=self.doing, completed=done, total=total, rate=rate)
        if not self.console.is_terminal and (done >= self.next_line or done == total):
            self.console.print(f"{self.doing} {done:,}" + (f"/{total:,} rows" if total else " rows") + f"  {rate}")
            self.next_line = done + max(1, (total or 0) // _LINES)
