"""The closing table as it is printed, against the numbers that it is made of."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from trainer.posterior.summary import SiteSummary
from trainer.posterior.table import closing_table


def site(name: str, mean: np.ndarray, sd: np.ndarray) -> SiteSummary:
    mean, sd = np.asarray(mean, float), np.asarray(sd, float)
    quantiles = np.stack([mean - 1.645 * sd, mean, mean + 1.645 * sd])
    return SiteSummary(name, mean.shape, mean, sd, quantiles, None, None)


def printed(*sites: SiteSummary, parameters: dict | None = None, **options: int) -> list[list[str]]:
    """The words of each line that has any."""
    stream = io.StringIO()
    Console(file=stream, width=120).print(closing_table(list(sites), parameters, **options))
    return [line.split() for line in stream.getvalue().splitlines() if line.strip(" ─")]


def test_each_value_of_a_site_has_a_row() -> None:
    lines = printed(site("a", 1.23456, 0.1), site("w", [[1.0, -20.0], [3.0, 4.0]], np.full((2, 2), 0.5)))
    assert lines[:2] == [["posterior"], ["site", "index", "mean", "sd", "5", "%", "95", "%"]]
    assert lines[2] == ["a", "1.23", "0.10", "1.07", "1.40"]
    assert lines[3] == ["w", "0,0", "1.00", "0.50", "0.18", "1.82"]
    assert [line[0] for line in lines[4:]] == ["0,1", "1,0", "1,1"]
    assert lines[4][1] == "-20.00"


@pytest.mark.parametrize(
    ("mean", "sd", "words"),
    [
        (1234567.0, 1234.0, ["1,234,567", "1,234"]),
        (0.123456789, 0.00012, ["0.12346", "0.00012"]),
        (5.0, 12.0, ["5", "12"]),
        (5.0, 9.0, ["5.0", "9.0"]),
        (1e-9, 1e-10, ["1e-09", "1e-10"]),
        (1e12, 3.0, ["1e+12", "3"]),
        (2.5, 0.0, ["2.5", "0"]),
        (np.nan, 0.5, ["nan", "0.5"]),
        (np.inf, 0.5, ["inf", "0.5"]),
    ],
)
def test_numbers_are_shown_as_far_as_they_are_known(mean: float, sd: float, words: list[str]) -> None:
    """To the second digit of the sd."""
    assert printed(site("a", mean, sd))[2][1:3] == words


def test_a_site_of_many_values_is_a_range() -> None:
    mean, sd = np.linspace(-3, 7, 9), np.array([0.1] * 4 + [0.5] * 5)
    lines = printed(site("w", mean, sd))
    assert lines[2] == ["w", "9", "-3.00", "to", "7.00", "~0.50"]
    assert lines[3][:5] == ["~", "of", "a", "site", "of"]
    assert len(printed(site("w", mean, sd), max_rows_per_site=9)) == 2 + 9
    assert len(printed(site("w", mean[:8], sd[:8]))) == 2 + 8
    assert printed(site("w", np.zeros((3, 4)), np.ones((3, 4))))[2][:4] == ["w", "3", "x", "4"]


def test_rows_of_the_unconstrained_space_are_left_out() -> None:
    assert not any("u@" in word for line in printed(site("u@unconstrained", 1.0, 1.0)) for word in line)
    assert printed(site("u@unconstrained", 1.0, 1.0)) == []


def test_trained_parameters_are_points() -> None:
    parameters = {"scale": torch.tensor(0.123456), "net.weight": torch.arange(6.0).view(2, 3), "one": torch.ones(1)}
    lines = printed(parameters=parameters)
    lines = lines[lines.index(["name", "shape", "value"]) + 1 :]
    assert lines[0] == ["scale", "0.1235"]
    assert lines[1] == ["net.weight", "2", "x", "3", "0", "to", "5"]
    assert lines[2] == ["one", "1", "1"]
    both = printed(site("a", 1.0, 0.1), parameters=parameters)
    assert both[2][0] == "a"
    assert both[-3:] == lines


def test_nothing_is_an_empty_table() -> None:
    assert printed() == []
