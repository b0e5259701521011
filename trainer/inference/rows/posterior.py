"""Latents of rows given what is observed of each row, at draws of the globals.

The numbers of a row have the density exp f(u) up to its integral. Of one number it is known on a grid
(`trainer.inference.rows.line`), of more by importance draws from the Gaussian around the row's mode, which are even
(Sobol) and have exactly its mean and covariance, so that a Gaussian posterior comes out exactly. The probability of a
state of a discrete latent is the derivative of the row's log evidence by what is added to the log-probability of the
state, so beside numbers it is averaged over their nodes.

Shapes: B rows, R draws of the globals, S nodes, d continuous numbers of a row, n numbers of a site, K states, Q levels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from trainer.inference.model.vmapped import CANNOT_BE_BATCHED, silent_vmap
from trainer.inference.rows.entries import entries_by_row
from trainer.inference.rows.integral import around_the_mode, even_normals
from trainer.inference.rows.line import Line, line_nodes
from trainer.inference.rows.marginal import Columns, Globals, Marginal, rows_of
from trainer.inference.rows.sites import other_plates, value_by_row
from trainer.inference.rows.sums import States, drawn_states, states_of

_SAME = 1e-6  # of a value, between draws of the globals


class Moments(NamedTuple):
    """Of a continuous latent, in its own space, over the draws of the globals; float64."""

    mean: Tensor
    """[B, n]."""
    sd: Tensor
    """[B, n]."""
    quantiles: Tensor
    """[Q, B, n]."""


class Nodes(NamedTuple):
    """Where the densities of rows are known."""

    u: Tensor
    """[S, R, B, d]."""
    weights: Tensor
    """[S, R, B]: of each node, with a sum of 1 for each row and draw."""
    values: dict[str, Tensor]
    """By site [S, R, B, n], in its own space."""
    line: Line | None
    """Of rows that have one number."""


@dataclass(frozen=True)
class RowPosterior:
    """Of B rows, at R draws of the globals."""

    marginal: Marginal
    columns: Columns
    at: Globals
    """[R, ...] each: latents outside the data plate, and those of rows that the guide holds."""
    draws: int = 1
    """R."""
    line_nodes: int = 41
    """S of rows that have one number."""
    points: int = 32
    """S / 2 of rows that have more: each point has its mirror image."""
    together: int | None = None
    """How many nodes are evaluated at a time; None: all."""

    @property
    def rows(self) -> int:
        """B."""
        return rows_of(self.columns).size

    def states(self) -> dict[str, States]:
        """The discrete latents."""
        if not self.marginal.sites.discrete:
            return {}
        return states_of(self._first(), self.marginal.plate)

    def entries(self) -> dict[str, Tensor | None]:
        """As `entries_by_row`, of every latent of the rows as it comes out."""
        trace, plate = self._first(), self.marginal.plate
        names = (*(each.name for each in self.marginal.sites.continuous), *self.marginal.sites.discrete)
        found = {name: entries_by_row(trace.nodes[name], plate) for name in names}
        return {
            name: None if real is None else real.reshape(len(real), *other_plates(trace.nodes[name], plate))
            for name, real in found.items()
        }

    @property
    def evaluations(self) -> int:
        """R S."""
        size = self.marginal.sites.size
        return self.draws * (1 if size == 0 else self.line_nodes if size == 1 else 2 * self.points)

    def once(self) -> None:
        """One of them, to see what it takes."""
        self._evaluate(self._draw(0), self._start()[0], {})

    def known(self) -> tuple[Nodes | None, dict[str, Tensor]]:
        """The nodes of the continuous latents, None where a row has none; and of each discrete one the probabilities of
        its states [B, K, other plates], float64, averaged over the draws.
        """
        nodes: Nodes | None
        states, start = self.states(), self._start()
        tilts = {
            name: start.new_zeros(len(each.values), *each.plates).requires_grad_() for name, each in states.items()
        }
        with torch.set_grad_enabled(bool(tilts)):
            if self.marginal.sites.continuous:
                nodes, evidence = self._nodes(tilts)
            else:
                nodes, evidence = None, self._joint(start, tilts)[0]
        if not tilts:
            return nodes, {}
        slopes = torch.autograd.grad(evidence.sum(), list(tilts.values()))
        shares = {
            name: (each.by_row(slope).double() / self.draws).clamp(0, 1)
            for (name, each), slope in zip(states.items(), slopes)
        }
        return nodes, shares

    def at_nodes(self) -> Nodes:
        """Those of the continuous latents alone."""
        return self._nodes({})[0]

    def _nodes(self, tilts: Mapping[str, Tensor]) -> tuple[Nodes, Tensor]:
        """With log p(y) [R, B], up to what nodes that stay where they are leave out."""
        start = self._start()
        shape = start.shape
        with torch.no_grad():
            steps = 2 * self.marginal.fineness.steps  # of rows that training has not seen
            normal = around_the_mode(lambda u: self._joint(u.view(shape), {})[0].flatten(), start.flatten(0, 1), steps)
            if shape[2] == 1:
                mode = normal.mode.view(shape)[..., 0]
                scale = normal.at(start.new_ones(1)).view(shape)[..., 0] - mode
                at, log_weights = line_nodes(self.line_nodes, start)
                u = (mode + at[:, None, None] * scale)[..., None]
                log_weights = log_weights[:, None, None].expand(-1, *shape[:2])
            else:
                e = even_points(self.draws, self.points, shape[2], start)
                u = torch.stack([normal.at(_of_rows(each, shape[1])).view(shape) for each in e.unbind(1)])
                log_weights = 0.5 * (e**2).sum(-1).T[..., None].expand(-1, *shape[:2])
        values, sites = self._each(u, tilts)
        logs = values + log_weights
        weights = torch.softmax(logs.detach().double(), 0)
        line = Line.of(mode, scale, weights) if shape[2] == 1 else None
        return Nodes(u, weights, sites, line), torch.logsumexp(logs, 0)

    def moments(self, nodes: Nodes, levels: Sequence[float]) -> dict[str, Moments]:
        """Of the continuous latents."""
        known = {} if nodes.line is None else self._quantiles(nodes.line, levels)
        found = {}
        for name, values in nodes.values.items():
            made = weighted(values, nodes.weights, () if name in known else levels)
            found[name] = made._replace(quantiles=known[name]) if name in known else made
        return found

    def _quantiles(self, line: Line, levels: Sequence[float]) -> dict[str, Tensor]:
        """[Q, B, n] of each site that is the same function of u at every draw of the globals."""
        both = sorted({*levels, *(1 - level for level in levels)})
        u = torch.stack([line.quantiles(level) for level in both])  # [levels, B]
        like = self._start()
        at = u.to(like)[:, None, :, None].expand(-1, *like.shape)
        _, values = self._each(at, {})
        found = {}
        for name, each in values.items():  # [levels, R, B, n]
            each = each.double()
            apart = (each - each[:, :1]).abs().amax()
            if float(apart) > _SAME * (1 + float(each.abs().amax())):
                continue
            rising = each[-1, 0] >= each[0, 0]
            below, above = (
                torch.stack([each[both.index(level), 0] for level in some])
                for some in (levels, [1 - level for level in levels])
            )
            found[name] = torch.where(rising, below, above)
        return found

    def drawn(self, nodes: Nodes, uniform: Tensor) -> Tensor:
        """u [R, B, d] for ``uniform`` [R, B] numbers, one for each row and draw: by the distribution function of rows
        that have one number, else one of the nodes by its weight.
        """
        if nodes.line is not None:
            return nodes.line.drawn(uniform)[..., None].to(nodes.u)
        chosen = (nodes.weights.cumsum(0) < uniform).sum(0).clamp(max=len(nodes.weights) - 1)
        index = chosen[None, ..., None].expand(1, *nodes.u.shape[1:])
        return nodes.u.gather(0, index)[0]

    def sites(self, number: int, u: Tensor | None) -> dict[str, Tensor]:
        """Of draw ``number``, the values of the latents of rows as the model takes them: the continuous ones at
        ``u`` [B, d], the discrete ones drawn from torch's own generator.
        """
        trace = self.marginal.factors(self.columns, self._draw(number), u)
        found: dict[str, Any] = {each.name: trace.nodes[each.name]["value"] for each in self.marginal.sites.continuous}
        if not self.marginal.sites.discrete:
            return found
        states = states_of(trace, self.marginal.plate)
        for name, drawn in drawn_states(trace).items():
            found[name] = states[name].values[drawn]
        return found

    def _first(self) -> poutine.Trace:
        return self.marginal.factors(self.columns, self._draw(0), self._start()[0])

    def _start(self) -> Tensor:
        """u = 0 [R, B, d]."""
        rows = rows_of(self.columns)
        shape = (self.draws, rows.size, self.marginal.sites.size)
        return torch.zeros(shape, dtype=rows.dtype, device=rows.valid.device)

    def _draw(self, number: int) -> Globals:
        return {name: each[number] for name, each in self.at.items()}

    def _evaluate(self, at: Globals, u: Tensor, tilts: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """log p(y, u) [B] of one draw at ``u`` [B, d], and the values of the sites there [B, n]."""
        trace = self.marginal.factors(self.columns, at, u)
        plate, sites = self.marginal.plate, self.marginal.sites.continuous
        values = {each.name: value_by_row(trace.nodes[each.name], plate) for each in sites}
        return self.marginal.density(trace, self.rows, tilts), values

    def _joint(self, u: Tensor, tilts: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """`_evaluate` at each draw, [R, B] at ``u`` [R, B, d]."""
        found: tuple[Tensor, dict[str, Tensor]] = _mapped(
            lambda at, u: self._evaluate(at, u, tilts), (self.at, u), None
        )
        return found

    def _each(self, u: Tensor, tilts: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """`_joint` at each node, [S, R, B] at ``u`` [S, R, B, d]."""
        with torch.set_grad_enabled(bool(tilts)):
            values, sites = _mapped(lambda u: self._joint(u, tilts), (u,), self.together)
        return values, {name: each.detach() for name, each in sites.items()}


def _mapped(work: Callable[..., Any], given: tuple[Any, ...], together: int | None) -> Any:
    """What ``work`` makes along the first axis of what is ``given``: by vmap where it can be."""
    try:
        with silent_vmap():
            return torch.vmap(work, chunk_size=together)(*given)
    except CANNOT_BE_BATCHED:
        pass
    count = len(next(iter(given[0].values())) if isinstance(given[0], dict) else given[0])
    some = [work(*(_at(each, number) for each in given)) for number in range(count)]
    return torch.stack([one for one, _ in some]), {
        name: torch.stack([each[name] for _, each in some]) for name in some[0][1]
    }


def _at(given: Any, number: int) -> Any:
    return {name: each[number] for name, each in given.items()} if isinstance(given, dict) else given[number]


def _of_rows(e: Tensor, rows: int) -> Tensor:
    """A point of each draw [R, d] for all of its rows, [R * B, d]."""
    return e[:, None].expand(-1, rows, -1).flatten(0, 1)


def even_points(draws: int, half: int, size: int, like: Tensor) -> Tensor:
    """[R, S, d]: ``half`` even points of a standard normal for each draw and their mirror images, no two draws the
    same, of mean 0 and covariance 1.
    """
    normal = even_normals(draws * half, size).view(draws, half, size)
    factor = torch.linalg.cholesky(normal.mT @ normal / half)
    normal = torch.linalg.solve_triangular(factor, normal.mT, upper=False).mT
    return torch.cat([normal, -normal], 1).to(like)


def weighted(values: Tensor, weights: Tensor, levels: Sequence[float]) -> Moments:
    """Of the mixture over draws of points ``values`` [S, R, B, n] with ``weights`` [S, R, B]; quantiles join the
    middles of the steps that the points make.
    """
    shape = values.shape[2:]
    values = values.double().reshape(values.shape[0] * values.shape[1], shape[0], -1)
    shares = (weights / weights.shape[1]).reshape(len(values), shape[0], 1)
    mean = (shares * values).sum(0)
    sd = (shares * (values - mean) ** 2).sum(0).sqrt()
    some = [_quantiles_of(each.T, shares[..., 0].T, levels) for each in values.unbind(-1)]
    return Moments(mean.view(shape), sd.view(shape), torch.stack(some, -1).view(len(levels), *shape))


def _quantiles_of(values: Tensor, shares: Tensor, levels: Sequence[float]) -> Tensor:
    """[Q, B] of points [B, T] that have ``shares`` [B, T] of 1: on the line through the middles of their steps."""
    if not levels:
        return values.new_zeros(0, len(values))
    order = torch.from_numpy(values.cpu().contiguous().numpy().argsort(1)).to(values.device)  # 8 times torch's speed
    ordered, steps = values.gather(1, order), shares.gather(1, order)
    below = steps.cumsum(1) - steps / 2
    wanted = values.new_tensor(list(levels)).expand(len(values), -1).contiguous()
    after = torch.searchsorted(below, wanted).clamp(1, below.shape[1] - 1)
    (x0, x1), (p0, p1) = ([each.gather(1, place) for place in (after - 1, after)] for each in (ordered, below))
    share = ((wanted - p0) / (p1 - p0)).nan_to_num(0.5).clamp(0, 1)
    return (x0 + share * (x1 - x0)).T
