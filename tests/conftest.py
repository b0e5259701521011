"""What several folders of tests share: one thread, and the table of docs/reliability.md, which --write-table writes."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import failure_table
import pytest
import torch

torch.set_num_threads(1)
pytest_plugins = ["run_fixtures"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help="write what was seen into docs/reliability.md")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "failure(what, lost): the row of docs/reliability.md that a test stands for")


@pytest.fixture
def seen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str, int | str], None]]:
    """`seen(sentence, exit code)`: what the user sees of the failure; it has to be what the committed table says."""
    marker = request.node.get_closest_marker("failure")
    rows: list[tuple[str, str]] = []

    def record(sentence: str, code: int | str) -> None:
        text = sentence.strip().replace(str(tmp_path), "").replace("/run/", "RUN/")
        rows.append((re.sub(r"at step \d+(,\d{3})*", "at step N", text), str(code)))

    yield record
    if getattr(request.node, "rep_call", None) and request.node.rep_call.passed:
        (row,) = rows
        row = failure_table.Row(marker.kwargs["what"], *row, marker.kwargs["lost"])
        if request.config.getoption("--write-table", False):
            failure_table.write(row)
        assert row in failure_table.committed(), f"docs/reliability.md has another row: pytest --write-table\n{row}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    if report.when == "call":
        item.rep_call = report  # type: ignore[attr-defined]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Counts the skipped tests by what they need."""
    skipped = terminalreporter.stats.get("skipped", ())
    for reason, count in Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped).most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")
