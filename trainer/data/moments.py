"""Mean, spread and range of rows that stream by, per element, in float64.

Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
"""

import numpy as np


class Moments:
    """Of all rows given to `add`: their number ``rows``, and ``mean``, ``sd``, ``low`` and ``high`` [*shape]."""

    def __init__(self) -> None:
        self.rows, self._origin = 0, np.zeros(())  # deviations are from the first row: an offset costs no digits
        self._mean, self._squares = np.zeros(()), np.zeros(())
        self.low, self.high = np.full((), np.inf), np.full((), -np.inf)

    def add(self, values: np.ndarray) -> None:
        """``values`` [B, *shape]."""
        if not len(values):
            return
        self.low = np.minimum(self.low, values.min(axis=0))
        self.high = np.maximum(self.high, values.max(axis=0))
        if not self.rows:
            self._origin = values[0].astype(np.float64)
        deviations = np.subtract(values, self._origin, dtype=np.float64)
        mean = deviations.mean(axis=0)
        deviations -= mean
        rows, step = self.rows + len(values), mean - self._mean
        self._squares = self._squares + np.square(deviations, out=deviations).sum(axis=0)
        self._squares += step**2 * (self.rows * len(values) / rows)
        self._mean, self.rows = self._mean + step * (len(values) / rows), rows

    @property
    def mean(self) -> np.ndarray:
        """The mean."""
        return self._origin + self._mean

    @property
    def sd(self) -> np.ndarray:
        """The population standard deviation: squares over ``rows``."""
        return np.sqrt(self._squares / self.rows)

    def shift(self) -> tuple[np.ndarray, np.ndarray]:
        """What standardising subtracts and divides by: 0 and 1 where an element is constant, so an intercept stays."""
        varies = self.high > self.low
        return np.where(varies, self.mean, 0.0), np.where(varies, self.sd, 1.0)

    def statistics(
        self, subtract: np.ndarray | float = 0.0, divide: np.ndarray | float = 1.0
    ) -> dict[str, list | float]:
        """ "mean", "sd", "min" and "max" of the values less ``subtract``, over ``divide``, as nested lists."""
        centred = {"mean": self.mean - subtract, "sd": self.sd, "min": self.low - subtract, "max": self.high - subtract}
        return {name: (value / divide).tolist() for name, value in centred.items()}
