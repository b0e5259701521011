"""A fitted posterior: what a run found, to draw from, to predict with, to keep.

Shapes: N rows, R draws, Q quantiles.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from trainer.data.shards.index import ROW_ID, Column, Index
from trainer.data.store import atomic_write
from trainer.errors import UserError, first_line
from trainer.inference.checks.observed import column_of
from trainer.inference.guides.mean_field import MEAN_FIELD
from trainer.inference.isolation import each_in_own_state, own_state
from trainer.inference.model.plates import Batch
from trainer.inference.model.ragged import of_plain, plain
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.rows.options import RowOptions
from trainer.inference.setup import GuideFactory, guide_factory, set_up
from trainer.inference.step import Inference
from trainer.posterior.draws import counted_draws, draw, dtype_of, latent_draws, parameters_of, predicts_by
from trainer.posterior.fractions import refusing_fractions
from trainer.posterior.latents import DRAWS as LATENT_DRAWS
from trainer.posterior.latents import Latents, RowLatents, are_given, drawn_latents, follow_from_rows
from trainer.posterior.new_rows import NewRows, Progress, new_rows
from trainer.posterior.predictive import (
    ASKED,
    DRAWS,
    LEVELS,
    Asked,
    OfRows,
    Prediction,
    joined,
    levels_of,
    predicted,
    rows_together,
)
from trainer.posterior.summary import SiteSummary, summarize
from trainer.posterior.table import closing_table

FORMAT = 1


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
        self,
        data: Any,
        num_draws: int = DRAWS,
        quantiles: Sequence[float] = LEVELS,
        seed: int = 0,
        latents: OfRows = "auto",
    ) -> dict[str, Prediction]:
        """Every observed site at the rows of ``data`` (as for `fit`; it need not have the observed columns where the
        model's arguments have defaults). ``latents`` of rows: "posterior", given what is observed of each row; "prior";
        "auto": the former where ``data`` has all that is observed.

        Raises UserError for data that lack a column or hold what was never packed.
        """
        found = [each for _, each in self.predictions(data, Asked(num_draws, quantiles, seed, latents))]
        return {name: joined([each[name] for each in found]) for name in (found[0] if found else ())}

    def predictions(
        self,
        data: Any,
        asked: Asked = ASKED,
        progress: Progress | None = None,
        say: Callable[[str], None] = warnings.warn,
        told: Callable[[str], None] | None = None,
    ) -> Iterator[tuple[np.ndarray, dict[str, Prediction]]]:
        """`predict` a few thousand rows at a time, fewer of many numbers, with their row numbers [N]: memory does not
        grow with N.

        ``progress(rows_done, rows_total)`` is called after each; ``say`` is told of a site that has no mean, and
        ``told`` where latents of rows come from.
        """
        asked = asked._replace(num_draws=counted_draws(asked.num_draws), quantiles=levels_of(asked.quantiles))
        return each_in_own_state(self._predictions(data, asked, progress, say, told))

    def _predictions(
        self,
        data: Any,
        asked: Asked,
        progress: Progress | None,
        say: Callable[[str], None],
        told: Callable[[str], None] | None,
    ) -> Iterator[tuple[np.ndarray, dict[str, Prediction]]]:
        rows = self._rows(data, say)
        words, doubted, given = self._words(), set[str](), None
        for batch in rows.watched(progress):
            with refusing_fractions(self.index, batch):
                together = rows_together(self.inference, self.theta, batch, asked.num_draws, asked.seed)
            if given is None:
                given = are_given(self.inference, self.theta, batch, asked.latents, rows.lacks)
                if told is not None and follow_from_rows(self.inference):
                    told(f"latents of rows: {'given what is observed of each row' if given else 'from their prior'}")
            for some in torch.arange(batch.size).split(together):
                part = batch.at(some)
                latents = drawn_latents(self.inference, self.theta, part, asked, given)
                with refusing_fractions(self.index, part):
                    found = predicted(self.inference, self.theta, part, asked, latents)
                for name, each in found.items():
                    if name not in doubted and each.has_no_mean:
                        say(f'site "{name}" has no mean: mean and sd are blank; its quantiles tell where it lies.')
                        doubted.add(name)
                assert part.row_id is not None
                yield part.row_id.numpy(), {name: each.named(words.get(name)) for name, each in found.items()}

    def latents(
        self, data: Any, draws: int = LATENT_DRAWS, quantiles: Sequence[float] = LEVELS, seed: int = 0
    ) -> Latents:
        """Every latent of rows at the rows of ``data`` (as for `fit`), given what is observed of each row and averaged
        over ``draws`` of the other latents.

        Raises UserError where the model has none, and for data that lack an observed column.
        """
        levels = levels_of(quantiles)
        return Latents.of(list(self.latents_by_part(data, Asked(draws, levels, seed))), levels)

    def latents_by_part(
        self,
        data: Any,
        asked: Asked,
        progress: Progress | None = None,
        say: Callable[[str], None] = warnings.warn,
    ) -> Iterator[tuple[np.ndarray, dict[str, Prediction]]]:
        """`latents` some rows at a time, with their row numbers, as `predictions`."""
        asked = asked._replace(num_draws=counted_draws(asked.num_draws), quantiles=levels_of(asked.quantiles))
        return each_in_own_state(self._latents_by_part(data, asked, progress, say))

    def _latents_by_part(
        self, data: Any, asked: Asked, progress: Progress | None, say: Callable[[str], None]
    ) -> Iterator[tuple[np.ndarray, dict[str, Prediction]]]:
        find = RowLatents(self.inference, self.theta, self.rows, asked)
        yield from find.by_part(self._rows(data, say), self.index, progress)

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

    def _rows(self, data: Any, say: Callable[[str], None]) -> NewRows:
        """The rows of ``data``; ``say`` is told of columns that they lack and that tell something of others."""
        rows = new_rows(self.inference.model.generative.fn, self.index, self.theta.dtype, data)
        for name in rows.lacking:
            if predicts_by(self.inference, self.theta, self.rows, name):
                say(f"{rows.name} has no column {name}, which the model was fitted with: it takes its default there.")
        return rows

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
            "rows": asdict(inference.rows),
            "sites": inference.sites,
            "fineness": inference.model.fineness,
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
                rows=RowOptions(**facts.get("rows", {})),
            )
        inference.model.refine(facts.get("fineness"))
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
