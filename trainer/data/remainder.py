"""What an interrupted epoch has left, for a plan with another batch size or other lanes to take over."""

from collections.abc import Iterable
from itertools import accumulate, groupby, pairwise
from typing import Any, NamedTuple


class Part(NamedTuple):
    """Rows ``first`` to ``stop`` of ``lane``, one of ``lanes`` in the order of ``epoch``."""

    epoch: int
    lanes: int
    lane: int
    first: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.first


class EpochRemainder(NamedTuple):
    """What of the epochs before ``epoch`` is not taken yet at global step ``step``."""

    step: int
    epoch: int
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        """How many are left."""
        return sum(part.rows for part in self.parts)

    def plain(self) -> dict[str, Any]:
        """Numbers and lists, for a checkpoint."""
        return {**self._asdict(), "parts": [list(part) for part in self.parts]}

    @classmethod
    def of(cls, plain: dict[str, Any] | None) -> "EpochRemainder | None":
        """The inverse of `plain`."""
        return None if plain is None else cls(**{**plain, "parts": tuple(Part(*part) for part in plain["parts"])})


def dealt(parts: Iterable[Part], lanes: int) -> list[tuple[Part, ...]]:
    """The parts of each of ``lanes`` lanes: of each epoch, in order, the stream of its parts cut as an epoch's is."""
    found: list[list[Part]] = [[] for _ in range(lanes)]
    for _, group in groupby(sorted(parts, key=lambda part: part.epoch), key=lambda part: part.epoch):
        stream = list(group)
        begins = list(accumulate((part.rows for part in stream), initial=0))
        for lane, (low, high) in enumerate(pairwise(n * begins[-1] // lanes for n in range(lanes + 1))):
            for part, begin in zip(stream, begins):
                first, stop = max(low - begin, 0), min(high - begin, part.rows)
                if first < stop:
                    found[lane].append(part._replace(first=part.first + first, stop=part.first + stop))
    return [tuple(each) for each in found]


def left_of(parts: Iterable[Part], taken: int) -> list[Part]:
    """The parts without their first ``taken`` rows."""
    left = []
    for part in parts:
        here = min(taken, part.rows)
        taken -= here
        if here < part.rows:
            left.append(part._replace(first=part.first + here))
    return left
