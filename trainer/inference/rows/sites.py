"""What a row of a model has of its own: latents inside the data plate, found once on the first rows.

Shapes: B rows, d continuous numbers of a row in unconstrained space.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, cast

from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor
from torch.distributions import biject_to

from trainer.errors import UserError, counted
from trainer.inference.model.latents import AtZero, Site, is_deterministic, is_discrete, is_latent
from trainer.inference.model.plates import Batch, PlatedModel, inside

_MOST_STATES = 2**16  # of a site
MOST_NUMBERS = 16  # of a row


class NotIntegrable(UserError):
    """A latent of the rows that cannot be summed or integrated out."""


@dataclass(frozen=True)
class RowLatent:
    """A continuous latent of each row."""

    name: str
    shape: tuple[int, ...]
    """Of the unconstrained values of all rows, 0 where the axis of the rows is."""
    axis: int
    """That of the rows, counted from the end."""
    start: int
    """Where the site begins among the d numbers."""

    @property
    def size(self) -> int:
        return math.prod(n for place, n in enumerate(self.shape) if place - len(self.shape) != self.axis)

    def of(self, u: Tensor) -> Tensor:
        """The site's unconstrained values, of ``u`` [B, d]."""
        own = u[:, self.start : self.start + self.size]
        others = [n for place, n in enumerate(self.shape) if place - len(self.shape) != self.axis]
        return own.reshape(len(u), *others).movedim(0, len(self.shape) + self.axis)


@dataclass(frozen=True)
class RowSites:
    """The latents of a row, and what enumerating the discrete ones takes."""

    continuous: tuple[RowLatent, ...]
    discrete: tuple[str, ...]
    observed: tuple[str, ...]
    """The observed sites inside the data plate, which the rows' density stands for."""
    nesting: int
    """How many axes plates take, at the most."""
    held: tuple[RowLatent, ...] = ()
    """The continuous ones that the guide holds, which are none of `continuous`."""
    states: float = 1.0
    """The product of the numbers of states of the discrete sites."""

    @property
    def kept(self) -> tuple[str, ...]:
        """The names of those that the guide holds."""
        return tuple(each.name for each in self.held)

    bound: bool = False
    """Whether the continuous ones have a factorized Gaussian in each row, instead of being integrated out."""

    def left_to_the_guide(self) -> "RowSites":
        """With the continuous ones."""
        return replace(self, continuous=(), held=self.continuous)

    def refuse_many(self) -> None:
        """Raises NotIntegrable for more than 16 numbers to be integrated in a row."""
        if self.size > MOST_NUMBERS:
            names = ", ".join(f'"{each.name}" ({each.size:,})' for each in self.continuous)
            raise NotIntegrable(
                f"each row has {self.size:,} numbers to integrate out, {names}, and at most {MOST_NUMBERS} can be: "
                "leave guide.rows=auto, which gives them an encoder, or make the entries of a row rows of their own."
            )

    @property
    def size(self) -> int:
        """d."""
        return sum(each.size for each in self.continuous)

    def sentence(self) -> str:
        """What is done with them, for the log."""
        said = []
        if self.continuous:
            names = ", ".join(each.name for each in self.continuous)
            way = "in a factorized Gaussian of each row" if self.bound else "of each row integrated out"
            said.append(f"{names} {way} ({counted(self.size, 'number')})")
        if self.discrete:
            some = [*self.discrete[:3], "..."] if len(self.discrete) > 4 else list(self.discrete)
            said.append(f"{', '.join(some)} of each row summed out")
        return "; ".join(said)

    def __bool__(self) -> bool:
        return bool(self.continuous or self.discrete)


class AtFirst(Messenger):
    """Gives discrete latents in the data ``plate`` their first state, so that none is drawn; ``outside``: and others
    their last one, in which an indicator is on.
    """

    def __init__(self, plate: str, outside: bool = True):
        super().__init__()
        self.plate, self.outside = plate, outside

    def _pyro_sample(self, msg: Message[..., Any]) -> None:
        fn, within = cast(Any, msg["fn"]), inside(msg, self.plate)
        if is_latent(msg) and not msg["done"] and is_discrete(fn) and (within or self.outside):
            state = every_state(str(msg["name"]), fn)[0 if within else -1]
            msg["value"], msg["done"] = state.expand(fn.shape()), True


def row_sites(model: PlatedModel, batch: Batch) -> RowSites:
    """The latents inside the data plate of ``model``. Raises NotIntegrable for one that cannot be summed out."""
    with AtFirst(model.plate), AtZero(batch.dtype, batch.valid.device):
        trace = poutine.trace(model).get_trace(batch)
    sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
    own = [site for site in sites if is_latent(site) and inside(site, model.plate)]
    discrete = [site for site in own if is_discrete(site["fn"])]
    states = math.prod(float(len(every_state(str(site["name"]), site["fn"]))) for site in discrete)
    continuous: list[RowLatent] = []
    for site in own:
        if not is_discrete(site["fn"]) and not is_deterministic(site):
            continuous.append(_row_latent(site, model.plate, sum(each.size for each in continuous)))
    observed = [
        str(site["name"])
        for site in sites
        if site["is_observed"] and inside(site, model.plate) and not is_deterministic(site)
    ]
    dims = [-frame.dim for site in sites for frame in site["cond_indep_stack"] if frame.dim is not None]
    return RowSites(
        tuple(continuous),
        tuple(str(site["name"]) for site in discrete),
        tuple(observed),
        max(dims, default=0),
        states=states,
    )


def _row_latent(site: Site, plate: str, start: int) -> RowLatent:
    shape = tuple(biject_to(site["fn"].support).inverse_shape(site["fn"].shape()))
    events = len(shape) - len(site["fn"].batch_shape)
    (frame,) = [each for each in site["cond_indep_stack"] if each.name == plate]
    axis = frame.dim - events
    return RowLatent(str(site["name"]), (*shape[:axis], 0, *shape[len(shape) + axis + 1 :]), axis, start)


def frames_of(site: Site) -> list[Any]:
    """The plates of a site that have an axis, from the left."""
    return sorted((frame for frame in site["cond_indep_stack"] if frame.vectorized), key=lambda frame: frame.dim)


def other_plates(site: Site, plate: str) -> list[int]:
    """The sizes of the plates of a site beside ``plate``, from the left."""
    return [frame.size for frame in frames_of(site) if frame.name != plate]


def value_by_row(site: Site, plate: str) -> Tensor:
    """The value of a latent of rows [B, n]: n by its other plates and its event."""
    (frame,) = [each for each in site["cond_indep_stack"] if each.name == plate]
    events = len(site["fn"].event_shape)
    value: Tensor = site["value"].movedim(frame.dim - events, 0)
    return value.reshape(len(value), *other_plates(site, plate), *value.shape[value.dim() - events :])


def every_state(name: str, fn: Any) -> Tensor:
    """All values of a discrete site."""
    try:
        states: Tensor = fn.enumerate_support(expand=False)
    except NotImplementedError:
        raise NotIntegrable(
            f'latent site "{name}" is a {type(fn).__name__}, which has no end of states to sum over: bound it by a '
            "Categorical or Binomial, or observe it."
        ) from None
    if len(states) > _MOST_STATES:
        raise NotIntegrable(
            f'latent site "{name}" has {len(states):,} states, and at most {_MOST_STATES:,} are summed.'
        )
    return states
