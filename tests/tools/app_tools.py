"""The command run with a config of this process, or in a process of its own."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from forked import Forked, can_fork, command_environment

from trainer.engine import checkpoint
from trainer.inference.optim.rounds import State
from trainer.options.entrance import composed, options

HERE = Path(__file__).parent
SVI = ("-m", "trainer")
FORKED = (SVI, ("-m", "sweep_worker"))
WEIGHTS = np.array([1.0, -2.0, 0.5])


def config(verb: str, *overrides: str) -> Any:
    """The record that `svi VERB OVERRIDES` runs with."""
    return options(verb, composed(verb, overrides))


def svi(*arguments: str, launcher: tuple[str, ...] = SVI, **environment: str) -> subprocess.CompletedProcess:
    """`svi ARGUMENTS` in a process of its own, where `app_models` can be imported."""
    process = start(*arguments, launcher=launcher, environment=environment, output=subprocess.PIPE)
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start(
    *arguments: str, launcher: tuple[str, ...] = SVI, environment: Mapping[str, str] = MappingProxyType({}),
    output: int = subprocess.DEVNULL, start_new_session: bool = False, real: bool = False,
) -> "subprocess.Popen[str] | Forked":  # fmt: skip
    """`svi ARGUMENTS` in a process of its own, left running: a fork where that is the same and not ``real``."""
    env = command_environment(**environment)
    if launcher in FORKED and not real and can_fork(env):
        return Forked(launcher[1], arguments, env, output, start_new_session)
    command = [sys.executable, *launcher, *arguments]
    return subprocess.Popen(command, env=env, text=True, stdout=output, stderr=output,
                            start_new_session=start_new_session)  # fmt: skip


def final_state(run_dir: Path) -> tuple[Any, dict[str, Any]]:
    """The newest checkpoint of a run."""
    path = checkpoint.newest(run_dir / "checkpoints")
    assert path is not None, f"{run_dir} has no checkpoint"
    return checkpoint.load(path)


def tensors(state: State) -> list[torch.Tensor]:
    """All that a state holds."""
    return [*state.named().values()]
