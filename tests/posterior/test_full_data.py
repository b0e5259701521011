"""A block that one rank cannot read in a pass over all rows ends all ranks, at the sum, with its sentence."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from trainer.distributed.comm import ALONE, Group
from trainer.errors import UserError
from trainer.inference.estimates.passes import Block
from trainer.posterior.full_data import together


def here(count: int, bad: bool) -> Iterator[Block]:
    for number in range(count):
        yield Block(number, {}, torch.ones(2))
    if bad:
        raise UserError("block 7 is bad.")


def add_up(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    said = []
    for bad in (False, True):
        blocks, total = together(here(2 + rank, bad and rank == 1), Group(rank, 2))
        summed = sum((block.row_id.sum() for block in blocks), torch.zeros(()))
        try:
            said.append(str(float(total(summed))))
        except UserError as error:
            said.append(str(error))
    (Path(folder) / str(rank)).write_text(" ".join(said))
    dist.destroy_process_group()


def test_an_error_of_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    multiprocessing.spawn(add_up, (str(tmp_path),), nprocs=2)
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["10.0 block 7 is bad."] * 2


def test_alone_it_is_raised_as_it_is() -> None:
    blocks, total = together(here(1, bad=True), ALONE)
    assert len(list(blocks)) == 1
    with pytest.raises(UserError, match=r"block 7 is bad\."):
        total(torch.zeros(1))
