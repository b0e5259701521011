"""Lightning launches the ranks, the step all-reduces. Nothing is wrapped, so no buffer is overwritten or refused.

Children start from a command that we give (the resolved, saved config), never from `argv`: relaunching `argv` dies with
a verb in it and runs the whole sweep in the child under `-m`.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from trainer.distributed.failure import explained, leave_group
from trainer.distributed.waiting import interruptible, whole
from trainer.errors import Stopped

_NOTICE = 5.0  # seconds for a rank to notice by itself that another has failed
_LEAVE = 10.0  # seconds for ranks to leave by themselves


class RankStrategy(DDPStrategy):
    """DDP's process group without its module wrapper; the ranks leave together."""

    def __init__(self, child_command: Sequence[str] = (), **kwargs: Any):
        super().__init__(**kwargs)
        self.child_command = list(child_command)
        self.failed = False

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = _Launcher(self.cluster_environment, self.num_processes, self.num_nodes)
        self._launcher.command = self.child_command

    def configure_ddp(self) -> None:
        pass

    def setup_distributed(self) -> None:
        interruptible(super().setup_distributed)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        interruptible(lambda: super(RankStrategy, self).barrier(*args, **kwargs))

    def on_exception(self, exception: BaseException) -> None:
        self.failed = not (isinstance(exception, Stopped) and exception.agreed)
        super().on_exception(exception)

    def teardown(self) -> None:
        super().teardown()
        met = dist.is_initialized()
        leave_group(together=not self.failed)
        assert isinstance(self._launcher, _Launcher)
        self._launcher.end_children(_LEAVE if met else 0.0)  # those who have met nobody wait for us


class SlurmStep(SLURMEnvironment):
    """The ``size`` tasks that srun started, counted and checked already (Lightning wants --ntasks-per-node as well)."""

    def __init__(self, size: int):
        self.size = size
        super().__init__(auto_requeue=False)

    @staticmethod
    def _validate_srun_variables() -> None:
        pass

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        pass

    def world_size(self) -> int:
        return self.size


class _Launcher(_SubprocessScriptLauncher):
    """Makes the other ranks of this machine, and leaves none behind."""

    command: list[str]

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        self.leaves = threading.Event()
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            threading.Thread(target=self._watch, daemon=True).start()
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            self.leaves.set()
            told = explained(error)
            if told is error:
                raise
            raise told from error

    def _call_children_scripts(self) -> None:
        self._check_can_spawn_children()
        self.procs = []
        env = self.cluster_environment
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = env.main_address, str(env.main_port)
        os.environ["NODE_RANK"], os.environ["LOCAL_RANK"] = str(env.node_rank()), str(env.local_rank())
        os.environ["WORLD_SIZE"] = str(self.num_processes * self.num_nodes)
        whole(self._start_children)  # a child that has started is in `procs`, to be ended

    def _start_children(self) -> None:
        for local_rank in range(1, self.num_processes):
            self.procs.append(subprocess.Popen(self.command, env={**os.environ, "LOCAL_RANK": str(local_rank)}))

    def _watch(self) -> None:
        """Ends this process when a child has failed and it does not notice, waiting for it in C++."""
        while not any(child.poll() for child in self.procs):
            if self.leaves.wait(0.2):
                return
        if self.leaves.wait(_NOTICE):
            return
        rank, code = next((rank, child.returncode) for rank, child in enumerate(self.procs, 1) if child.returncode)
        if code < 0:  # else it has told of it
            name = signal.Signals(-code).name
            print(f"rank {rank} was ended by {name}; continue with ckpt_path=last.", file=sys.stderr, flush=True)
        self.end_children(0)
        os._exit(code if code > 0 else 1 if code == -signal.SIGKILL else 128 - code)

    def end_children(self, patience: float = _LEAVE) -> None:
        """Waits for the children to end, up to ``patience`` seconds, then ends them."""
        if hasattr(self, "leaves"):
            self.leaves.set()
        until = time.monotonic() + patience
        for child in self.procs:
            try:
                child.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
