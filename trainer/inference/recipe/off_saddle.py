"""Starts and rounds' ends that are no saddle, by the ELBO of a sample of rows at fixed draws and fixed scales.

The ELBO has no spike where the joint density has one (the scale of a centered hierarchy at zero), and is what training
raises: so it tells where there is no mode to start at, and with any number of latents. Shapes: P parameters, F of them
free: all but the covariance of the guide; D latents, m directions, R pairs of draws, E normals of a draw.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from trainer.inference.estimates.derivatives import hessian
from trainer.inference.guides.gaussian import GaussianView
from trainer.inference.model.noise import element_noise, mixed_seed
from trainer.inference.model.plates import Batch
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.optim.variance_reduction import Preconditioner
from trainer.inference.recipe import saddle
from trainer.inference.recipe.laplace import laplace_start
from trainer.inference.recipe.saddle import AT_START, Best, Loss, Search
from trainer.inference.step import Inference, in_dtype

Say = Callable[[str], None]
_FEW, _MANY = 2, 16  # pairs of a descent, and of what judges it
_ROWS = 2**18  # rows times pairs that one evaluation takes; at least 4 pairs judge
_NEGATIVE = 0.02  # of a curvature in guide sds, which is 1 where latents are independent
_ERRORS = 3.0  # standard errors
_MATRIX = 256  # parameters of a guide that draws nothing, up to which the curvature is a matrix


def start_of(
    inference: Inference, theta: Tensor, rows: Batch, seed: int, say: Say
) -> tuple[Tensor, Preconditioner | None]:
    """theta [P] to start at, and the coordinates to step in from there, as `laplace_start` has them where it has some.

    ``theta``: where the guide starts. It stays to the bit where it is no saddle and has no mode near it.
    """
    found = laplace_start(inference, theta, rows, say, seed)
    made, preconditioner = (theta, None) if found is None else found
    if made is theta:
        with suppress(NotImplementedError):  # an operation without a second derivative
            made = off_saddle(inference, theta, rows, seed, say)
    return made, preconditioner


@dataclass(frozen=True)
class Sampled:
    """Minus the ELBO of ``rows`` (one lane group), at the scale of all rows, as a function of the free parameters."""

    inference: Inference
    theta: Tensor
    rows: Batch
    view: GaussianView | None
    """None of a guide that draws nothing, whose parameters are all free."""

    @property
    def free(self) -> Tensor:
        """int64 [F]: where the free parameters lie in theta."""
        fixed = torch.zeros(len(self.theta), dtype=torch.bool)
        if self.view is not None:
            covariance = self.view.covariance.log_sd.start
            fixed[covariance : covariance + self.view.covariance.parameters] = True
        return (~fixed).nonzero()[:, 0]

    @property
    def at(self) -> Tensor:
        """The free parameters [F] of theta, float64."""
        return self.theta[self.free].double()

    @property
    def scale(self) -> Tensor:
        """[F]: the guide's sds for the latents, 1 for the others."""
        whole = torch.ones(len(self.theta), dtype=torch.float64)
        if self.view is not None:
            whole[self.view.loc] = self.view.sd(self.theta.double())
        return whole[self.free]

    @property
    def parts(self) -> Tensor:
        """bool [sites, F]: which are a site's locations, or a parameter's of a guide that draws nothing."""
        if self.view is None:
            places = torch.arange(len(self.theta))
            spans = self.inference.parameters.places.values()
            return torch.stack([(places >= span.start) & (places < span.stop) for span in spans])
        whole = torch.zeros(len(self.view.sites), len(self.theta), dtype=torch.bool)
        whole[:, self.view.loc] = self.view.parts
        return whole[:, self.free]

    @property
    def takes_a_matrix(self) -> bool:
        """Whether the curvature is taken as a matrix [F, F]."""
        if self.view is None:
            return len(self.theta) <= _MATRIX
        return self.view.size <= self.view.covariance.most

    def with_free(self, at: Tensor) -> Tensor:
        """theta [P] with other free parameters [F]."""
        return self.theta.to(at.dtype).index_copy(0, self.free, at)

    def pairs(self, most: int, least: int = 1) -> int:
        together = int(self.rows.batch_rows.clamp(min=1)) * self.inference.model.copies
        return max(least, min(most, _ROWS // together))

    def elbo(self, seed: int, pairs: int) -> Loss:
        """By that many antithetic pairs."""
        when, numbers = torch.zeros((), dtype=torch.int64), torch.arange(pairs)
        eps = element_noise(
            mixed_seed(seed, 0xE1B0, 0), when, numbers, self.inference.guide.noise_size[0], torch.float64
        )
        return self._loss(eps, ELBO("analytic", True, pairs), False)

    def center(self, likelihood: bool = False) -> Loss:
        """Minus the log joint, or the likelihood alone, at the location of the guide."""
        eps = torch.zeros(1, self.inference.guide.noise_size[0], dtype=torch.float64)
        return self._loss(eps, ELBO("monte_carlo", False), likelihood)

    def _loss(self, eps: Tensor, objective: ELBO, likelihood: bool) -> Loss:
        rows = self.rows.floats_as(self.inference.float_type)
        counted = [n for n, kind in enumerate(self.inference.kinds) if kind == "likelihood" or not likelihood]

        def loss(at: Tensor) -> Tensor:
            return -self.inference.of_sample(objective, self.with_free(at), eps, rows)[counted].sum()

        return loss


def sampled(inference: Inference, theta: Tensor, rows: Batch) -> Sampled | None:
    """None for a guide that draws from another distribution than a Gaussian, and where rows have noise of their own."""
    view, guide = inference.gaussian, inference.guide
    known = (view is not None or guide.still) and not guide.noise_size[1]
    return Sampled(inference, theta.detach().cpu(), rows, view) if known else None


def off_saddle(inference: Inference, theta: Tensor, rows: Batch, seed: int, say: Say) -> Tensor:
    """``theta`` [P], or where the best of several pushes leads, where it is a saddle by symmetry: where latents do not
    move although the ELBO rises at their sides, as it does at once or when all others are where they belong.
    """
    problem = sampled(inference, theta, rows)
    if problem is None:
        return theta
    with in_dtype(inference.float_type), torch.enable_grad():
        joint, likelihood, at = problem.center(), problem.center(likelihood=True), problem.at
        still = saddle.unmoved(joint, at)
        still &= saddle.matters(likelihood, at, seed, still)
        if not still.any():
            return theta
        loss, moves, stay = problem.elbo(seed, problem.pairs(_FEW)), (~still).double(), at
        if moves.any():
            stay = at + moves * saddle.descended(lambda change: loss(at + moves * change), torch.zeros_like(at))
        best = None
        for place in (at, stay) if moves.any() else (at,):
            ways = _falling(loss, place, problem.scale * still, seed), saddle.hidden(likelihood, place, seed, still)
            if best is None and (len(ways[0]) or ways[1].any()):
                best = _best(problem, loss, (place, stay), ways, seed)
    if best is None:
        return theta
    say(AT_START.format(best.sentence()))
    return problem.with_free(best.at).to(theta)


def falls_at(inference: Inference, theta: Tensor, rows: Batch, seed: int) -> Tensor:
    """Directions [m, F] in which minus the ELBO curves downwards at ``theta`` [P]; m = 0 at an optimum.

    By the mean curvature under the guide: all of it where the guide takes a matrix, what 32 products tell beyond. Fresh
    draws have to confirm it.
    """
    problem = sampled(inference, theta, rows)
    if problem is None:
        return theta.new_zeros(0, len(theta))
    with suppress(NotImplementedError):  # an operation without a second derivative
        return _confirmed(problem, seed)
    return problem.at.new_zeros(0, len(problem.at))


def _confirmed(problem: Sampled, seed: int) -> Tensor:
    with in_dtype(problem.inference.float_type), torch.enable_grad():
        at, scale = problem.at, problem.scale
        loss = problem.elbo(seed, problem.pairs(8))
        if problem.takes_a_matrix:
            curvature = torch.nan_to_num(hessian(loss, at))
            scale = scale if problem.view is not None else saddle.units(curvature.diagonal())
            values, vectors = torch.linalg.eigh(scale[:, None] * curvature * scale)
            found: Tensor = (vectors[:, values < -_NEGATIVE] * scale[:, None]).T
        else:
            found = _falling(loss, at, scale, seed, _NEGATIVE)
        confirmed = found[:1]
        for along in confirmed:
            curvatures = torch.stack([
                along @ saddle.product_at(problem.elbo(seed + 1 + number, 1), at)(along)
                for number in range(problem.pairs(_MANY, 4))
            ])  # fmt: skip
            error = curvatures.std() / len(curvatures) ** 0.5
            if not curvatures.mean() + _ERRORS * error < -_NEGATIVE / 2:
                return found[:0]
    return found


def left(inference: Inference, theta: Tensor, rows: Batch, directions: Tensor, seed: int) -> tuple[Tensor, Best | None]:
    """``theta`` [P] moved off a saddle along ``directions`` [m, F], to where the best of several pushes leads."""
    problem = sampled(inference, theta, rows)
    assert problem is not None
    with in_dtype(inference.float_type), torch.enable_grad():
        loss, none = problem.elbo(seed, problem.pairs(_FEW)), torch.zeros_like(problem.at, dtype=torch.bool)
        best = _best(problem, loss, (problem.at, problem.at), (directions, none), seed)
    return (theta, None) if best is None else (problem.with_free(best.at).to(theta), best)


def _best(
    problem: Sampled, loss: Loss, places: tuple[Tensor, Tensor], ways: tuple[Tensor, Tensor], seed: int
) -> Best | None:
    """Where the best push from the first of ``places`` [F] ends; None where none is better than the second, by fresh
    draws. ``ways``: directions [m, F], and what is pushed at random, bool [F].
    """
    (at, stay), (directions, unseen), fresh = places, ways, problem.elbo(seed + 1, problem.pairs(_MANY, 4))

    def start(number: int) -> Tensor:
        noise = saddle.normals(seed, number, 0, at)
        return (saddle.pushed(loss, at, directions, noise) if len(directions) else at) + unseen * noise.flip(0)

    def judge(end: Tensor) -> float:
        with torch.no_grad():
            return -float(fresh(end))

    search = Search(partial(saddle.descended, loss), judge, problem.parts)
    return saddle.best_of(search, at, directions, unseen, start, judge(stay))


def _falling(loss: Loss, at: Tensor, scale: Tensor, seed: int, least: float = 1e-3) -> Tensor:
    """Directions [m, F] of negative curvature among those of positive ``scale`` [F], as far as 32 products tell."""
    product = saddle.product_at(loss, at)
    values, vectors = saddle.lowest(
        lambda along: scale * product(scale * along), saddle.normals(seed, -2, 0, at) * (scale > 0)
    )
    found: Tensor = scale * vectors[values < -least]
    return found
