"""What an option may be, said by its type.

A record is a frozen dataclass, one for each verb and each part of its config; the type of a field is all that is known
of an option besides its default and its comment, which stand in conf/. A type is one of bool, int, float and str, a
`Literal` of words, `Annotated` with limits, a union, `tuple[T, ...]` for a list (or a single value), `dict[str, T]`,
another record, or `Part`: what is made of a class of anybody's. Nothing here loads torch.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Protocol, Union, get_args, get_origin

from omegaconf import DictConfig


class Unfit(Exception):
    """A value is not of a kind."""


class Limit(Protocol):
    """A limit of the values of a type, as a word of `Annotated`; ``words`` follow those of the type, if any."""

    def holds(self, value: Any) -> bool: ...

    def words(self, base: str) -> str: ...


@dataclass(frozen=True)
class Range:
    """Numbers from ``least`` to ``most``, without those that are not to be reached: "(" and ")" as in mathematics."""

    least: float
    most: float = math.inf
    ends: str = "[]"

    def holds(self, value: float) -> bool:
        above = value > self.least if self.ends[0] == "(" else value >= self.least
        return above and (value < self.most if self.ends[1] == ")" else value <= self.most)

    def words(self, base: str) -> str:
        low = f"above {self.least:,g}" if self.ends[0] == "(" else f"from {self.least:,g}"
        if math.isinf(self.most):
            return f"{base} {low}" if self.ends[0] == "(" else f"{base} {low} up"
        most = f"{self.most:,}" if self.most < 2**53 else f"2**{math.log2(self.most):.0f} - 1"
        return f"{base} {low} {'and below' if self.ends[1] == ')' else 'to'} {most}"


@dataclass(frozen=True)
class Pattern:
    """Text of one form; ``form``: how it is written, for a sentence."""

    regex: str
    form: str

    def holds(self, value: str) -> bool:
        return re.fullmatch(self.regex, value) is not None

    def words(self, base: str) -> str:
        return self.form


@dataclass(frozen=True)
class Filled:
    """Not an empty list; ``form``: what it is, for a sentence."""

    form: str

    def holds(self, value: Any) -> bool:
        return len(value) > 0

    def words(self, base: str) -> str:
        return self.form


@dataclass(frozen=True)
class PartOf:
    """Marks a node that takes options that are not ours: the arguments of a class that its ``_target_`` names, or what
    ``record`` (whose options it has to have) does not know; ``several``: such nodes, each below a name of its own.
    """

    record: type | None = None
    several: bool = False


Part = Annotated[DictConfig, PartOf()]
Parts = Annotated[DictConfig, PartOf(several=True)]
Count = Annotated[int, Range(1)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
Positive = Annotated[float, Range(0, ends="()")]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1, "[)")]
Within = Annotated[float, Range(0, 1, "()")]
Seconds = Annotated[float, Range(0, 100_000_000, "(]")]
Names = tuple[str, ...]
Number = int | float


def read(kind: Any, value: Any) -> Any:
    """``value`` as a ``kind``, where it is one or can only mean one: 1e3 is a whole number, "0.1" a number.

    Raises Unfit.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        found = read(args[0], value)
        if not all(limit.holds(found) for limit in args[1:]):
            raise Unfit
        return found
    if origin in (Union, UnionType):
        return _any_of(args, value)
    if origin is Literal:
        return _one_of(args, value)
    if origin is tuple:
        return tuple(read(args[0], each) for each in (value if isinstance(value, list | tuple) else [value]))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise Unfit
        return {str(name): read(args[1], each) for name, each in value.items()}
    return _READERS[kind](value)


def words(kind: Any) -> str:
    """What a value may be, for a sentence: "a number above 0, or null"."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        said = words(args[0])
        for limit in args[1:]:
            said = limit.words(said)
        return said
    if origin is Literal:
        return " or ".join(filter(None, [", ".join(map(shown, args[:-1])), shown(args[-1])]))
    if origin in (Union, UnionType):
        if set(args) == {int, float}:
            return "a number"
        *others, last = [words(each) for each in sorted(args, key=lambda each: each is NoneType)]
        return f"{', '.join(others)}{', or ' if NoneType in args else ' or '}{last}"
    if origin is tuple:
        return f"a list, each {words(args[0])}" if args[0] is not str else "a name or a list of names, as [a,b]"
    return _WORDS.get(kind, "options of its own")


def shown(value: Any) -> str:
    """A value as one writes it on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{name}:{shown(each)}' for name, each in value.items())}}}"
    text = str(value)
    return '""' if not text else text if len(text) <= 80 else f"{text[:77]}..."


def part_of(kind: Any) -> PartOf | None:
    """How the options of a node are open, if they are."""
    marks = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    return next((mark for mark in marks if isinstance(mark, PartOf)), None)


def _any_of(kinds: tuple[Any, ...], value: Any) -> Any:
    """As the first that fits, a value of whose very type comes before one that can only mean it."""
    why = ""
    for kind in sorted(kinds, key=lambda each: each is not type(value)):
        try:
            return read(kind, value)
        except Unfit as error:
            why = why or str(error)
    raise Unfit(why)


def _one_of(choices: tuple[Any, ...], value: Any) -> Any:
    for each in choices:
        if type(each) is type(value) and each == value:
            return each
    raise Unfit


def _bool(value: Any) -> bool:
    found = {"true": True, "false": False}.get(value) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise Unfit
    return found


def _int(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value):
        value = int(value)
    found = value if isinstance(value, int) else _float(value)
    if isinstance(value, bool) or found != int(found):
        raise Unfit
    if abs(found) >= 2**63:
        raise Unfit("below 2**63")
    return int(found)


def _float(value: Any) -> float:
    try:
        found = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise Unfit
    return found


def _str(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | str) or not str(value).strip():
        raise Unfit
    return str(value)


def _none(value: Any) -> None:
    if value is not None:
        raise Unfit


_READERS: dict[Any, Any] = {bool: _bool, int: _int, float: _float, str: _str, NoneType: _none, Any: lambda value: value}
_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text that is not empty",
    NoneType: "null",
    Any: "anything",
}
