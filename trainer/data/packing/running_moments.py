"""Mean, spread and range of rows that stream by, per element, in float64.

Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
"""

from typing import Any

import numpy as np

_CACHED = 1 << 15  # numbers that are gone over several times
_MOST_ROUNDING = 1e-6  # sds


class RunningMoments:
    """Of all rows given to `add`: their number ``rows``, ``mean``, ``sd``, ``low``, ``high``, ``rounding`` [*shape].

    ``rounding``: the most by which float32 would round one of them; 0 where they come as that.
    """

    def __init__(self) -> None:
        self.rounding = np.zeros(())
        self.rows, self._origin = 0, np.zeros(())  # deviations are from the first row: an offset costs no digits
        self._mean, self._squares = np.zeros(()), np.zeros(())
        self.low, self.high = np.full((), np.inf), np.full((), -np.inf)

    def add(self, values: np.ndarray) -> None:
        """``values`` [B, *shape]."""
        if not len(values):
            return
        made, shape = RunningMoments(), values.shape[1:]
        each = np.ascontiguousarray(values.reshape(len(values), -1).T)  # sums along memory are quicker, and exacter
        low, high, mean, squares, rounding = np.zeros((5, len(each)))
        step = max(1, _CACHED // len(values))
        for here in (slice(first, first + step) for first in range(0, len(each), step)):
            some = each[here]
            low[here], high[here] = some.min(axis=1), some.max(axis=1)
            if some.dtype == np.float64:
                with np.errstate(over="ignore"):
                    rounding[here] = np.abs(some - some.astype(np.float32)).max(axis=1)
            deviations = np.subtract(some, some[:, :1], dtype=np.float64)
            mean[here] = deviations.sum(axis=1) / len(values)
            deviations -= mean[here, None]
            squares[here] = np.square(deviations, out=deviations).sum(axis=1)
        made.rows, made._origin = len(values), values[0].astype(np.float64)
        made._mean, made._squares = mean.reshape(shape), squares.reshape(shape)
        made.low, made.high, made.rounding = (part.reshape(shape) for part in (low, high, rounding))
        self.merge(made)

    def merge(self, later: "RunningMoments") -> None:
        """Adds the rows of ``later``: the same bits for the same moments in the same order."""
        self.rounding = np.maximum(self.rounding, later.rounding)
        if not later.rows:
            return
        if not self.rows:
            self._origin = later._origin
        self.low, self.high = np.minimum(self.low, later.low), np.maximum(self.high, later.high)
        rows, step = self.rows + later.rows, (later._origin - self._origin) + (later._mean - self._mean)
        self._squares = self._squares + later._squares + step**2 * (self.rows * later.rows / rows)
        self._mean, self.rows = self._mean + step * (later.rows / rows), rows

    @property
    def mean(self) -> np.ndarray:
        """The mean."""
        return self._origin + self._mean

    @property
    def sd(self) -> np.ndarray:
        """The population standard deviation: squares over ``rows``."""
        return np.sqrt(self._squares / self.rows)

    @property
    def needs_float64(self) -> bool:
        """Whether float32 would round a value by more than 1e-6 sd, of an element that is not constant."""
        far = self.rounding > _MOST_ROUNDING * self.sd
        return bool(((self.high > self.low) & far | np.isinf(self.rounding)).any()) if self.rows else False

    def shift(self) -> tuple[np.ndarray, np.ndarray]:
        """What standardizing subtracts and divides by: 0 and 1 where an element is constant, so an intercept stays."""
        varies = self.high > self.low
        return np.where(varies, self.mean, 0.0), np.where(varies, self.sd, 1.0)

    def statistics(
        self, subtract: np.ndarray | float = 0.0, divide: np.ndarray | float = 1.0
    ) -> dict[str, list[Any] | float]:
        """The "mean", "sd", "min" and "max" of the values less ``subtract``, over ``divide``, as nested lists."""
        centered = {
            "mean": self.mean - subtract,
            "sd": self.sd,
            "min": self.low - subtract,
            "max": self.high - subtract,
        }
        return {name: (value / divide).tolist() for name, value in centered.items()}

    def state(self) -> dict[str, Any]:
        """Numbers and lists from which `of` makes the same again, bit by bit."""
        arrays = {"origin": self._origin, "mean": self._mean, "squares": self._squares, "rounding": self.rounding}
        arrays |= {"low": self.low, "high": self.high} if self.rows else {}
        return {"rows": self.rows, **{name: array.tolist() for name, array in arrays.items()}}

    @classmethod
    def of(cls, state: dict[str, Any]) -> "RunningMoments":
        """The moments that gave ``state``."""
        made = cls()
        made.rounding = np.array(state["rounding"])
        if state["rows"]:
            made.rows, made.low, made.high = state["rows"], np.array(state["low"]), np.array(state["high"])
            made._origin, made._mean, made._squares = (np.array(state[key]) for key in ("origin", "mean", "squares"))
        return made
