"""The Lightning module: what ranks decide together."""

from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from trainer.distributed.comm import Group
from trainer.engine.metrics import is_kept
from trainer.engine.module import ChunkModule
from trainer.errors import UserError
from trainer.inference.programs.tracing import Untraceable


class OnRankZeroAlone:
    """A program that rank 1 cannot compile."""

    reference = "eager"

    def __init__(self, rank: int):
        self.rank, self.abandoned = rank, False

    def prepare(self, *_: object) -> None:
        if self.rank:
            raise Untraceable("no compiler")

    def abandon(self) -> None:
        self.abandoned = True


def prepared(rank: int) -> list[object]:
    """What becomes of that program on ``rank``."""
    said: list[str] = []
    program = OnRankZeroAlone(rank)
    module = SimpleNamespace(
        program=program, comm=Group(rank, 2), state=None, say=said.append, device=torch.device("cpu")
    )
    ChunkModule._prepare(module, None)  # type: ignore[arg-type]
    return [module.program, program.abandoned, len(said)]


def on_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    (Path(folder) / str(rank)).write_text(str(prepared(rank)))
    dist.destroy_process_group()


def test_a_step_that_one_rank_cannot_compile_runs_eagerly_on_both(tmp_path: Path) -> None:
    multiprocessing.spawn(on_rank, (str(tmp_path),), nprocs=2)
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["['eager', True, 1]"] * 2


def test_a_model_that_computes_otherwise_is_prepared_anew() -> None:
    """What another process compiles meanwhile is of the model as it was."""
    done: list[str] = []
    module = SimpleNamespace(
        data=SimpleNamespace(trial_chunk=lambda steps: f"{steps} steps"),
        program=SimpleNamespace(abandon=lambda: done.append("abandon")),
        interruptible=nullcontext,
        device=torch.device("cpu"),
        transfer_batch_to_device=lambda chunk, *_: chunk,
        _get_ready=done.append,
    )
    ChunkModule.renew(module)  # type: ignore[arg-type]
    assert done == ["abandon", "4 steps"]


def test_the_module_stops_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChunkModule, "comm", SimpleNamespace(agree=lambda tensors: False))
    module = ChunkModule.__new__(ChunkModule)
    monkeypatch.setattr(ChunkModule, "step", 41)
    monkeypatch.setattr(ChunkModule, "state", SimpleNamespace(named=dict), raising=False)
    with pytest.raises(UserError, match="different parameters at step 41"):
        module.compare_ranks()


def test_metrics_thin_out() -> None:
    kept = [number for number in range(8000) if is_kept(number)]
    assert kept[:1000] == list(range(1000))
    assert len(kept) == 1000 + 3 * 500
    assert {b - a for a, b in pairwise(kept) if a >= 4000} == {8}
