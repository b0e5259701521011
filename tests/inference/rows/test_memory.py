"""How large tensors get: found without making them."""

import torch

from trainer.inference.rows.memory import largest


def test_the_largest_tensor_is_found_without_being_made():
    long = torch.ones(1_000_000)
    assert largest(lambda: (long[:, None] + long).sum()) == 10**12
    assert largest(lambda: torch.ones(3).unbind()) == 3


def test_what_needs_values_ends_the_look():
    def work():
        made = torch.ones(5) + torch.ones(7, 1)
        return torch.ones(int(made.sum()))

    assert largest(work) == 35
