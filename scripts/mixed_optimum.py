"""The exact optimum of a logistic model with a random intercept, by 60 fixed nodes and Newton's method, in float64.

Shapes: N persons, J ratings of each, K nodes, D = 4 parameters: intercept, two slopes, the log sd of the intercepts.
"""

from typing import NamedTuple

import numpy as np
from numpy import ndarray

PRIOR_SD, PRIOR_SCALE = 10.0, 2.0  # Normal of the fixed effects, HalfCauchy of the sd
_NODES, _PERSONS = 60, 2_000  # at once


class Optimum(NamedTuple):
    at: ndarray
    """[D]."""
    sd: ndarray
    """[D], of the posterior there."""


def optimum(x: ndarray, y: ndarray, start: ndarray) -> Optimum:
    """Of the log posterior in (fixed effects, log sd), given x [N, J, 2] and y [N, J]; ``start`` [D]: near it."""
    at = np.array(start, dtype=float)
    for _ in range(20):
        gradient, hessian = _prior(at)
        for first in range(0, len(y), _PERSONS):
            part = slice(first, first + _PERSONS)
            more = _likelihood(at, x[part].astype(float), y[part].astype(float))
            gradient, hessian = gradient + more[0], hessian + more[1]
        step = np.linalg.solve(-hessian, gradient)
        sd = np.sqrt(np.diag(np.linalg.inv(-hessian)))
        at = at + step
        if np.abs(step / sd).max() < 1e-3:
            return Optimum(at, sd)
    raise RuntimeError("Newton's method found no optimum")


def _prior(at: ndarray) -> tuple[ndarray, ndarray]:
    """Gradient [D] and Hessian [D, D] of the log prior, with the Jacobian of the log sd."""
    ratio = np.exp(2 * at[3]) / PRIOR_SCALE**2
    gradient = np.append(-at[:3] / PRIOR_SD**2, 1 - 2 * ratio / (1 + ratio))
    return gradient, -np.diag([*[PRIOR_SD**-2] * 3, 4 * ratio / (1 + ratio) ** 2])


def _likelihood(at: ndarray, x: ndarray, y: ndarray) -> tuple[ndarray, ndarray]:
    """Gradient [D] and Hessian [D, D] of the log of the integral, by those at its nodes (Louis 1982)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    effect = np.exp(at[3]) * nodes
    fixed = np.concatenate([np.ones((*y.shape, 1)), x], axis=2)
    logits = (fixed @ at[:3])[:, None] + effect[:, None]
    p = 1 / (1 + np.exp(-logits))
    signed = np.where(y[:, None] > 0, p, 1 - p)
    share = weights * signed.prod(2)
    share = share / share.sum(1, keepdims=True)
    error = y[:, None] - p
    total = error.sum(2)
    score = np.concatenate([error @ fixed, (effect * total)[:, :, None]], axis=2)
    mean = np.einsum("nk,nkd->nd", share, score)
    spread = share[:, :, None] * p * (1 - p)
    hessian = np.einsum("nk,nkd,nke->de", share, score, score, optimize=True) - mean.T @ mean
    hessian[:3, :3] -= np.einsum("njd,nj,nje->de", fixed, spread.sum(1), fixed, optimize=True)
    cross = np.einsum("njd,nj->d", fixed, np.einsum("k,nkj->nj", effect, spread))
    hessian[:3, 3] -= cross
    hessian[3, :3] -= cross
    hessian[3, 3] += (share * effect * total).sum() - np.einsum("k,nkj->", effect**2, spread)
    return mean.sum(0), hessian
