"""The share of the cores that a rank computes with."""

import pytest
import torch

from trainer.training import threads
from trainer.training.threads import share_threads


@pytest.fixture(autouse=True)
def _kept():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("cores", "ranks", "asked", "share"),
    [
        (8, 1, None, 7),
        (8, 2, None, 3),
        (9, 4, None, 1),
        (8, 8, None, 1),
        (2, 1, None, 1),
        (1, 1, None, 1),
        (1, 4, None, 1),
        (8, 4, 2, 2),
        (1, 1, 3, 3),
    ],
)
def test_each_rank_has_its_share_of_the_cores_but_one(monkeypatch, cores, ranks, asked, share):
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    monkeypatch.setattr(threads, "is_fork", lambda: False)
    assert share_threads(ranks, asked) == share
    assert torch.get_num_threads() == share


def test_a_fork_has_one_thread_whatever_is_asked_for(monkeypatch):
    monkeypatch.setattr(threads, "usable_cores", lambda: 8)
    monkeypatch.setattr(threads, "is_fork", lambda: True)
    assert share_threads(1, 4) == 1
    assert torch.get_num_threads() == 1
