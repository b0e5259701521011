"""The command run with a config of this process, or in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.engine import checkpoint
from trainer.inference.optim.rounds import State
from trainer.options.entrance import composed, options

HERE = Path(__file__).parent
WEIGHTS = np.array([1.0, -2.0, 0.5])


def config(verb: str, *overrides: str) -> Any:
    """The record that `svi VERB OVERRIDES` runs with."""
    return options(verb, composed(verb, overrides))


def svi(
    *arguments: str, launcher: tuple[str, ...] = ("-m", "trainer"), **environment: str
) -> subprocess.CompletedProcess:
    """`svi ARGUMENTS` in a process of its own, where `app_models` can be imported."""
    command = [sys.executable, *launcher, *arguments]
    return subprocess.run(
        command, env=_environment(**environment), capture_output=True, text=True, timeout=240, check=False
    )


def start(*arguments: str) -> subprocess.Popen:
    """`svi ARGUMENTS` in a process of its own, left running."""
    command = [sys.executable, "-m", "trainer", *arguments]
    return subprocess.Popen(command, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _environment(**changes: str) -> dict[str, str]:
    env = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **changes}
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    return env


def final_state(run_dir: Path) -> tuple[Any, dict[str, Any]]:
    """The newest checkpoint of a run."""
    path = checkpoint.newest(run_dir / "checkpoints")
    assert path is not None, f"{run_dir} has no checkpoint"
    return checkpoint.load(path)


def tensors(state: State) -> list[torch.Tensor]:
    """All that a state holds."""
    return [*state.named().values()]
