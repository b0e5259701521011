"""One contender in a process of its own, which lives as long as its setting and runs when it is told to.

A command is a line of JSON on stdin, its answer a line of JSON on stdout. Whatever libraries print goes to stderr.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from scripts.benchmark.problems import Setting

_LOOK = 0.02  # seconds between two looks at where a chase has got to


class Contender(Protocol):
    """The constructor loads the rows; `start` is everything up to the end of the first step or chunk."""

    def start(self) -> None: ...

    def advance(self) -> tuple[int, int]:
        """Works a little while and waits for the end of it: (steps, rows)."""
        ...

    def gpu_bytes(self) -> int: ...


def _pyro(**how: bool) -> Callable[[Setting], Any]:
    def make(setting: Setting) -> Any:
        from scripts.benchmark.stock_pyro import StockPyro

        return StockPyro(setting, **how)

    return make


def _copy(setting: Setting) -> Any:
    from scripts.benchmark.stock_pyro import Copy

    return Copy(setting)


def _numpyro(**how: bool) -> Callable[[Setting], Any]:
    def make(setting: Setting) -> Any:
        from scripts.benchmark.stock_numpyro import NumPyro

        return NumPyro(setting, **how)

    return make


def _ours(**how: bool) -> Callable[[Setting], Any]:
    def make(setting: Setting) -> Any:
        from scripts.benchmark.ours import Ours, Way

        return Ours(setting, Way(**how))

    return make


def _recipe(setting: Setting) -> Any:
    from scripts.benchmark.ours import Recipe

    return Recipe(setting)


CONTENDERS: dict[str, Callable[[Setting], Any]] = {
    "copy": _copy,
    "pyro": _pyro(),
    "pyro-indices": _pyro(given=True),
    "pyro-jit": _pyro(given=True, jit=True),
    "numpyro": _numpyro(scan=False),
    "numpyro-scan": _numpyro(scan=True),
    "eager": _ours(fused=False),
    "fused": _ours(fused=True),
    "fused-shards": _ours(fused=True, shards=True),
    "fused-pair": _ours(fused=True, antithetic=True),
    "recipe": _recipe,
}


def memory(contender: Contender) -> dict[str, int]:
    """Peak bytes of this process (its own: what it was forked from does not count) and of its GPU."""
    status = Path("/proc/self/status")
    peak = 0
    if status.exists():
        peak = next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return {"peak_bytes": peak, "gpu_bytes": contender.gpu_bytes()}


def start(contender: Any) -> dict[str, Any]:
    began = time.perf_counter()
    contender.start()
    return {"seconds": time.perf_counter() - began}


def run_round(contender: Any, seconds: float) -> dict[str, Any]:
    steps = rows = 0
    began = now = time.perf_counter()
    while now - began < seconds:
        more_steps, more_rows = contender.advance()
        steps, rows, now = steps + more_steps, rows + more_rows, time.perf_counter()
    return {"seconds": now - began, "steps": steps, "rows": rows}


def fit(contender: Any, seed: int, target: str) -> dict[str, Any]:
    """A run that ends by its own rule: its seconds and how far it is off."""
    seconds, means = contender.fit(seed)
    return {"seconds": seconds, "off_by": off(means, target)}


def chase(contender: Any, seed: int, target: str, limit: float, within: float) -> dict[str, Any]:
    """Runs until an iterate is ``within`` the optimum (an oracle says when) or ``limit`` seconds have gone.

    Looking does not count; ``off_by``: the smallest that was seen.
    """
    contender.reset(seed)
    error, seconds = float("inf"), 0.0
    while error > within and seconds < limit:
        began, part = time.perf_counter(), 0.0
        while part < min(_LOOK, limit / 100):
            contender.advance()
            part = time.perf_counter() - began
        seconds += part
        error = min(error, off(contender.means(), target))
    return {"seconds": seconds, "off_by": error}


def off(means: Any, target: str) -> float:
    """The largest distance of ``means`` [D] from those of the file ``target``, in its scales; of what groups have for
    themselves that of 99 %.
    """
    import numpy as np

    with np.load(target) as optimum:
        far, top = np.abs((np.asarray(means) - optimum["mean"]) / optimum["sd"]), optimum["top"]
    return float(max(far[top].max(), 0.0 if top.all() else np.quantile(far[~top], 0.99)))


VERBS: dict[str, Callable[..., dict[str, Any]]] = {"start": start, "round": run_round, "fit": fit, "chase": chase}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    contender = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if contender is None:
                contender = CONTENDERS[sys.argv[1]](Setting(**json.loads(sys.argv[2])))
            answer = VERBS[command.pop("verb")](contender, **command)
            answer |= memory(contender)
        except Exception as error:  # a row of the table says so
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
