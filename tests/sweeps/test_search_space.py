"""Hydra's grammar of sweeps as Optuna's distributions, grids and words."""

import re

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from trainer.errors import UserError
from trainer.sweeps import search_space as space


def dimension(word: str):
    (override,) = OverridesParser.create().parse_overrides([word])
    return space.distribution(override)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("a=interval(1,5)", FloatDistribution(1.0, 5.0)),
        ("a=tag(log,interval(1e-4,1e-1))", FloatDistribution(1e-4, 1e-1, log=True)),
        ("a=int(interval(1,5))", IntDistribution(1, 5)),
        ("a=range(1,10,2)", IntDistribution(1, 9, step=2)),
        ("a=range(9,0,-2)", IntDistribution(1, 9, step=2)),
        ("a=tag(log,range(1,100))", IntDistribution(1, 99, log=True)),
        ("a=range(0,0.5,0.25)", FloatDistribution(0.0, 0.25, step=0.25)),
        ("a=adam,sgd", CategoricalDistribution(["adam", "sgd"])),
        ("a=choice(1,2.5,true,'b c','3','')", CategoricalDistribution([1, 2.5, True, "b c", "'3'", "''"])),
        ("a=null,[1,2]", CategoricalDistribution(["null", "[1,2]"])),
    ],
)
def test_hydras_grammar_is_the_search_space(word, expected):
    assert dimension(word) == expected


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("a=tag(slow,interval(0,1))", "the tags ['slow'] of a are not known"),
        ("a=tag(log,interval(-1,1))", "the search space of a cannot be used"),
        ("a=tag(log,choice(1,2))", "a has choices, which have no scale"),
        ("a=range(3,1)", "the range of a holds no value"),
    ],
)
def test_a_space_that_cannot_be_is_one_sentence(word, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        dimension(word)


def test_a_value_becomes_the_word_that_hydra_reads_back():
    values = {"a": "null", "b": "[1,2]", "c": "'3'", "d": True, "e": 1e-05, "+f": 3}
    read = OverridesParser.create().parse_overrides(space.overrides_of(values))
    assert [each.value() for each in read] == [None, [1, 2], "3", True, 1e-05, 3]


def parsed(*words: str):
    return OverridesParser.create().parse_overrides(list(words))


def test_a_command_falls_apart_into_dimensions_and_what_stays():
    dimensions, fixed = space.parted(parsed("a=1", "b=1,2", "model=wide", "+c=interval(0,1)", "~d", "e='x y'"))
    assert dimensions == {"b": CategoricalDistribution([1, 2]), "+c": FloatDistribution(0.0, 1.0)}
    assert fixed == ["a=1", "model=wide", "~d", "e='x y'"]
    with pytest.raises(UserError, match="a search needs a space"):
        space.parted(parsed("a=1"))


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("a=range(1,10,3)", [1, 4, 7]),
        ("a=range(9,0,-3)", [3, 6, 9]),
        ("a=range(0,1,0.25)", [0.0, 0.25, 0.5, 0.75]),
        ("a=range(0,1,0.1)", [k / 10 for k in range(10)]),
        ("a=x,y", ["x", "y"]),
        ("a=range(5,6)", [5]),
        ("a=true,null", [True, "null"]),
    ],
)
def test_a_grid_goes_through_the_values_that_hydra_would(word, values):
    """Its own sweep is the oracle, in whatever order, and its reading of the words."""
    (found,) = space.points({"a": dimension(word)}).values()
    assert found == (values if isinstance(values[0], str | bool) else pytest.approx(values))
    (override,) = parsed(word)
    theirs, ours = list(override.sweep_iterator()), [parsed(f"a={value}")[0].value() for value in found]
    assert ours == (theirs if isinstance(values[0], str | bool) else pytest.approx(sorted(theirs)))


def test_whole_numbers_between_two_ends_are_a_grid_too():
    assert space.points({"a": dimension("a=int(interval(1,4))")}) == {"a": [1, 2, 3, 4]}


@pytest.mark.parametrize("word", ["a=interval(0,1)", "a=tag(log,range(1,9))", "a=tag(log,int(interval(1,9)))"])
def test_an_interval_is_no_grid(word):
    with pytest.raises(UserError, match=r"a grid needs values to go through: give a a list or a range\(\)"):
        space.points({"a": dimension(word), "b": dimension("b=1,2")})


def test_a_grid_has_as_many_points_as_its_dimensions_multiply_to():
    dimensions, _ = space.parted(parsed("a=1,2,3", "b=range(0,4)", "c=x,y"))
    assert space.count(dimensions) == 3 * 4 * 2


@pytest.mark.parametrize(("word", "value"), [("a=3,1", 3), ("a=range(9,0,-2)", 1), ("a=interval(0.5,1)", 0.5)])
def test_some_value_of_a_dimension_is_one_that_it_has(word, value):
    assert space.first(dimension(word)) == value
