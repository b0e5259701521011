"""scripts/bench_data: every way to read gives every row once an epoch, and the table has a figure for each that ran."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from scripts.reading import contenders
from scripts.reading.__main__ import write_table

ROOT = Path(__file__).parent.parent
ROWS = 20_000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reading")
    write_table(folder, ROWS)
    return folder


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # WebDataset's
@pytest.mark.parametrize("name", [name for name in contenders.CONTENDERS if not name.startswith(("mosaic", "litdata"))])
def test_an_epoch_has_every_row(place: Path, name: str) -> None:
    stream = contenders.CONTENDERS[name][1](place)
    for _ in range(2):
        seen = 0
        while seen < ROWS:
            seen += next(stream)
        assert seen == ROWS


@pytest.mark.slow
def test_the_table_names_what_is_not_installed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.reading", "--rows", str(ROWS), "--rounds", "1", "--seconds", "0.01", "--only",
         "copy", "ours", "webdataset-rows", "mosaic", "--out", str(tmp_path / "data.json")],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    if find_spec("streaming") is None:
        assert any("MosaicML streaming" in line and "streaming is not installed" in line for line in lines)
    assert any(line.split()[1:4] == ["times", "WebDataset,", "rows"] for line in lines)
    assert (tmp_path / "data.json").exists()
