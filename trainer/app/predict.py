"""`svi predict`: new observations at the rows of a table, from a run folder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from trainer.app import build
from trainer.app.allowed import refuse_others
from trainer.app.data import cache_of, places, training_split
from trainer.app.options.verbs import Predict
from trainer.app.precision import TYPES
from trainer.app.watch import Watch
from trainer.data.shards.folder import is_packed
from trainer.data.table import table_writer
from trainer.errors import UserError, counted
from trainer.posterior.posterior import Posterior
from trainer.posterior.predictive import Prediction
from trainer.svi.step import in_dtype

POSTERIOR = "posterior.pt"
"""The file of a run folder that holds its answer."""
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
    with table_writer(out) as write, Watch(console, "predicting") as watch:
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


def posterior_of(folder: Path, allow: Sequence[str] = ()) -> Posterior:
    """The answer of a finished run, model and guide made from its config (see `refuse_others`).

    Raises UserError where there is none.
    """
    config = folder / ".hydra" / "resolved.yaml"
    if not config.is_file():
        raise UserError(f"run={folder} is no run folder of svi train.")
    if not (folder / POSTERIOR).is_file():
        raise UserError(f"{folder} has no answer yet: finish it with svi train run_dir={folder} ckpt_path=last.")
    cfg = OmegaConf.load(config)
    assert isinstance(cfg, DictConfig)
    refuse_others(OmegaConf.create({name: cfg[name] for name in ("model", "guide")}), allow, folder)
    with in_dtype(TYPES[cfg.dtype]):  # a class makes its modules in the run's type
        model = build.model(cfg.model)
    return Posterior.of_factory(
        folder / POSTERIOR, model, lambda columns, plate: build.guide(cfg.guide, model, columns, plate)
    )
