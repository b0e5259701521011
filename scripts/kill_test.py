"""Real runs of `svi train` on 1, 2 and 4 ranks, each killed by SIGKILL at a random moment and continued, 25 times over.

Three runs, with the recipe's rounds and Newton steps: on other numbers of ranks; on two ranks throughout; on other
numbers of ranks with other batch sizes. The first two must take at every step the rows that an uninterrupted run takes,
the second must end in the same bits, the third must take every row once an epoch. Prints a table and the verdict; exit
code 1 where it is bad. Writes bench/kills.json.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from trainer.data.packing.pack import pack
from trainer.engine import checkpoint
from trainer.engine.row_log import logged_rows

ROWS, BATCH, EPOCHS = 20_000, 256, 9
WORLDS, BATCHES = (4, 2, 1), (128, 256, 512)
EVERY = 20  # steps between checkpoints
_PATIENCE = 300.0  # seconds for a launch to come as far as it should


class Killed(NamedTuple):
    """A launch: on how many ranks, with which batch size, from which step, and at which it was killed, if it was."""

    ranks: int
    batch_size: int
    first: int
    last: int
    moment: str


class Run:
    """A run folder that several launches fill; ``options``: those of `svi train`."""

    def __init__(self, folder: Path, shards: Path, options: Sequence[str]):
        self.folder, self.log = folder, folder / "rows"
        self.command = [
            *(sys.executable, "-m", "trainer", "train", f"data.path={shards}", f"run_dir={folder / 'run'}"),
            *(f"data.log_rows={self.log}", "ckpt_path=last", f"checkpoint.every_n_steps={EVERY}", "trainer=ddp_sim"),
            *("threads=1", *options),
        ]

    def launch(self, ranks: int, batch_size: int, kill_after: tuple[int, float] | None = None) -> Killed:
        """Runs to the end, or is killed, all ranks at once, so many steps and then seconds after its first one."""
        first, before = self.saved_step(), set(self.log.glob("*.rows"))
        command = [*self.command, f"trainer.devices={ranks}", f"batch_size={batch_size}"]
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "output.txt").open("ab") as output:
            run = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        began, step = time.monotonic(), first
        try:
            while kill_after is not None and step < first + kill_after[0] and run.poll() is None:
                assert time.monotonic() - began < _PATIENCE, f"step {step} is not passed: see {output.name}"
                time.sleep(0.02)
                step = max([first, *map(_last_step, set(self.log.glob("*.rows")) - before)])
            if kill_after is not None:
                time.sleep(kill_after[1])
                os.killpg(run.pid, signal.SIGKILL)
            code = run.wait(_PATIENCE)
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
        assert code == (0 if kill_after is None else -signal.SIGKILL), f"exit code {code}: see {output.name}"
        last = max(map(_last_step, set(self.log.glob("*.rows")) - before))
        return Killed(ranks, batch_size, first, last, "to the end" if kill_after is None else "killed")

    def saved_step(self) -> int:
        """The step from which the next launch goes on."""
        path = checkpoint.newest(self.folder / "run" / "checkpoints")
        return 0 if path is None else int(checkpoint.load(path)[0].step)

    @property
    def state(self) -> list[torch.Tensor]:
        """What the newest checkpoint holds."""
        path = checkpoint.newest(self.folder / "run" / "checkpoints")
        assert path is not None
        return [*checkpoint.load(path)[0].named().values()]


def _last_step(path: Path) -> int:
    """The last step of one rank's log, 0 before there is one."""
    content = np.frombuffer(path.read_bytes(), "<i8")
    step, at = 0, 0
    while at + 2 <= len(content):
        step, at = int(content[at]), at + 2 + int(content[at + 1])
    return step


def table(path: Path, rows: int, seed: int = 0) -> Path:
    """Shards of a small regression, packed at ``path``, in blocks of 128 rows."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(rows, 3)).astype(np.float32)
    y = (x @ np.array([1.0, -2.0, 0.5]) + 0.5 * generator.normal(size=rows)).astype(np.float32)
    np.savez(path.with_suffix(".npz"), x=x, y=y)
    pack(str(path.with_suffix(".npz")), path, block_rows=128, held_out=0.0)
    return path


def same_rows(one: dict[int, np.ndarray], other: dict[int, np.ndarray]) -> bool:
    """Whether two logs have the same steps, of the same rows."""
    return one.keys() == other.keys() and all(np.array_equal(rows, other[step]) for step, rows in one.items())


def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The largest difference of two states, relative to the largest entry of each tensor."""
    pairs = [(a.double(), b.double()) for a, b in zip(one, other, strict=True)]
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-300)) for a, b in pairs)


def verdicts(runs: dict[str, Run]) -> dict[str, bool]:
    """What each run promised, and whether it is so."""
    rows = {name: logged_rows(run.log) for name, run in runs.items()}
    counts = np.bincount(np.concatenate(list(rows["batches"].values())))
    apart = distance(runs["ranks"].state, runs["alone"].state)
    return {
        "other ranks: the rows of every step are an uninterrupted run's": same_rows(rows["ranks"], rows["alone"]),
        f"other ranks: its final state within rounding ({apart:.1e} of 1e-9)": apart < 1e-9,
        "two ranks: the rows of every step are an uninterrupted run's": same_rows(rows["two"], rows["whole"]),
        "two ranks: its final state, bit for bit": all(map(torch.equal, runs["two"].state, runs["whole"].state)),
        f"other batch sizes: each of {len(counts):,} rows {EPOCHS} times in {EPOCHS} epochs": set(counts) == {EPOCHS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, nargs=3, default=[10, 5, 10], help="of each of the three runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    given = parser.parse_args()
    chance, console = random.Random(given.seed), Console(soft_wrap=True)
    shown = Table("run", "ranks", "batch", "from step", "to step", "", title="svi train, killed")
    launches: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        shards = table(Path(temporary) / "shards", ROWS)
        options = ("model=linear", "stop=budget", "draws=2", f"max_epochs={EPOCHS}", "program=eager", "slots=8")
        runs = {name: Run(Path(temporary) / name, shards, options)
                for name in ("alone", "whole", "ranks", "two", "batches")}  # fmt: skip
        worlds = {"ranks": WORLDS, "two": (2,), "batches": WORLDS}
        plan = [("alone", 1, BATCH, False), ("whole", 2, BATCH, False)]
        for name, kills in zip(worlds, given.kills):
            sizes = BATCHES if name == "batches" else (BATCH,)
            plan += [(name, chance.choice(worlds[name]), chance.choice(sizes), k < kills) for k in range(kills + 1)]
        for number, (name, ranks, batch_size, dies) in enumerate(plan, 1):
            moment = (chance.randrange(1, 3 * EVERY), chance.random() / 2) if dies else None
            done = runs[name].launch(ranks, batch_size, moment)
            launches.append({"run": name, **done._asdict()})
            shown.add_row(name, *map(str, done))
            console.print(f"{number} of {len(plan)}: {name}, {ranks} rank(s), steps {done.first} to {done.last}")
        found = verdicts(runs)
    console.print(shown)
    for what, good in found.items():
        console.print(f"{'yes' if good else 'NO '}  {what}")
    given.out.mkdir(exist_ok=True)
    (given.out / "kills.json").write_text(json.dumps({"launches": launches, "verdict": found}, indent=1))
    if not all(found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
