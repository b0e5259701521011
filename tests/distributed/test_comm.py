"""What every Comm keeps to: one process, and two that have met over gloo."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from trainer.distributed.comm import ALONE, Comm, Group
from trainer.errors import UserError

CPU = torch.device("cpu")
SMALL, LARGE = 3, 300_000  # numbers: the second is beyond what goes from rank to rank


def raised(comm: Comm, error: UserError | None) -> str:
    try:
        comm.raise_together(error, CPU)
    except UserError as found:
        return str(found)
    return ""


def all_of(comm: Comm) -> dict[str, Any]:
    """What each of its methods gives on this rank."""
    rank, last = comm.rank, comm.rank == comm.size - 1
    given = torch.full((SMALL,), 1.0 + rank, dtype=torch.float64)
    sums = [comm.sum(torch.full((count,), 1.0 + rank, dtype=torch.float64)) for count in (SMALL, LARGE)]
    comm.sum(given)
    same = [torch.arange(5.0), torch.tensor(3)]
    return {
        "rank": rank,
        "size": comm.size,
        "sums": [sorted(set(each.tolist())) for each in sums],
        "given": sorted(set(given.tolist())),
        "largest": comm.largest(10 * (rank + 1), CPU),
        "gathered": comm.gathered({"rank": rank}),
        "from first": comm.from_first(torch.tensor([7.0 + rank])).tolist(),
        "agree": comm.agree(same),
        "an error": raised(comm, UserError("row 5 is bad.") if last else None),
        "none": raised(comm, None),
    }


def expected(rank: int, size: int) -> dict[str, Any]:
    total = float(sum(range(1, size + 1)))
    return {
        "rank": rank,
        "size": size,
        "sums": [[total], [total]],
        "given": [1.0 + rank],
        "largest": 10 * size,
        "gathered": [{"rank": each} for each in range(size)],
        "from first": [7.0],
        "agree": True,
        "an error": "row 5 is bad.",
        "none": "",
    }


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    comm = Group(rank, 2)
    nearly, negative_zero = torch.arange(5.0) * (1 + 1e-7 * rank), torch.tensor([0.0 if rank else -0.0])
    found = {**all_of(comm), "off": [comm.agree([each]) for each in (nearly, negative_zero)]}
    (Path(folder) / str(rank)).write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [json.loads((folder / str(rank)).read_text()) for rank in (0, 1)]


def test_one_process_is_its_own_sum() -> None:
    assert all_of(ALONE) == expected(0, 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_hold_the_same(two: list[dict[str, Any]], rank: int) -> None:
    assert {**two[rank], "off": None} == {**expected(rank, 2), "off": None}


def test_a_bit_that_differs_is_seen_on_both(two: list[dict[str, Any]]) -> None:
    """In the last place, and in the sign of a zero."""
    assert [each["off"] for each in two] == [[False, False]] * 2
