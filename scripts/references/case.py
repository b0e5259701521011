"""What a case is: a model, its rows, and an answer that was computed elsewhere.

Shapes: N rows, D latents in unconstrained space, in the order of the model's sites.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.posterior.summary import SiteSummary

Rows = dict[str, np.ndarray]


class Answer(NamedTuple):
    """The mean-field optimum."""

    loc: np.ndarray
    """[D]."""
    scale: np.ndarray
    """[D]."""
    elbo: float
    """Nats, over all rows."""
    top: np.ndarray
    """bool [D]: latents that no group has for itself (intercepts, scales of groups)."""


class Draws(NamedTuple):
    """Moments of reference draws of the posterior, in unconstrained space."""

    mean: np.ndarray
    """[D]."""
    sd: np.ndarray
    """[D]."""
    log_evidence: float
    """Nats; nan where nobody has computed it."""


def guide_of(sites: Sequence[SiteSummary]) -> tuple[np.ndarray, np.ndarray]:
    """loc and scale [D] of a fit."""
    held = [site for site in sites if site.loc is not None and site.scale is not None]
    return np.concatenate([s.loc.ravel() for s in held]), np.concatenate([s.scale.ravel() for s in held])


@dataclass(frozen=True)
class Case:
    """``rows(root)`` and ``answer(root)`` read below the folder of the data; no answer: it was kept back.

    ``stress``: reported, without a criterion. ``judged``: the quantities that the answer speaks of.
    """

    name: str
    model: Callable[..., None]
    rows: Callable[[Path], Rows]
    answer: Callable[[Path], Answer | None]
    stress: bool = False
    judged: Callable[[Sequence[SiteSummary]], tuple[np.ndarray, np.ndarray]] = guide_of
    options: dict[str, Any] = field(default_factory=dict)
    draws: Callable[[Path], Draws | None] = lambda _: None


def posteriordb(
    name: str, folder: str, model: Callable[..., None], rows: Callable[[dict[str, Any]], Rows],
    elbo_shift: float = 0.0, **more: Any,
) -> Case:  # fmt: skip
    """A case of posteriordb. Half-priors there lack the factor 2: ``elbo_shift`` (nats) is added to the answer."""

    def moments(root: Path) -> dict[str, Any] | None:
        path = root / folder / "reference_moments.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def draws(root: Path) -> Draws | None:
        found = moments(root)
        if found is None:
            return None
        mean, sd = (np.array(found["unconstrained"][name]) for name in ("mean", "sd"))
        return Draws(mean, sd, found.get("log_evidence", {}).get("value", np.nan) + elbo_shift)

    def answer(root: Path) -> Answer | None:
        found = moments(root)
        if found is None:
            return None
        optimum = found["mean_field_optimum"]
        loc, scale = np.array(optimum["loc"]), np.array(optimum["scale"])
        top = np.ones(len(loc), dtype=bool) if len(loc) <= 256 else np.arange(len(loc)) >= len(loc) - 3
        return Answer(loc, scale, optimum["elbo"] + elbo_shift, top)

    return Case(
        name,
        model,
        lambda root: rows(json.loads((root / folder / "data.json").read_text())),
        answer,
        draws=draws,
        **more,
    )
