"""A fitted posterior: what a run found, to draw from, to predict with, to keep.

Shapes: N rows, R draws, Q quantiles.
"""

import inspect
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from trainer.data.packing.apply import available, check_columns, check_packed, rows_like
from trainer.data.shards.folder import ShardFolder, open_split
from trainer.data.shards.index import ROW_ID, Column, Index
from trainer.data.shards.splits import is_packed
from trainer.data.sources.memory import MemorySource
from trainer.data.sources.source import Source, open_source
from trainer.data.store import atomic_write
from trainer.errors import UserError, first_line
from trainer.inference.checks.observed import column_of
from trainer.inference.guides.mean_field import MEAN_FIELD
from trainer.inference.isolation import each_in_own_state, own_state
from trainer.inference.model.plates import Batch, arguments
from trainer.inference.model.ragged import of_plain, plain
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.setup import GuideFactory, guide_factory, set_up
from trainer.inference.step import Inference
from trainer.posterior.draws import counted_draws, draw, dtype_of, latent_draws, parameters_of, predicts_by
from trainer.posterior.fractions import refusing_fractions
from trainer.posterior.predictive import DRAWS, LEVELS, Prediction, joined, levels_of, predicted, rows_together
from trainer.posterior.summary import SiteSummary, summarize
from trainer.posterior.table import closing_table
from trainer.posterior.tensors import to_tensor

FORMAT = 1
_ROWS = 2048  # predicted at a time


@dataclass(frozen=True, repr=False)
class Posterior:
    """q(z) at its fitted parameters. Printed, or last in a notebook's cell, it shows the table of its latents."""

    inference: Inference
    theta: Tensor
    """[P]."""
    rows: Batch
    """A few rows of the training data, for models whose latents take their shapes from them."""
    index: Index
    """The columns of the training data, without shards."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """As metrics.json: elbo in nats with elbo_se, steps, epochs, seconds, why training stopped."""
    rhat: dict[str, np.ndarray] = field(default_factory=dict)
    """Between seeds, for every latent, where several were fitted (`between_seeds`)."""

    @own_state()
    def sample(self, num_draws: int = 1000, seed: int = 0) -> dict[str, np.ndarray]:
        """Independent draws [R, ...] of every latent outside the data plate, in the model's own (constrained) space.

        Deterministic sites that follow from these alone are among them (what a reparameterized latent was called).
        """
        numbers = range(counted_draws(num_draws))
        drawn = latent_draws(self.inference, self.theta, self.rows, seed, numbers)
        return {name: values.cpu().numpy() for name, values in drawn.items()}

    @own_state()
    def summary(self) -> list[SiteSummary]:
        """Mean, sd and quantiles of every latent, and the guide's own location and scale."""
        return summarize(self.inference, self.theta, self.rows)

    @own_state()
    def parameters(self) -> dict[str, np.ndarray]:
        """The model's own trained parameters (point estimates), as the model sees them: of its modules, and of
        `pyro.param`.
        """
        found = parameters_of(self.inference, self.theta, self.rows)
        return {name: value.detach().cpu().numpy() for name, value in found.items()}

    def predict(
        self, data: Any, num_draws: int = DRAWS, quantiles: Sequence[float] = LEVELS, seed: int = 0
    ) -> dict[str, Prediction]:
        """Every observed site at the rows of ``data`` (as for `fit`; it need not have the observed columns where the
        model's arguments have defaults). Raises UserError for data that lack a column or hold what was never packed.
        """
        parts: dict[str, list[Prediction]] = {}
        for _, found in self.predictions(data, num_draws, quantiles, seed):
            for name, each in found.items():
                parts.setdefault(name, []).append(each)
        return {name: joined(every) for name, every in parts.items()}

    def predictions(
        self,
        data: Any,
        num_draws: int = DRAWS,
        quantiles: Sequence[float] = LEVELS,
        seed: int = 0,
        progress: Callable[[int, int | None], None] | None = None,
        say: Callable[[str], None] = warnings.warn,
    ) -> Iterator[tuple[np.ndarray, dict[str, Prediction]]]:
        """`predict` a few thousand rows at a time, fewer of many numbers, with their row numbers [N]: memory does not
        grow with N.

        ``progress(rows_done, rows_total)`` is called after each; ``say`` is told of a site that has no mean.
        """
        draws, levels = counted_draws(num_draws), levels_of(quantiles)
        return each_in_own_state(self._predictions(data, draws, levels, seed, progress, say))

    def _predictions(
        self,
        data: Any,
        num_draws: int,
        quantiles: Sequence[float],
        seed: int,
        progress: Callable[[int, int | None], None] | None,
        say: Callable[[str], None],
    ) -> Iterator[tuple[np.ndarray, dict[str, Prediction]]]:
        total, tables = self._columns(data, say)
        words, done, doubted = self._words(), 0, set[str]()
        for batch in self._batches(tables):
            with refusing_fractions(self.index, batch):
                together = rows_together(self.inference, self.theta, batch, num_draws, seed)
            for rows in torch.arange(batch.size).split(together):
                part = batch.at(rows)
                with refusing_fractions(self.index, part):
                    found = predicted(self.inference, self.theta, part, num_draws, quantiles, seed)
                for name, each in found.items():
                    if name not in doubted and np.isnan(each.mean).any():
                        say(f'site "{name}" has no mean: mean and sd are blank; its quantiles tell where it lies.')
                        doubted.add(name)
                assert part.row_id is not None
                yield part.row_id.numpy(), {name: each.named(words.get(name)) for name, each in found.items()}
                done += part.size
                if progress is not None:
                    progress(done, total)

    def _words(self) -> dict[str, tuple[str, ...]]:
        """What the classes of observed sites are called that observe categorical columns."""
        nodes = draw(self.inference, self.theta, self.rows, 0, 0).trace.nodes
        found = {}
        for name, kind in zip(self.inference.sites, self.inference.kinds):
            value = nodes[name]["value"] if kind == "likelihood" else None
            column = column_of(value, self.rows.columns) if isinstance(value, Tensor) else None
            vocabulary = None if column is None else self.index.column(column).vocabulary
            if vocabulary is not None:
                found[name] = tuple(map(str, vocabulary))
        return found

    def _batches(self, tables: Iterable[dict[str, np.ndarray]]) -> Iterator[Batch]:
        """The rows of ``tables`` in order, as the model takes them."""
        dtype = self.theta.dtype
        for columns in tables:
            tensors = {name: to_tensor(values, dtype) for name, values in columns.items()}
            row_id = tensors.pop(ROW_ID)
            yield Batch.whole(tensors, row_id)

    def _columns(self, data: Any, say: Callable[[str], None]) -> tuple[int, Iterator[dict[str, np.ndarray]]]:
        """How many rows there are, and the rows, in tables of a few thousand; ``say`` is told of columns they lack."""
        folder = _shard_folder(data)
        if folder is not None:
            names = arguments(self.inference.model.fn, [column.name for column in folder.index.columns])
            check_packed(self.index, folder.index, names)
            return folder.num_rows, _packed(folder, [*names, ROW_ID])
        source: Source = open_source(data) if isinstance(data, (str, Path)) else MemorySource(data)
        check_columns(self.index, source, self._required())
        taken = arguments(self.inference.model.fn, available(self.index, source))
        fitted = arguments(self.inference.model.fn, [column.name for column in self.index.columns])
        for name in fitted:
            if name not in (ROW_ID, *taken) and predicts_by(self.inference, self.theta, self.rows, name):
                say(f"{source.name} has no column {name}, which the model was fitted with: it takes its default there.")
        return source.num_rows, rows_like(self.index, source, taken, _ROWS)

    def _required(self) -> list[str]:
        """The columns without which the model cannot be called."""
        fn = self.inference.model.fn
        parameters = inspect.signature(fn.forward if isinstance(fn, torch.nn.Module) else fn).parameters
        packed = {column.name for column in self.index.columns}
        return [name for name, each in parameters.items() if name in packed and each.default is each.empty]

    @own_state()
    def save(self, path: str | Path) -> None:
        """Writes one file, whole or not at all: the parameters, the few rows, the columns' description, the metrics."""
        with atomic_write(Path(path)) as file:
            torch.save(self.content(), file)

    def content(self) -> dict[str, Any]:
        """What `save` writes: tensors, numbers and strings."""
        inference = self.inference
        facts = {
            "plate": inference.model.plate,
            "num_obs": inference.num_obs,
            "objective": {"kl": inference.objective.kl},
            "sites": inference.sites,
            "shapes": {name: list(shape) for name, shape in inference.parameters.shapes.items()},
            "metrics": self.metrics,
            "columns": [asdict(column) for column in self.index.columns],
            "meta": self.index.meta,
        }
        return {
            "format": FORMAT,
            "theta": self.theta.detach().cpu().clone(),
            "rows": {name: plain(column.cpu().clone()) for name, column in self.rows.columns.items()},
            "row_id": None if self.rows.row_id is None else self.rows.row_id.cpu().clone(),
            "facts": json.dumps(facts),
        }

    @classmethod
    def load(cls, path: str | Path, model: Callable[..., Any], guide: Any = "mean_field") -> "Posterior":
        """What `save` wrote, of the same ``model`` and ``guide``. Runs no code from the file.

        Raises UserError for a file that is none, or whose parameters are not those of the model.
        """
        return cls.of_factory(path, model, lambda columns, plate: guide_factory(guide, columns, plate))

    @classmethod
    @own_state()
    def of_factory(
        cls, path: str | Path, model: Callable[..., Any], factory: Callable[[tuple[str, ...], str], GuideFactory]
    ) -> "Posterior":
        """`load`, the guide made by ``factory(columns, plate)``."""
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            json.loads(content["facts"])
        except FileNotFoundError:
            raise UserError(f"{path} does not exist: give the file that Posterior.save wrote.") from None
        except Exception as error:
            raise UserError(f"{path} is not a saved posterior ({first_line(error)}).") from error
        if content["format"] != FORMAT:
            raise UserError(f"{path} has format {content['format']} where this version reads {FORMAT}.")
        return cls.of_content(content, model, factory, str(path))

    @classmethod
    @own_state()
    def of_content(
        cls,
        content: dict[str, Any],
        model: Callable[..., Any],
        factory: Callable[[tuple[str, ...], str], GuideFactory],
        name: str = "the checkpoint",
    ) -> "Posterior":
        """From `content`, the guide made by ``factory(columns, plate)``.

        Raises UserError, in which the content is called ``name``, where its parameters are not those of the model.
        """
        facts = json.loads(content["facts"])
        columns = tuple(Column(**{**each, "shape": tuple(each["shape"])}) for each in facts["columns"])
        known = {name: of_plain(each) for name, each in content["rows"].items()}
        rows = Batch.whole(known, content["row_id"], facts["num_obs"])
        with dtype_of(content["theta"]):
            inference, _ = set_up(
                model,
                factory(tuple(column.name for column in columns if column.name != ROW_ID), facts["plate"]),
                rows,
                facts["num_obs"],
                ELBO(**facts["objective"]),
                plate=facts["plate"],
                global_sites=facts["sites"],
            )
        shapes = {name: list(shape) for name, shape in inference.parameters.shapes.items()}
        if shapes != facts["shapes"]:
            raise UserError(
                f"{name} holds the parameters {facts['shapes']} and the model has {shapes}: give the model and guide "
                "that were fitted."
            )
        return cls(inference, content["theta"], rows, Index(columns, (), 0, "train", facts["meta"]), facts["metrics"])

    def __repr__(self) -> str:
        console = Console(width=100, color_system=None, force_jupyter=False)
        with console.capture() as captured:
            console.print(closing_table(self.summary(), parameters_of(self.inference, self.theta, self.rows)))
            if self.inference.guide.kind != MEAN_FIELD:
                console.print(f"guide: {self.inference.guide.kind}")
        return captured.get()


def _packed(folder: ShardFolder, names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    for block, count in enumerate(folder.block_rows.tolist()):
        columns = {name: folder.read_block(block, name) for name in names}
        for first in range(0, count, _ROWS):
            yield {name: column[first : first + _ROWS] for name, column in columns.items()}


def _shard_folder(data: Any) -> ShardFolder | None:
    """``data`` as packed rows, or None where it is a table."""
    if isinstance(data, ShardFolder):
        return data
    if isinstance(data, (str, Path)) and is_packed(data):
        return open_split(data, "train")
    return None
