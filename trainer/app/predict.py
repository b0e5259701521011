"""`svi predict`: new observations at the rows of a table, from a run folder."""

from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from trainer.app import build
from trainer.data.table import table_writer
from trainer.errors import UserError
from trainer.posterior.posterior import Posterior

POSTERIOR = "posterior.pt"
"""The file of a run folder that holds its answer."""


def run(cfg: DictConfig, run_dir: Path) -> float:
    """Writes a row for each row of the data: its number, and mean, sd and quantiles of every observed site.

    Returns the number of rows.
    """
    del run_dir
    posterior, out = posterior_of(Path(str(cfg.run))), Path(str(cfg.out))
    levels = [float(level) for level in cfg.quantiles]
    if not all(0 < level < 1 for level in levels):
        raise UserError(f"quantiles={list(cfg.quantiles)} must lie between 0 and 1.")
    rows = 0
    with table_writer(out) as write:
        for row_id, found in posterior.predictions(str(cfg.data.path), int(cfg.draws), levels, int(cfg.seed)):
            columns: dict[str, np.ndarray] = {"row_id": row_id}
            for site, each in found.items():
                columns |= {f"{site}_mean": each.mean, f"{site}_sd": each.sd}
                columns |= {f"{site}_q{100 * level:02g}": values for level, values in zip(levels, each.quantiles)}
            write(columns)
            rows += len(row_id)
    Console(highlight=False, soft_wrap=True).print(f"{out}: {rows:,} rows, {int(cfg.draws)} draws each")
    return float(rows)


def posterior_of(folder: Path) -> Posterior:
    """The answer of a finished run, model and guide made from its config. Raises UserError where there is none."""
    config = folder / ".hydra" / "resolved.yaml"
    if not config.is_file():
        raise UserError(f"run={folder} is no run folder of svi train.")
    if not (folder / POSTERIOR).is_file():
        raise UserError(f"{folder} has no answer yet: finish it with svi train run_dir={folder} ckpt_path=last.")
    cfg = OmegaConf.load(config)
    assert isinstance(cfg, DictConfig)
    model = build.model(cfg.model)
    return Posterior.of_factory(
        folder / POSTERIOR, model, lambda columns, plate: build.guide(cfg.guide, model, columns, plate)
    )
