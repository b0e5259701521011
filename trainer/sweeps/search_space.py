"""A search space in Hydra's own grammar of sweeps, as Optuna's distributions."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Quote, QuotedString, RangeSweep, Transformer
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from trainer.errors import UserError

Space = dict[str, BaseDistribution]


def distribution(override: Override) -> BaseDistribution:
    """What ``KEY=interval(…)``, ``range(…)``, ``choice(…)``, ``glob(…)`` or ``a,b`` is to Optuna.

    ``tag(log, …)`` is for intervals and ranges, ``int(interval(…))`` has both its ends.
    """
    value, name = override.value(), override.key_or_group
    tags = set(getattr(value, "tags", ()))
    if tags - {"log"}:
        raise UserError(f"the tags {sorted(tags)} of {name} are not known: tag(log, interval(1e-4, 1)) is.")
    log = "log" in tags
    if isinstance(value, IntervalSweep):
        kind = IntDistribution if isinstance(value.start, int) else FloatDistribution
        return _made(name, kind, value.start, value.end, log=log)
    if isinstance(value, RangeSweep):
        values: Any = sorted(override.sweep_iterator())
        if not values:
            raise UserError(f"the range of {name} holds no value.")
        if log:
            return _made(name, _type_of(values), values[0], values[-1], log=True)
        return _made(name, _type_of(values), values[0], values[-1], step=abs(value.step))
    if log:
        raise UserError(f"{name} has choices, which have no scale: tag(log, …) is for interval() and range().")
    return CategoricalDistribution(list(map(_encoded, override.sweep_iterator())))


def _encoded(value: Any) -> Any:
    """A choice as what a database takes: as it is, or as the text that Hydra reads back as the same."""
    if isinstance(value, str) and OverridesParser.create().parse_override(f"x={value or None}").value() != value:
        return QuotedString(value, Quote.single).with_quotes()
    return Transformer.encode(value)


def _type_of(values: Sequence[int | float]) -> type[IntDistribution] | type[FloatDistribution]:
    return IntDistribution if isinstance(values[0], int) else FloatDistribution


def _made(name: str, kind: Callable[..., BaseDistribution], low: Any, high: Any, **options: Any) -> BaseDistribution:
    try:
        return kind(low, high, **options)
    except ValueError as error:
        raise UserError(f"the search space of {name} cannot be used: {error}") from error


def parted(overrides: Sequence[Override]) -> tuple[Space, list[str]]:
    """The dimensions of a command's overrides by key, and those that stay as they are."""
    space = {each.get_key_element(): distribution(each) for each in overrides if each.is_sweep_override()}
    if not space:
        raise UserError("a search needs a space: for example 'optimizer.lr=tag(log, interval(0.001, 0.3))'.")
    return space, [str(each.input_line) for each in overrides if not each.is_sweep_override()]


def points(space: Space) -> dict[str, list[Any]]:
    """All values of each dimension. Raises UserError for an interval of floats, and for a logarithmic one."""
    return {name: _values(name, each) for name, each in space.items()}


def _values(name: str, of: BaseDistribution) -> list[Any]:
    if isinstance(of, CategoricalDistribution):
        return list(of.choices)
    if isinstance(of, (IntDistribution, FloatDistribution)) and of.step and not of.log:
        return [of.low + i * of.step for i in range(round((of.high - of.low) / of.step) + 1)]
    raise UserError(f"a grid needs values to go through: give {name} a list or a range(), not an interval().")


def first(of: BaseDistribution) -> Any:
    """Some value of a dimension."""
    return of.choices[0] if isinstance(of, CategoricalDistribution) else of.low  # type: ignore[attr-defined]


def count(space: Space) -> int:
    """Points of the grid."""
    return len(list(itertools.product(*points(space).values())))


def overrides_of(params: Mapping[str, Any]) -> list[str]:
    """The values of a trial as words of a command."""
    return [f"{key}={value}" for key, value in params.items()]
