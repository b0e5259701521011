"""Where training starts and in which coordinates it steps: at the mode of a sample of rows, whitened.

Laplace's approximation in unconstrained space (Kass and Raftery 1995, section 4.1): the location starts at the mode of
the posterior given the sample (at scale N / n), the scale at 1 / sqrt(curvature), as a mean-field Gaussian has it. The
optimizer steps in v, loc = L v, where L L' is the inverse of the Hessian there: a rate means the same for a
coefficient of 80 and for one of 0.001, and along a ridge as across it.

Shapes: P parameters, D latents.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from trainer.inference.estimates.derivatives import hessian
from trainer.inference.guides.gaussian import GaussianView
from trainer.inference.guides.mean_field import KL
from trainer.inference.model.noise import element_noise
from trainer.inference.model.plates import Batch
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.optim.variance_reduction import Preconditioner
from trainer.inference.recipe.exact_fit import refuse_exact
from trainer.inference.recipe.mode import Mode, lowest_place, mode_of, off_saddle
from trainer.inference.step import Inference, in_dtype

PLAIN = 0.25  # of a coordinate, so that the rates of whitened steps are those of plain ones
_FACTOR = 0.1, 100.0  # by which the precision of a guide may change at once
_TOGETHER = 16  # draws whose curvature is taken at once
_RISE = 0.05, 5.0  # nats; 0.5 for a Gaussian
_RIDGE, _UNIDENTIFIED = 0.01, 1e-8  # the smallest eigenvalue of the scaled Hessian
_APART, _COLUMNS_APART = 1e4, 1e6  # units of latents, scales of columns
_NO_MAXIMUM = (
    'the log joint has no maximum along "{}", or hardly falls around it: that is usual for the scale of a centered '
    "hierarchy; with separable data or an improper prior the optimum lies at infinity, so give it a proper prior."
)

_NOT_FINITE = (
    "the search for a start met values that are not finite, so training starts where the guide does: look for extreme "
    "values in the data, or priors that are too wide."
)


def laplace_start(
    inference: Inference, theta: Tensor, rows: Batch, say: Callable[[str], None] = print, seed: int = 0
) -> tuple[Tensor, Preconditioner] | None:
    """theta [P] at the mode given ``rows`` (one lane group), and the coordinates to step in from there.

    ``say`` is told where the problem is not one that a mean-field answer describes: no maximum, a ridge. Where there is
    no mode to start at (centered hierarchies, separable data), theta stays and the coordinates are plain ones, until a
    round's end knows a curvature. A saddle is left by pushes, which ``seed`` names. None where there is none to take:
    another guide, other parameters beside it, more latents than the guide's covariance takes a matrix of.
    """
    view = latents_alone(inference)
    if view is None or view.size > view.covariance.most:
        _tell_of_scales(rows, say)
        return None
    with _exact(inference):
        loss = _joint(inference, rows)
        found = mode_of(loss, view.size, theta.device)
        found = off_saddle((loss, _joint(inference, rows, "likelihood")), found, view.parts, seed, say)
        doubts: list[str] = []
        mode = _settled(loss, found, view, doubts.append)
        units = _units(loss, view.size, theta) if mode is None else None
        if units is not None:
            scaled = mode_of(lambda at: loss(units * at), view.size, theta.device)
            found = Mode(units * scaled.loc, scaled.settled, units * scaled.lowest)
            mode = _settled(loss, found, view, doubts.append)
        for sentence in doubts[-1:] if mode is None else ():
            say(sentence)
        refuse_exact(inference, rows, found.lowest, _joint, lowest_place if mode is None else None)
        if mode is None:
            _tell_of_scales(rows, say)
            plain = torch.eye(view.size, dtype=theta.dtype, device=theta.device)
            return theta, _preconditioner(view, theta, PLAIN * plain, 0.0 * plain)
        loc, hessian = mode
        scale = hessian.diagonal().rsqrt()
        _tell_of_ridge(view, scale[:, None] * hessian * scale, say)
        made = view.nearest(loc, hessian)
        preconditioner = _preconditioner(view, made, _factor(hessian, scale), _of_draws(inference, rows, loc, scale))
    return made.to(theta.dtype), preconditioner.each(lambda part: part.to(theta.dtype))


def latents_alone(inference: Inference) -> GaussianView | None:
    """The guide as a Gaussian, where that is all that is learned and nothing else is drawn; else None."""
    view = inference.gaussian
    if view is None or inference.parameters.size != view.parameters:
        return None
    return view if inference.guide.noise_size == (view.covariance.normals, 0) else None


def _settled(
    loss: Callable[[Tensor], Tensor], found: Mode, view: GaussianView, say: Callable[[str], None]
) -> tuple[Tensor, Tensor] | None:
    """The mode [D] and the Hessian [D, D] there, if that looks like a Gaussian's."""
    loc = found.loc
    if not torch.isfinite(loc).all() or not torch.isfinite(loss(loc)):
        say(_NOT_FINITE)
        return None
    if not found.settled:
        say(_NO_MAXIMUM.format(view.latent_name(int(loc.abs().argmax()))))
        return None
    curvatures = hessian(loss, loc) if found.curvature is None else found.curvature
    curvature = curvatures.diagonal()
    flat = ~(curvature > 0)
    if not torch.isfinite(curvatures).all():
        return None
    rises = _rises(loss, loc, torch.where(flat, 1.0, curvature).rsqrt())
    if flat.any() or not ((rises > _RISE[0]) & (rises < _RISE[1])).all():
        where = int(torch.where(flat, -math.inf, rises.min(1).values).argmin())
        if flat.any() or rises[where].min() <= _RISE[0]:
            say(_NO_MAXIMUM.format(view.latent_name(where)))
        return None
    return loc, curvatures


def preconditioner_at(inference: Inference, theta: Tensor, rows: Batch, seed: int = 0) -> Preconditioner:
    """The mean curvature under the guide at ``theta`` [P]; steps are in the guide's scales where it is not positive
    definite.

    The mean is over a few antithetic pairs: what the ELBO curves by, which for a hierarchy is not the curvature at the
    guide's centre. ``seed``: names them.
    """
    view = inference.gaussian
    assert view is not None
    loc, scale = view.location(theta.double()), view.sd(theta.double())
    joint, count = _joint(inference, rows), rows.batch_rows.clamp(min=1)
    pairs = torch.arange(view.covariance.pairs(int(count)))
    count_of = view.covariance.normals
    eps = element_noise(seed, torch.zeros((), dtype=torch.int64), pairs, count_of, torch.float64)
    where = torch.cat([eps, -eps]) if len(eps) else torch.zeros(1, count_of, dtype=torch.float64)
    parts = view.covariance.spread(theta.double(), where).split(max(1, _TOGETHER // inference.model.copies))

    def mean(at: Tensor, part: Tensor) -> Tensor:
        return torch.stack([joint(at + each) for each in part]).mean()

    with _exact(inference):
        curvature = sum(len(part) / len(where) * hessian(partial(mean, part=part), loc) for part in parts)
        of_draws = _of_draws(inference, rows, loc, scale)
        near = torch.as_tensor(curvature)
        near = near if view.covariance.independent else _bounded(near, view.root(theta.double()))
        made = _preconditioner(view, theta.double(), _factor(near, scale), of_draws)
    return made.each(lambda part: torch.nan_to_num(part, posinf=0.0, neginf=0.0).to(theta.dtype))


def _bounded(curvature: Tensor, root: Tensor) -> Tensor:
    """The ``curvature`` [D, D], in each direction within a factor of the precision of the guide, whose covariance has
    this ``root`` [D, E]: a covariance made of it is one, and moves by that much at most.
    """
    if not curvature.isfinite().all():
        return curvature
    lower = torch.linalg.cholesky(root @ root.mT)
    values, vectors = torch.linalg.eigh(lower.mT @ curvature @ lower)
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype), upper=False)
    along = inverse.mT @ vectors
    bounded: Tensor = (along * values.clamp(*_FACTOR)) @ along.mT
    return bounded


def _preconditioner(view: GaussianView, theta: Tensor, factor: Tensor, of_draws: Tensor) -> Preconditioner:
    """At ``theta`` [P], by a ``factor`` of the inverse Hessian and the Hessian ``of_draws``, both [D, D]."""
    covariance = view.covariance
    return Preconditioner(factor, covariance.control(of_draws, theta), covariance.units(factor, theta))


def _joint(inference: Inference, rows: Batch, kind: str | None = None) -> Callable[[Tensor], Tensor]:
    """Minus the log joint [] (nats), or its terms of a ``kind``, as a function of the unconstrained latents [D]."""

    def loss(loc: Tensor) -> Tensor:
        zero = torch.zeros_like(loc)
        terms = _minus_terms(inference, "monte_carlo", rows, loc, zero, zero)
        return terms[[n for n, each in enumerate(inference.kinds) if kind in (None, each)]].sum()

    return loss


def _of_draws(inference: Inference, rows: Batch, loc: Tensor, scale: Tensor) -> Tensor:
    """The Hessian [D, D] of what the draws estimate."""
    by_noise = hessian(
        lambda eps: _minus_terms(inference, "analytic", rows, loc, scale.log(), eps).sum(), torch.zeros_like(loc)
    )
    return by_noise / scale[:, None] / scale


def _minus_terms(inference: Inference, kl: KL, rows: Batch, loc: Tensor, log_scale: Tensor, eps: Tensor) -> Tensor:
    """Minus the ELBO's terms [S] (nats) at one draw, in float64."""
    dtype, view = inference.float_type, inference.gaussian
    assert view is not None
    theta = view.theta(loc.to(dtype), log_scale.to(dtype))
    padded = torch.nn.functional.pad(eps, (0, view.covariance.normals - len(eps)))  # those of factors are of no use
    return -inference.of_sample(ELBO(kl, antithetic=False), theta, padded[None], rows)


def _factor(hessian: Tensor, scale: Tensor) -> Tensor:
    """L [D, D], L L' = the inverse of the Hessian; the diagonal of ``scale`` where that is not positive definite."""
    root, failed = torch.linalg.cholesky_ex(torch.nan_to_num(scale[:, None] * hessian * scale))
    if failed:
        return scale.diag()
    factor: Tensor = scale[:, None] * torch.linalg.inv(root).T
    return factor


def _units(loss: Callable[[Tensor], Tensor], size: int, theta: Tensor) -> Tensor | None:
    """Of each latent [D], by the curvature at 0, where they differ by so much that a search in other units fails."""
    curvature = hessian(loss, torch.zeros(size, dtype=torch.float64, device=theta.device)).diagonal()
    if not curvature.isfinite().all():
        return None
    units = torch.where(curvature > 0, curvature, 1.0).rsqrt()
    return units if units.max() > _APART * units.min() else None


def _rises(loss: Callable[[Tensor], Tensor], loc: Tensor, scale: Tensor) -> Tensor:
    """How far ``loss`` rises one ``scale`` to either side of the mode [D, 2], in nats; by a half for a Gaussian.

    Where the data separate it falls for ever, and its curvature at any place says nothing.
    """
    with torch.no_grad():
        lowest, sides = loss(loc), torch.diag(scale)
        return torch.stack([torch.stack([loss(loc + side), loss(loc - side)]) - lowest for side in sides])


def _tell_of_ridge(view: GaussianView, correlation: Tensor, say: Callable[[str], None]) -> None:
    """Says which latents are strongly correlated, by the Hessian scaled to a diagonal of ones."""
    values, vectors = torch.linalg.eigh(correlation)
    if values[0] > (_RIDGE if view.covariance.independent else _UNIDENTIFIED) or values[0] < -_RIDGE:
        return  # a saddle from which no push has led to a mode tells nothing of a ridge
    first, second = (view.latent_name(int(i)) for i in vectors[:, 0].abs().topk(2).indices)
    if values[0] < _UNIDENTIFIED:
        say(
            f'neither the data nor the priors tell "{first}" from "{second}": only a combination of them has a '
            "posterior; give one a proper prior, or leave one out."
        )
    else:
        say(
            f'"{first}" and "{second}" are strongly correlated: their posterior sds are up to '
            f"{float(values[0]) ** -0.5:.0f} times the sds of a mean-field guide; center the columns, or take "
            "guide=full_rank."
        )


def _tell_of_scales(rows: Batch, say: Callable[[str], None]) -> None:
    """Says which columns are so far apart in scale that steps of one size for all do not reach an optimum."""
    sizes: dict[str, float] = {}
    for name, column in rows.columns.items():
        if isinstance(column, Tensor) and column.is_floating_point():
            flat = column[0].double().reshape(column.shape[1], -1).std(0, correction=0).tolist()
            sizes |= {f"{name}[{i}]" if len(flat) > 1 else name: sd for i, sd in enumerate(flat) if sd > 0}
    small, large = min(sizes, key=sizes.__getitem__, default=""), max(sizes, key=sizes.__getitem__, default="")
    if sizes and sizes[large] > _COLUMNS_APART * sizes[small]:
        say(
            f'the scales of columns "{small}" (sd {sizes[small]:.1g}) and "{large}" (sd {sizes[large]:.1g}) are too '
            "far apart for steps of one size: give standardize=[...] when packing, or use other units."
        )


@contextmanager
def _exact(inference: Inference) -> Iterator[None]:
    """The arithmetic of the start: float64 wherever the model can."""
    with in_dtype(inference.float_type), torch.enable_grad():
        yield
