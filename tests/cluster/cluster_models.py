"""A model that holds a training up, so that a test can do something to it."""

import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trainer.models.logistic import LogisticRegression


@dataclass(frozen=True)
class Held(LogisticRegression):
    """Steps take 50 ms until the file ``go`` is there (with program=eager)."""

    go: str = "go"

    def __call__(self, x: Tensor, y: Tensor | None = None) -> None:
        if not Path(self.go).exists():
            time.sleep(0.05)
        super().__call__(x, y)
