"""The ranks of a run: how many there are, which one this is, and what they agree on before training."""

import os
from datetime import timedelta
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist

from trainer.distributed.comm import ALONE, Comm, Group
from trainer.distributed.launch import first_host, in_slurm_step, port_of_job, slurm_tasks
from trainer.distributed.waiting import interruptible
from trainer.errors import UserError, counted

Answer = TypeVar("Answer")


class World(NamedTuple):
    """The ranks of a run, and which one this process is."""

    size: int
    local_size: int
    rank: int
    external: bool
    """torchrun or srun made the ranks; else we are alone or Lightning launches the others."""

    @property
    def comm(self) -> Comm:
        """What the ranks do together, once they have met."""
        return ALONE if self.size == 1 else Group(self.rank, self.size)


class Devices(Protocol):
    """What a run asks for."""

    accelerator: str
    """auto, cpu or gpu."""
    devices: int | str
    """On each machine: a number, or auto for every GPU."""
    num_nodes: int


def world(asked: Devices) -> World:
    """The world of this process: torchrun's or Slurm's, else what is ``asked`` for."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        return World(int(env["WORLD_SIZE"]), int(env["LOCAL_WORLD_SIZE"]), int(env["RANK"]), True)
    if in_slurm_step():
        size, nodes = slurm_tasks(), int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")))
        if size % nodes:
            raise UserError(f"SLURM_NTASKS={size} is not a multiple of the {nodes} nodes: give --ntasks-per-node.")
        return World(size, size // nodes, int(env["SLURM_PROCID"]), True)
    local = _devices(asked)
    rank = int(env.get("NODE_RANK", "0")) * local + int(env.get("LOCAL_RANK", "0"))
    return World(local * int(asked.num_nodes), local, rank, False)


def _devices(asked: Devices) -> int:
    if asked.devices == "auto":
        return max(1, torch.cuda.device_count()) if on_cuda(asked) else 1
    devices = int(asked.devices)
    if devices < 1:
        raise UserError(f"trainer.devices={devices} must be at least 1.")
    if on_cuda(asked) and devices > torch.cuda.device_count():
        raise UserError(f"trainer.devices={devices} but this machine has {counted(torch.cuda.device_count(), 'GPU')}.")
    return devices


def on_cuda(asked: Devices) -> bool:
    """Whether the run computes on GPUs."""
    if asked.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu but torch sees no GPU here: use trainer=cpu, or install a CUDA build.")
    return asked.accelerator in ("auto", "gpu") and torch.cuda.is_available()


def agree_on(text: str, world: World, backend: str, timeout: timedelta | None = None) -> str:
    """Rank 0's ``text`` on every rank of an external launch (their clocks and so their folders may differ).

    Begins its process group; ``timeout``: for the ranks to find each other, and of its collectives (None: torch's).
    """
    if not world.external:
        return text
    if not dist.is_initialized():
        _set_meeting(world)
        if backend == "nccl":  # objects travel by way of the current device
            local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
            torch.cuda.set_device(local % torch.cuda.device_count())
        interruptible(lambda: _meet(world, backend, timeout or dist.distributed_c10d.default_pg_timeout))
    return of_all(text, world)[0]


def _set_meeting(world: World) -> None:
    """Where the ranks meet: as the environment says, else as Slurm's variables do."""
    env = os.environ
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = first_host(env.get("SLURM_STEP_NODELIST") or env["SLURM_NODELIST"])
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = str(port_of_job(env["SLURM_JOB_ID"]))
    if not env["MASTER_PORT"].isdigit():
        raise UserError(f"MASTER_PORT={env['MASTER_PORT']} is not a port: set it to a free one, as 29500.")
    env.update(RANK=str(world.rank), WORLD_SIZE=str(world.size))


def _meet(world: World, backend: str, wait: timedelta) -> None:
    store, rank, size = next(dist.rendezvous("env://", world.rank, world.size, timeout=wait))
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun may keep the store, and addresses of the dead
    store = dist.PrefixStore(f"life {life}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)


def of_all(value: Answer, world: World) -> list[Answer]:
    """Every rank's ``value``, once `agree_on` has begun the group; our own alone where Lightning launches the others.

    ``value`` is pickled, on its way to ranks of our own job.
    """
    return world.comm.gathered(value) if world.external else [value]
