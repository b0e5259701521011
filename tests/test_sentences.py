"""Counts and lists within a sentence."""

import pytest

from trainer.errors import counted, shortened
from trainer.training.final_evaluation import shown_error


@pytest.mark.parametrize(
    ("number", "words", "said"),
    [
        (0, ("block",), "0 blocks"),
        (1, ("block",), "1 block"),
        (2_000, ("damaged block",), "2,000 damaged blocks"),
        (1, ("category", "categories"), "1 category"),
        (12, ("category", "categories"), "12 categories"),
    ],
)
def test_one_is_one_and_more_are_many(number, words, said):
    assert counted(number, *words) == said


def test_a_long_list_is_cut_and_says_how_much_is_left():
    assert shortened(["a", "b"]) == "a, b"
    assert shortened(map(str, range(1_025)), most=3) == "0, 1, 2 and 1,022 more"


@pytest.mark.parametrize(
    ("se", "said"), [(0.0, "0.000"), (1.4e-13, "0.000"), (4e-4, "0.000"), (0.0047, "0.0047"), (12.3, "12")]
)
def test_an_error_of_rounding_is_none(se, said):
    assert shown_error(se) == said
