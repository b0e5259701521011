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
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import xxhash
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from trainer.errors import Stopped, UserError
from trainer.lit.failure import explained, leave_group
from trainer.lit.waiting import interruptible, whole

_NOTICE = 5.0  # seconds for a rank to notice by itself that another has failed
_LEAVE = 10.0  # seconds for ranks to leave by themselves
_SMALL = 2**20  # bytes, up to which a vector's latency counts more than its size


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


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over all ranks, the same bits on each, as a new tensor (the tensor itself on one rank).

    While a graph is traced, by an operation that it can hold (a compiled CPU step knows no other than all-reduce).
    Else a small vector goes from rank to rank over gloo: 0.15 ms between two processes of a machine where its
    all-reduce takes 1.5.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    size, world = dist.get_world_size(), dist.group.WORLD
    assert world is not None
    if get_proxy_mode() is None and dist.get_backend() == "gloo" and size & (size - 1) == 0 and tensor.nbytes <= _SMALL:
        return _exchanged(tensor, dist.get_rank(), size)
    return collectives.wait_tensor(collectives.all_reduce(tensor, "sum", world))


def _exchanged(tensor: Tensor, rank: int, size: int) -> Tensor:
    """The sum by recursive doubling: pairs exchange, then pairs of pairs. Both of a pair add the same two numbers.

    One of a pair sends first: two sends at once take gloo ten times as long.
    """
    total = tensor.detach().clone()
    for distance in (1 << i for i in range(size.bit_length() - 1)):
        theirs, other = torch.empty_like(total), rank ^ distance
        if rank < other:
            dist.send(total, other)
            dist.recv(theirs, other)
        else:
            dist.recv(theirs, other)
            dist.send(total, other)
        total = total + theirs
    return total


def max_over_ranks(value: int, device: torch.device) -> int:
    """The largest ``value`` of any rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    tensor = torch.tensor(value, device=device)
    interruptible(lambda: dist.all_reduce(tensor, op=dist.ReduceOp.MAX))
    return int(tensor)


def same_on_all_ranks(tensors: Sequence[Tensor]) -> bool:
    """Whether every rank holds the same bits, by a hash (xxHash, 63 bits)."""
    if not (dist.is_available() and dist.is_initialized()):
        return True
    hashed = xxhash.xxh3_64()
    for tensor in tensors:
        hashed.update(tensor.detach().cpu().numpy().tobytes())
    here = hashed.intdigest() >> 1
    extremes = torch.tensor([here, -here], device=tensors[0].device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    return int(extremes[0]) == -int(extremes[1])


def gathered(value: Any) -> list[Any]:
    """Every rank's ``value``, on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    interruptible(lambda: dist.all_gather_object(values, value))
    return values


def raise_together(error: UserError | None, device: torch.device) -> None:
    """Raises a rank's ``error`` on every rank, so that all leave and rank 0 can tell of it."""
    if not (dist.is_available() and dist.is_initialized()):
        if error is not None:
            raise error
        return
    failed = max_over_ranks(0 if error is None else dist.get_rank() + 1, device)
    if failed:
        message = [str(error)]
        dist.broadcast_object_list(message, src=failed - 1)
        raise UserError(message[0])


def from_rank_zero(tensor: Tensor) -> Tensor:
    """Rank 0's ``tensor``, on every rank."""
    if dist.is_available() and dist.is_initialized():
        interruptible(lambda: dist.broadcast(tensor, src=0))
    return tensor
