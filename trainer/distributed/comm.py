"""What the ranks of a run make together: sums, agreements, errors that end all of them.

`Alone` is one process, `Group` torch.distributed's default group, over gloo or NCCL, once it has met.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import xxhash
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from trainer.distributed.waiting import interruptible
from trainer.errors import UserError

_SMALL = 2**20  # bytes, up to which a vector's latency counts more than its size


class Comm(Protocol):
    """The ranks of a run, as one of them sees them. Each method is called by all ranks alike."""

    @property
    def rank(self) -> int:
        """This rank's number, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many ranks there are."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, the same bits on each; in a traced graph too."""
        ...

    def largest(self, value: int, device: torch.device) -> int:
        """The largest ``value`` of any rank."""
        ...

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's ``value``, by rank. It is pickled, on its way to ranks of our own job."""
        ...

    def from_first(self, tensor: Tensor) -> Tensor:
        """Rank 0's ``tensor``."""
        ...

    def agree(self, tensors: Sequence[Tensor]) -> bool:
        """Whether every rank holds the same bits, by a hash (xxHash, 63 bits)."""
        ...

    def raise_together(self, error: UserError | None, device: torch.device) -> None:
        """Raises a rank's ``error`` on every rank, so that all leave and rank 0 can tell of it."""
        ...


@dataclass(frozen=True)
class Alone:
    """One process."""

    rank: ClassVar[int] = 0
    size: ClassVar[int] = 1

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def largest(self, value: int, device: torch.device) -> int:
        return value

    def gathered(self, value: Any) -> list[Any]:
        return [value]

    def from_first(self, tensor: Tensor) -> Tensor:
        return tensor

    def agree(self, tensors: Sequence[Tensor]) -> bool:
        return True

    def raise_together(self, error: UserError | None, device: torch.device) -> None:
        if error is not None:
            raise error


ALONE = Alone()


@dataclass(frozen=True)
class Group:
    """The processes of torch.distributed's default group."""

    rank: int
    size: int

    def sum(self, tensor: Tensor) -> Tensor:
        """While a graph is traced, by an operation that it can hold (a compiled CPU step knows no other than
        all-reduce). Else a small vector goes from rank to rank over gloo: 0.15 ms between two processes of a machine
        where its all-reduce takes 1.5.
        """
        traced, world = get_proxy_mode() is not None, dist.group.WORLD
        assert world is not None
        of_two = self.size & (self.size - 1) == 0
        if not traced and dist.get_backend() == "gloo" and of_two and tensor.nbytes <= _SMALL:
            return _exchanged(tensor, self.rank, self.size)
        total: Tensor = collectives.wait_tensor(collectives.all_reduce(tensor, "sum", world))
        return total

    def largest(self, value: int, device: torch.device) -> int:
        tensor = torch.tensor(value, device=device)
        interruptible(lambda: dist.all_reduce(tensor, op=dist.ReduceOp.MAX))
        return int(tensor)

    def gathered(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        interruptible(lambda: dist.all_gather_object(values, value))
        return values

    def from_first(self, tensor: Tensor) -> Tensor:
        interruptible(lambda: dist.broadcast(tensor, src=0))
        return tensor

    def agree(self, tensors: Sequence[Tensor]) -> bool:
        hashed = xxhash.xxh3_64()
        for tensor in tensors:
            hashed.update(tensor.detach().cpu().numpy().tobytes())
        here = hashed.intdigest() >> 1
        extremes = torch.tensor([here, -here], device=tensors[0].device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        return int(extremes[0]) == -int(extremes[1])

    def raise_together(self, error: UserError | None, device: torch.device) -> None:
        failed = self.largest(0 if error is None else self.rank + 1, device)
        if failed:
            message = [str(error)]
            dist.broadcast_object_list(message, src=failed - 1)
            raise UserError(message[0])


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
