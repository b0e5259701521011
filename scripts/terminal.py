"""Records a run of the flights example as a terminal shows it, and writes it as an SVG: scripts/terminal [FILE]."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "flights200k"
COLUMNS = 96
PACK = (
    "svi shard source=data.parquet columns.distance=distance columns.time=time columns.delay=delay split.held_out=0 "
    "out=flights"
)
SHOWN = (
    "svi train model._target_=flights.delay_model data.path=flights run_dir=run max_epochs=200",
    "python compare.py run | tail -n 3",
)


def main(out: Path) -> None:
    console = Console(record=True, width=COLUMNS, force_terminal=True, color_system="truecolor", highlight=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in EXAMPLE.iterdir():
            shutil.copy(path, folder)
        run(PACK, folder)
        for number, command in enumerate(SHOWN):
            console.print(Text.assemble("\n" * bool(number), ("$ ", "bold green"), (command, "bold")))
            console.print(Text.from_ansi(screen(run(command, folder).replace(f"{folder}/", ""))))
    out.write_text(without_downloads(console.export_svg(title="200,000 flights", unique_id="terminal")))


def run(command: str, folder: Path) -> str:
    """What ``command`` prints to a terminal of COLUMNS columns, in ``folder``."""
    env = {
        **os.environ, "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}", "FORCE_COLOR": "1",
        "COLUMNS": str(COLUMNS),
    }  # fmt: skip
    shell = ["bash", "-euo", "pipefail", "-c", command]
    done = subprocess.run(shell, cwd=folder, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def screen(printed: str) -> str:
    """What is left on the screen of ``printed``: lines that are erased or overwritten are gone, and so is the bar."""
    lines = [re.split(r"\x1b\[2K|\r", line.rstrip("\r"))[-1] for line in printed.split("\n")]
    kept = [re.sub(r"\x1b\[[?\d;]*[A-HJKhl]", "", line) for line in lines if "━" not in line]
    return "\n".join(kept).strip("\n")


def without_downloads(svg: str) -> str:
    """The picture without the fonts that a viewer would load from another server; the viewer's own are used."""
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "terminal.svg")
