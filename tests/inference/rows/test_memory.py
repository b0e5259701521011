"""How large tensors get: found without making them."""

import torch

from trainer.inference.rows.memory import numbers


def test_the_largest_tensor_is_found_without_being_made():
    long = torch.ones(1_000_000)
    assert numbers(lambda: (long[:, None] + long).sum()).largest == 10**12
    assert numbers(lambda: torch.ones(3).unbind()).largest == 3


def test_what_needs_values_ends_the_look():
    def work():
        made = torch.ones(5) + torch.ones(7, 1)
        return torch.ones(int(made.sum()))

    assert numbers(work).largest == 35


def test_all_tensors_are_counted():
    assert numbers(lambda: torch.ones(5) + torch.ones(7, 1)).total == 5 + 7 + 35
