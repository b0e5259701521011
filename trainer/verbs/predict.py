"""`svi predict`: new observations at the rows of a table, from a run folder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from trainer.data.shards.splits import is_packed
from trainer.data.table import table_writer
from trainer.errors import UserError, counted
from trainer.options.verbs import Predict
from trainer.posterior.predictive import Prediction
from trainer.training.data import cache_of, places, training_split
from trainer.training.finished import posterior_of
from trainer.training.row_progress import RowProgress

_MOST_CLASSES = 1000  # of which each has a column


def run(cfg: Predict, run_dir: Path) -> float:
    """Writes a row for each row of the data: its number, and of every observed site mean, sd and quantiles, or the
    most likely class and the probability of each.

    Returns the number of rows.
    """
    del run_dir
    posterior, out = posterior_of(Path(cfg.run), cfg.allow), Path(cfg.out)
    levels = list(cfg.quantiles)
    several = places(cfg.data.path)
    packed = [is_packed(place, cache_of(cfg.data)) for place in several]
    if len(several) > 1 and not all(packed):
        raise UserError(f"{several[packed.index(False)]} is a table: predict one table at a time, or pack them.")
    data = training_split(cfg.data) if packed[0] else several[0]
    rows, console = 0, Console(highlight=False, soft_wrap=True)
    with table_writer(out) as write, RowProgress(console, "predicting") as watch:
        for row_id, found in posterior.predictions(data, cfg.draws, levels, cfg.seed, watch.show, console.print):
            columns: dict[str, np.ndarray] = {"row_id": row_id}
            for site, each in found.items():
                columns |= _columns(site, each, levels)
            write(columns)
            rows += len(row_id)
    console.print(f"{out}: {counted(rows, 'row')}, {counted(cfg.draws, 'draw')} each")
    return float(rows)


def _columns(site: str, found: Prediction, levels: Sequence[float]) -> dict[str, np.ndarray]:
    """Of classes the most likely one and their probabilities, else mean, sd and quantiles."""
    likely, probabilities = found.most_likely, found.probabilities
    if likely is None or probabilities is None:
        quantiles = {f"{site}_q{100 * level:02g}": values for level, values in zip(levels, found.quantiles)}
        return {f"{site}_mean": found.mean, f"{site}_sd": found.sd, **quantiles}
    if probabilities.shape[-1] > _MOST_CLASSES:
        return {f"{site}_class": likely, f"{site}_p": probabilities.max(-1)}
    names = [f"p_{word}" for word in found.words] if found.words else [f"p{k}" for k in range(probabilities.shape[-1])]
    return {f"{site}_class": likely, **{f"{site}_{name}": probabilities[..., k] for k, name in enumerate(names)}}
