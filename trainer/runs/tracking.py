"""What a tracker keeps of a run besides metrics: data, code, the result, and its own name for the run."""

import json
import subprocess
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback
from pytorch_lightning.loggers import Logger, MLFlowLogger, WandbLogger

from trainer.data.address import is_address
from trainer.data.shards.folder import ShardFolder
from trainer.data.store import atomic_write
from trainer.engine import checkpoint
from trainer.engine.metrics import MetricsFile
from trainer.runs.secrets import redacted

ANSWER = ("summary.csv", "metrics.json", "posterior.pt")
_IDS = "trackers.json"


class Tracked(Callback):
    """Hands the data's index (by its hash, never a shard) over when training begins, and the result at its end.

    With ``checkpoints`` the newest checkpoint too, also where the run is stopped. What a tracker does not take is said.
    """

    def __init__(self, run_dir: Path, folder: ShardFolder, figures: MetricsFile, checkpoints: bool):
        self.run_dir, self.folder, self.figures, self.checkpoints = run_dir, folder, figures, checkpoints

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._each(trainer, self._data)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        paths = [self.run_dir / name for name in ANSWER]
        self._each(trainer, partial(self._files, "posterior", [path for path in paths if path.exists()]))
        self._checkpoint(trainer)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._checkpoint(trainer)

    def _checkpoint(self, trainer: pl.Trainer) -> None:
        newest = checkpoint.newest(self.run_dir / "checkpoints") if self.checkpoints and trainer.loggers else None
        if newest is not None:
            self._each(trainer, partial(self._files, "checkpoint", [newest, checkpoint.manifest_of(newest)]))

    def _each(self, trainer: pl.Trainer, give: Callable[[Logger], None]) -> None:
        for logger in trainer.loggers:
            self.figures.or_say(type(logger).__name__, partial(give, logger), "files")

    def _data(self, logger: Logger) -> None:
        index = self.folder.index
        facts = {
            "index": index.digest,
            "rows": index.num_rows,
            "columns": [column.name for column in index.columns],
            "source": redacted(index.meta.get("source")),
        }
        if isinstance(logger, WandbLogger):
            import wandb

            data = wandb.Artifact(f"data-{index.digest[:12]}", "dataset", metadata=facts)
            for number, place in enumerate(redacted(self.folder.files.places)):
                uri = place if is_address(place) else Path(place).absolute().as_uri()
                data.add_reference(uri, name=f"{number}", checksum=False)
            logger.experiment.log_artifact(data)  # use_artifact waits for the server, and does not work offline
        elif isinstance(logger, MLFlowLogger):
            for name in ("index", "rows", "source"):
                logger.experiment.set_tag(logger.run_id, f"data.{name}", facts[name])

    def _files(self, kind: str, paths: list[Path], logger: Logger) -> None:
        if isinstance(logger, WandbLogger):
            import wandb

            made = wandb.Artifact(f"{kind}-{logger.experiment.id}", kind, metadata={"index": self.folder.index.digest})
            for path in paths:
                made.add_file(str(path))
            logger.experiment.log_artifact(made)
        elif isinstance(logger, MLFlowLogger):
            for path in paths:
                logger.experiment.log_artifact(logger.run_id, str(path), kind)


def code_facts() -> dict[str, str | None]:
    """The version of the trainer, and the commit of the folder from which the run was started, if it is a checkout."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        commit = None
    else:
        commit = found.stdout.strip()
    return {"svi-trainer": version("svi-trainer"), "commit": commit}


def kept_id(run_dir: Path, tracker: str) -> str | None:
    """By what name ``tracker`` knows the run of this folder, if it does: a resumed run is the same run there."""
    try:
        known: str = json.loads((run_dir / _IDS).read_text())[tracker]
        return known
    except (OSError, ValueError, KeyError):
        return None


def keep_id(run_dir: Path, tracker: str, name: str) -> None:
    """Remembers it."""
    try:
        known: dict[str, Any] = json.loads((run_dir / _IDS).read_text())
    except (OSError, ValueError):
        known = {}
    run_dir.mkdir(parents=True, exist_ok=True)
    with atomic_write(run_dir / _IDS) as file:
        file.write(json.dumps({**known, tracker: name}).encode())
