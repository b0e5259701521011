"""`svi predict`: new observations at the rows of a table, from a run folder."""

from pathlib import Path

import numpy as np
from rich.console import Console

from trainer.data.table import table_writer
from trainer.errors import counted
from trainer.options.verbs import Predict
from trainer.posterior.predictive import Asked, table_columns
from trainer.training.data import table_or_split
from trainer.training.finished import posterior_of
from trainer.training.row_progress import RowProgress


def run(cfg: Predict, run_dir: Path) -> float:
    """Writes a row for each row of the data: its number, and of every observed site mean, sd and quantiles, or the
    most likely class and the probability of each.

    Returns the number of rows.
    """
    del run_dir
    posterior, out = posterior_of(Path(cfg.run), cfg.allow), Path(cfg.out)
    levels, data = list(cfg.quantiles), table_or_split(cfg.data)
    rows, console = 0, Console(highlight=False, soft_wrap=True)
    with table_writer(out) as write, RowProgress(console, "predicting") as watch:
        asked = Asked(cfg.draws, levels, cfg.seed, cfg.latents)
        for row_id, found in posterior.predictions(data, asked, watch.show, console.print, console.print):
            columns: dict[str, np.ndarray] = {"row_id": row_id}
            for site, each in found.items():
                columns |= table_columns(site, each, levels)
            write(columns)
            rows += len(row_id)
    console.print(f"{out}: {counted(rows, 'row')}, {counted(cfg.draws, 'draw')} each")
    return float(rows)
