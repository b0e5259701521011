"""Newton steps on the ELBO over all rows: they bring a round's average to the optimum where the curvature is known.

Averaged iterates are a few tenths of a scale off where a round is few epochs long: the rows' noise falls with the root
of its length. A Newton step leaves of any error only the part by which the curvature is wrong (a percent, from a sample
of rows), for one pass.
"""

import math
from collections.abc import Callable

from torch import Tensor

from trainer.posterior.convergence import newton_step, step_to_go, to_go
from trainer.svi.step import Inference
from trainer.svi.variance import Whitening

_TARGET = 0.03  # scales left to go, under which there is nothing to gain
_AGREE = 0.04, 0.1  # what fresh draws may leave to go: locations, in scales, and twice a log scale
_STEPS, _SLOWEST = 8, 0.8


def polished(
    inference: Inference,
    theta: Tensor,
    found: Tensor,
    whitening: Whitening,
    gradient: Callable[[Tensor, bool], Tensor],
) -> tuple[Tensor, Tensor]:
    """``theta`` [P] after Newton steps, and the gradient [P] there, which at the start is ``found``.

    ``gradient(theta, fresh)``: of minus the ELBO over all rows (nats), a pass each. The steps solve the problem of one
    set of draws, a few dozen, as long as each leaves at most 0.8 of what the one before left (locations and scales that
    hang together take several). The answer is kept if a fresh set of draws, as in ``found``, agrees: along a steep
    ridge a few draws say little, and the average of thousands of steps is better.
    """
    if step_to_go(inference, theta, found, whitening) <= _TARGET:
        return theta, found
    at, made, left = theta, theta, math.inf
    for _ in range(_STEPS):
        here = gradient(at, False)
        then = step_to_go(inference, at, here, whitening)
        if not then <= _SLOWEST * left:
            break
        made, left = at, then
        if left <= _TARGET:
            break
        at = at + newton_step(at, here, whitening).to(at.dtype)
    if made is theta or left > max(_AGREE):
        return theta, found
    there = gradient(made, True)
    agree = all(bool((far <= limit).all()) for far, limit in zip(to_go(made, there, whitening), _AGREE))
    return (made, there) if agree else (theta, found)
