"""The data plate: a model written for data in memory, evaluated on a minibatch as the full data would have it.

The handler runs inside the model's own call (`PlatedModel`), because a guide's prototype blocks handlers outside it.
Inside the data plate every site's scale is multiplied by N / (rows of the global batch), and padded rows are masked.
Source of the scaling: Hoffman, Blei, Wang and Paisley, "Stochastic variational inference", JMLR 14 (2013), eq. 31.

Shapes: K steps of a chunk; A lane groups of this rank; B rows of a group (padding included), the first `valid` of
which count.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from trainer.errors import UserError
from trainer.inference.model.arguments import arguments
from trainer.inference.model.promotion import Promoting
from trainer.inference.model.ragged import Column, each_tensor
from trainer.inference.model.supports import harmless

WEIGHT = "weight"


class Batch(NamedTuple):
    """Rows on their way from the reader to the model: of a chunk of K steps, of a step's A lane groups or of one group.

    The tensors have the axes [K, A, B], [A, B] or [B] before their own. Padded rows repeat a real row, so nothing that
    they compute is infinite.
    """

    columns: dict[str, Column]
    """Each [..., B, ...]."""
    valid: Tensor
    """int64 [K, A], [A] or []: how many rows of a group, from the first, count."""
    batch_rows: Tensor
    """int64 [K] or []: valid rows of the global batch, over all groups and ranks."""
    row_id: Tensor | None = None
    """int64 [..., B]: the rows' numbers in the source, where the guide has local latents."""
    num_obs: float | Tensor | None = None
    """N, of the rows of a group that a model is to see."""

    @classmethod
    def whole(cls, columns: dict[str, Column], row_id: Tensor | None = None, num_obs: float | None = None) -> "Batch":
        """One group's rows, all of which count, of ``num_obs`` (None: of themselves, at scale 1)."""
        first = next(iter(columns.values()))
        rows = torch.tensor(len(first), device=first.device)
        return cls(columns, rows, rows, row_id, len(first) if num_obs is None else num_obs)

    @property
    def scale(self) -> Tensor:
        """float64 []: N / (valid rows of the global batch)."""
        assert self.num_obs is not None
        return self.num_obs / self.batch_rows.double()

    @property
    def size(self) -> int:
        """Rows of a group, padding included."""
        return len(next(iter(self.columns.values())))

    def slot(self, k: int) -> "Batch":
        """Step ``k`` of a chunk, or group ``k`` of a step."""
        rows = self.batch_rows[k] if self.batch_rows.dim() else self.batch_rows
        row_id = None if self.row_id is None else self.row_id[k]
        return self._replace(
            columns={n: c[k] for n, c in self.columns.items()}, valid=self.valid[k], batch_rows=rows, row_id=row_id
        )

    def part(self, first: int, stop: int) -> "Batch":
        """Steps [first, stop) of a chunk, sharing memory."""
        return self.map(lambda each: each[first:stop])

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Every tensor changed."""
        row_id = None if self.row_id is None else change(self.row_id)
        columns = {name: each_tensor(column, change) for name, column in self.columns.items()}
        return self._replace(
            columns=columns, valid=change(self.valid), batch_rows=change(self.batch_rows), row_id=row_id
        )

    def at(self, index: Tensor) -> "Batch":
        """The rows ``index`` of a group, all of which count, at scale 1."""
        columns = {name: column[index] for name, column in self.columns.items()}
        return Batch.whole(columns, None if self.row_id is None else self.row_id[index])

    def as_group(self) -> "Batch":
        """The one lane group of a step."""
        columns = {name: column[None] for name, column in self.columns.items()}
        return Batch(columns, self.valid[None], self.valid, None)

    def floats_as(self, dtype: torch.dtype) -> "Batch":
        """With its floating columns in ``dtype``."""
        columns = {n: c.to(dtype) if c.is_floating_point() else c for n, c in self.columns.items()}
        return self._replace(columns=columns)

    @property
    def dtype(self) -> torch.dtype:
        """float64 where a column is, else torch's default."""
        wide = any(column.dtype == torch.float64 for column in self.columns.values())
        return torch.float64 if wide else torch.get_default_dtype()


class WrongSize(UserError):
    """The data plate is declared with a ``size`` that is not the batch's."""

    def __init__(self, plate: str, size: int, rows: int):
        series = "; where it takes series or groups, make each of them one row (svi shard group_by=COLUMN)"
        super().__init__(
            f'plate("{plate}") takes {size} rows where the batch has {rows}: '
            f'write pyro.plate("{plate}", len(x)) with a column x{series if size < rows else ""}.'
        )
        self.plate, self.size, self.rows = plate, size, rows


class DataPlate(Messenger):
    """Gives the plate ``name`` its indices, its scale and its mask for one batch, and each row its ``weight`` [B]."""

    def __init__(self, name: str, batch: Batch, weight: Tensor | None = None):
        super().__init__()
        self.name, self.batch, self.scale, self.weight = name, batch, batch.scale, weight

    def _process_message(self, msg: Message[..., Any]) -> None:
        if isinstance(msg["fn"], _Subsample):
            if msg["name"] == self.name:
                self._subsample(msg)
            return
        if msg["type"] != "sample":
            return
        for frame in msg["cond_indep_stack"]:
            if frame.name == self.name:
                self._scale_and_mask(msg, frame)

    def _pyro_post_param(self, msg: Message[..., Any]) -> None:
        event_dim = msg["kwargs"].get("event_dim")
        for frame in msg["cond_indep_stack"]:
            if frame.name == self.name and event_dim is not None and frame.dim is not None:
                value: Any = msg["value"]
                shape, dim = value.shape, frame.dim - event_dim
                if len(shape) >= -dim and shape[dim] != 1:
                    raise UserError(
                        f'pyro.param "{msg["name"]}" has one value per row of plate "{self.name}", which would be '
                        "another row's at the next step: give the rows a network (an amortized guide), or index a "
                        "table that is declared outside the plate by a column."
                    )

    def _subsample(self, msg: Message[..., Any]) -> None:
        fn: Any = msg["fn"]
        rows = self.batch.size
        if msg["value"] is not None:
            raise UserError(
                f'plate("{self.name}", ..., subsample=...) chooses its own rows: drop subsample=, '
                "the trainer gives the model its rows."
            )
        declared = fn.size if fn.subsample_size is None else fn.subsample_size
        if declared != rows and fn.subsample_size not in (None, fn.size):
            raise UserError(
                f'plate("{self.name}", ..., subsample_size={declared}) draws its own rows: write '
                f'pyro.plate("{self.name}", len(x)) with a column x, the trainer gives the model its rows.'
            )
        if declared != rows:
            raise WrongSize(self.name, int(declared), rows)
        indices = torch.arange(rows, device=self.batch.valid.device)
        msg["value"] = indices if fn.size == rows else indices.as_subclass(_ForeignIndices)
        msg["done"] = True

    def _scale_and_mask(self, msg: Message[..., Any], frame: Any) -> None:
        if frame.dim is None:
            raise UserError(
                f'plate("{self.name}") is used as a loop around site "{msg["name"]}": '
                f'write `with pyro.plate("{self.name}", len(x)):` and use whole columns; where a row depends on those '
                "before it, make the whole series one row (svi shard group_by=COLUMN)."
            )
        if frame.size != self.batch.size:
            raise UserError(
                f'plate("{self.name}") has no size at site "{msg["name"]}": '
                f'write pyro.plate("{self.name}", len(x)) with a column x.'
            )
        declared = (frame.full_size or frame.size) / frame.size  # what Pyro has put into the scale already
        msg["scale"] = msg["scale"] * (self.scale / declared)
        along = (-1,) + (1,) * (-frame.dim - 1)
        mask = (torch.arange(frame.size, device=self.batch.valid.device) < self.batch.valid).view(along)
        if self.weight is not None:
            msg["scale"] = msg["scale"] * self.weight.view(along)
            mask = mask & (self.weight > 0).view(along)  # 0 times an infinite density is not a number
        partly = self.weight is not None or msg["mask"] is not None
        msg["mask"] = counts = mask if msg["mask"] is None else mask & msg["mask"]
        if partly and msg["is_observed"] and isinstance(msg["value"], Tensor):
            msg["value"] = harmless(msg["fn"], msg["value"], counts)


class _ForeignIndices(Tensor):
    """Indices of a plate declared with N rows: they number the batch, so indexing anything with them is a mistake."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("__len__", "size", "__get__", "dim"):
            return super().__torch_function__(func, types, args, kwargs or {})
        raise UserError(
            "the model indexes with the data plate's own indices, but its columns are the batch already: "
            'use the columns as they are, in pyro.plate("data", len(x)).'
        )


class PlatedModel:
    """A model (or guide) as a callable of one :class:`Batch`, under the data plate's handler.

    A column `weight` that the callable does not take for itself says how many observations a row stands for: what is
    inside the data plate counts that many times. ``like``: the callable whose arguments it takes, where its own do not
    tell them. ``what``: what it is called, a model or a guide.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        columns: Iterable[str],
        plate: str = "data",
        like: Callable[..., Any] | None = None,
        what: str = "model",
    ):
        columns = tuple(columns)
        self.fn, self.plate = fn, plate
        self.numbers = 1
        """How many the largest tensor has for each row while states are enumerated."""
        self.sites: Any = None
        """What is integrated out of each row (`trainer.inference.rows.sites.RowSites`), None where nothing is."""
        self.encoded: tuple[Any, ...] = ()
        """The latents of rows that an encoder holds (`trainer.inference.rows.sites.RowLatent`)."""
        self.own = arguments(like or fn, columns, what)
        self.weighted = WEIGHT in columns and WEIGHT not in self.own
        self.arguments = (*self.own, WEIGHT) if self.weighted else self.own
        """The columns that a batch has to hold."""

    @property
    def evaluations(self) -> int:
        """About how many evaluations of the user's model one of this takes."""
        return 1

    @property
    def copies(self) -> int:
        """How many rows without latents of their own take as much memory as one does."""
        return 1

    @property
    def fineness(self) -> Any:
        """How finely rows are integrated (`trainer.inference.rows.integral.Fineness`); None where nothing is, or in
        closed form.
        """
        return None

    def refine(self, fineness: Sequence[int] | None) -> None:
        """Integrates rows so finely from now on, where they are integrated; None: as before."""

    @property
    def generative(self) -> "PlatedModel":
        """The model as the user wrote it, latents of rows included."""
        return self

    @property
    def of_globals(self) -> "PlatedModel":
        """This without the rows' density, where that takes long and only latents of the guide are wanted."""
        return self

    @property
    def at_first(self) -> "PlatedModel":
        """`generative`, in which nothing of a row is drawn."""
        return self

    def __call__(self, batch: Batch) -> Any:
        own = {name: batch.columns[name] for name in self.own if name in batch.columns}  # predictions may lack some
        whole = any(isinstance(column, Tensor) and not column.is_floating_point() for column in own.values())
        weight = batch.columns.get(WEIGHT) if self.weighted else None
        # A mode is a detour for every operation, so only a model with such columns gets one.
        with DataPlate(self.plate, batch, weight), Promoting() if whole else nullcontext():
            return self.fn(**own)


def inside(site: Message[..., Any] | dict[str, Any], plate: str) -> bool:
    """Whether ``site`` of a trace stands in the data plate."""
    return any(frame.name == plate for frame in site["cond_indep_stack"])
