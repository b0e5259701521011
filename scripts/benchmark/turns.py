"""Taking turns: every contender of a setting lives in its own process and runs when it is its turn, A B C A B C.

So all see the same noise of a shared machine, and each one's peak memory is its own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from scripts.benchmark.problems import Setting

ROOT = Path(__file__).parent.parent.parent
READS = "fused-shards"
"""The contender that reads while it computes, as `svi train` does: it gets a core for that."""
Tick = Callable[[str, float], None]
"""Told before each piece of work: what runs, and how many seconds it was expected to take."""
COMPILING = 15.0  # seconds that a contender's first step is expected to take, for the time left


def cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


class Player:
    """A worker process. ``caches``: the folder of its compilers' caches, an empty one where compiling is measured."""

    def __init__(self, name: str, setting: Setting, log: Path, caches: Path):
        self.error = "" if find_spec("numpyro") or not name.startswith("numpyro") else "not installed"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(setting.threads),
            "MKL_NUM_THREADS": str(setting.threads),
            "JAX_PLATFORMS": "cpu" if setting.device == "cpu" else "cuda,cpu",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XDG_CACHE_HOME": str(caches),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        }
        with log.open("a") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "scripts.benchmark.worker", name, json.dumps(asdict(setting))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                bufsize=1,
                cwd=ROOT,
                env=environment,
            )
        if hasattr(os, "sched_setaffinity"):
            reader = 1 if name == READS else 0
            os.sched_setaffinity(self._process.pid, cores()[: setting.threads + reader])

    def ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """The worker's answer; {} once it has failed, which `error` then says."""
        if self.error:
            return {}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"verb": verb, **arguments}) + "\n")
            answer = json.loads(self._process.stdout.readline() or '{"error": "the process died"}')
        except BrokenPipeError:
            answer = {"error": "the process died"}
        self.error = answer.get("error", "")
        return {} if self.error else answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass
class Result:
    """What one contender came to in one setting."""

    contender: str
    setting: Setting
    compile_seconds: float = 0.0
    """Up to the end of the first step (or chunk), tracing and compiling included; imports and loading apart."""
    step_seconds: list[float] = field(default_factory=list)
    """Per round."""
    rows_per_second: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    gpu_bytes: int = 0
    error: str = ""

    @property
    def speed(self) -> float:
        """Rows per second, the median over rounds."""
        return median(self.rows_per_second)

    def as_dict(self) -> dict[str, Any]:
        figures: dict[str, Any] = {"contender": self.contender}
        figures |= {name: getattr(self.setting, name) for name in ("model", "batch", "num_obs", "slots", "threads")}
        figures |= {"device": self.setting.device}
        if self.error:
            return figures | {"error": self.error}
        return figures | {
            "rows_per_second": self.speed,
            "us_per_step": median(self.step_seconds) * 1e6,
            "us_per_step_by_round": [seconds * 1e6 for seconds in self.step_seconds],
            "compile_seconds": self.compile_seconds,
            "peak_bytes": self.peak_bytes,
            "gpu_bytes": self.gpu_bytes,
        }


def play(setting: Setting, names: list[str], rounds: int, seconds: float, log: Path, tick: Tick) -> list[Result]:
    """Starts every contender, one after another, then lets them run in turns."""
    results = [Result(name, setting) for name in names]
    players: list[Player] = []
    with ExitStack() as ending:
        for result in results:
            tick(f"{result.contender}: first step", COMPILING)
            caches = ending.enter_context(TemporaryDirectory(prefix="svi-bench-"))
            player = Player(result.contender, setting, log, Path(caches))
            ending.callback(player.close)
            players.append(player)
            result.compile_seconds = player.ask("start").get("seconds", 0.0)
        for turn in range(rounds):
            for result, player in zip(results, players):
                tick(f"{result.contender}: round {turn + 1} of {rounds}", seconds)
                answer = player.ask("round", seconds=seconds)
                if answer:
                    result.step_seconds.append(answer["seconds"] / answer["steps"])
                    result.rows_per_second.append(answer["rows"] / answer["seconds"])
                    result.peak_bytes, result.gpu_bytes = answer["peak_bytes"], answer["gpu_bytes"]
    for result, player in zip(results, players):
        result.error = player.error
    return results
