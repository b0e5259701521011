"""Who launched us, and how this machine is shared among the ranks."""

import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from pytorch_lightning.plugins.environments import SLURMEnvironment

from trainer.errors import UserError


class World(NamedTuple):
    """The ranks of a run, and which one this process is."""

    size: int
    local_size: int
    rank: int
    external: bool
    """torchrun or srun made the ranks; else we are alone or Lightning launches the others."""


def world(trainer: DictConfig) -> World:
    """The world of this process: torchrun's or Slurm's, else what ``trainer`` asks for."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        return World(int(env["WORLD_SIZE"]), int(env["LOCAL_WORLD_SIZE"]), int(env["RANK"]), True)
    if _in_slurm_step():
        size, nodes = int(env["SLURM_NTASKS"]), int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")))
        if size % nodes:
            raise UserError(f"SLURM_NTASKS={size} is no multiple of the {nodes} nodes: give --ntasks-per-node.")
        return World(size, size // nodes, int(env["SLURM_PROCID"]), True)
    local = _devices(trainer)
    rank = int(env.get("NODE_RANK", "0")) * local + int(env.get("LOCAL_RANK", "0"))
    return World(local * int(trainer.num_nodes), local, rank, False)


def launched_rank() -> int:
    """The rank that a launcher gave this process, 0 where none did; needs no config."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        return int(env["RANK"])
    return int(env["SLURM_PROCID"]) if _in_slurm_step() else int(env.get("LOCAL_RANK", "0"))


def _in_slurm_step() -> bool:
    env = os.environ
    return "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1 and env.get("SLURM_STEP_ID", "").isdigit()


def _devices(trainer: DictConfig) -> int:
    if trainer.devices == "auto":
        return max(1, torch.cuda.device_count()) if on_cuda(trainer) else 1
    devices = int(trainer.devices)
    if devices < 1:
        raise UserError(f"trainer.devices={devices} must be at least 1.")
    if on_cuda(trainer) and devices > torch.cuda.device_count():
        raise UserError(f"trainer.devices={devices} but this machine has {torch.cuda.device_count()} GPU(s).")
    return devices


def on_cuda(trainer: DictConfig) -> bool:
    """Whether the run computes on GPUs."""
    if trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu but torch sees no GPU here: use trainer=cpu, or install a CUDA build.")
    return trainer.accelerator in ("auto", "gpu") and torch.cuda.is_available()


def share_threads(local_size: int, threads: int | None) -> int:
    """Sets torch's threads to ``threads``, or to this rank's share of the cores but one, and returns the number.

    One core is left to the thread that reads ahead: an oversubscribed OpenMP pool was measured 150 times slower.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = threads or max(1, cores // local_size - 1)
    torch.set_num_threads(share)
    return share


def agree_on(text: str, world: World, backend: str) -> str:
    """Rank 0's ``text`` on every rank of an external launch (their clocks and so their folders may differ)."""
    if not world.external:
        return text
    if not dist.is_initialized():
        env = os.environ
        if "MASTER_PORT" not in env:
            slurm = SLURMEnvironment(auto_requeue=False)
            env["MASTER_ADDR"], env["MASTER_PORT"] = slurm.main_address, str(slurm.main_port)
        env.update(RANK=str(world.rank), WORLD_SIZE=str(world.size))
        dist.init_process_group(backend)
    box = [text]
    dist.broadcast_object_list(box, src=0)
    return box[0]
