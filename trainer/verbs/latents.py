"""`svi latents`: the latents of each row of a table given what is observed of it, from a run folder."""

from pathlib import Path

from rich.console import Console

from trainer.data.table import table_writer
from trainer.errors import counted
from trainer.options.verbs import Latents
from trainer.posterior.predictive import Asked, table_columns
from trainer.training.data import table_or_split
from trainer.training.finished import posterior_of
from trainer.training.row_progress import RowProgress


def run(cfg: Latents, run_dir: Path) -> float:
    """Writes a row for each row of the data: its number, and of every latent of rows mean, sd and quantiles, or the
    most likely state and the probability of each.

    Returns the number of rows.
    """
    del run_dir
    posterior, out = posterior_of(Path(cfg.run), cfg.allow), Path(cfg.out)
    asked, data = Asked(cfg.draws, list(cfg.quantiles), cfg.seed), table_or_split(cfg.data)
    rows, console = 0, Console(highlight=False, soft_wrap=True)
    with table_writer(out) as write, RowProgress(console, "finding latents") as watch:
        for row_id, found in posterior.latents_by_part(data, asked, watch.show, console.print):
            columns = {"row_id": row_id}
            for site, each in found.items():
                columns |= table_columns(site, each, asked.quantiles)
            write(columns)
            rows += len(row_id)
    console.print(f"{out}: {counted(rows, 'row')}, given what is observed of each; {counted(cfg.draws, 'draw')}")
    return float(rows)
