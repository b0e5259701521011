"""The threads of a rank."""

import torch

from trainer.distributed.launch import usable_cores
from trainer.inference.isolation import is_fork


def share_threads(local_size: int, threads: int | None) -> int:
    """Sets torch's threads to ``threads``, or to this rank's share of the cores but one, and returns the number.

    One core is left to the thread that reads ahead: an oversubscribed OpenMP pool was measured 150 times slower.
    A fork has one thread.
    """
    share = 1 if is_fork() else threads or max(1, usable_cores() // local_size - 1)
    torch.set_num_threads(share)
    return share
