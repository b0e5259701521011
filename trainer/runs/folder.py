"""What the files of a run folder tell of the run, whether it runs or how it ended."""

import csv
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from trainer.data.store import atomic_write
from trainer.errors import UserError, exit_code, first_line
from trainer.options.entrance import resolved
from trainer.options.verbs import Train
from trainer.runs.lock import is_locked
from trainer.runs.secrets import redacted

_END = "end.json"
_METRICS = ("metrics.json", "metrics.csv")


@dataclass(frozen=True)
class Run:
    """A run folder, read."""

    folder: Path
    status: str
    """``running``; ``done`` with its metrics; ``pruned``, which is done too; ``stopped`` by a signal after saving;
    ``failed``; else ``killed``: it has ended without a word (or runs where its lock is not seen)."""
    why: str
    """It ended: its stop reason, or the sentence that it left."""
    config: DictConfig
    """As resolved; empty where it did not come so far."""
    metrics: dict[str, Any]
    """metrics.json; of a run without it, what the last row of metrics.csv has of it."""
    curve: list[dict[str, str]]
    """The rows of metrics.csv."""
    written: float
    """When it last wrote a figure, in seconds since the epoch."""

    @property
    def model(self) -> str:
        return str(OmegaConf.select(self.config, "model._target_") or "").rpartition(".")[2]

    @property
    def guide(self) -> str:
        return str(OmegaConf.select(self.config, "guide._target_") or "").rpartition(".")[2]

    @property
    def headline(self) -> float | None:
        """The held-out ELBO per row, without held-out rows the ELBO per row; None where it was not evaluated."""
        if self.status not in ("done", "pruned"):
            return None
        held_out = self.metrics.get("held_out_elbo_per_row")
        return self.metrics.get("elbo_per_row") if held_out is None else held_out

    @property
    def overrides(self) -> list[str]:
        """The words that it was started with."""
        file = self.folder / ".hydra" / "overrides.yaml"
        return [str(word) for word in OmegaConf.load(file)] if file.exists() else []


def find(folder: Path) -> list[Run]:
    """The runs at and below ``folder``, by name."""
    return [read(place.parent) for place in sorted(folder.rglob(".hydra")) if place.is_dir()]


def read(folder: Path) -> Run:
    """The run in ``folder``."""
    resolved = folder / ".hydra" / "resolved.yaml"
    config = OmegaConf.load(resolved) if resolved.exists() else OmegaConf.create()
    assert isinstance(config, DictConfig)
    metrics, curve, end = _json(folder / "metrics.json"), _curve(folder / "metrics.csv"), _json(folder / _END)
    saved = [_json(path).get("step", 0) for path in folder.glob("checkpoints/*.ckpt.json")]
    answered = bool(metrics) and metrics.get("steps", 0) >= max(saved, default=0)
    written = _written(folder) or (folder / ".hydra").stat().st_mtime
    if not answered and curve:
        metrics = _of_row(curve[-1])
    if is_locked(folder):
        status, why = "running", ""
    elif end and (folder / _END).stat().st_mtime >= (_written(folder) or 0.0):  # else: of an earlier start
        status, why = str(end.get("status")), str(end.get("why"))
    elif answered:
        why = str(metrics.get("stop_reason", ""))
        status = "pruned" if why == "pruned" else "done"
    else:
        status, why = "killed", "no word of how it ended"
    return Run(folder, status, why, config, metrics, curve, written)


def cut_short(folder: Path) -> int:
    """When (ns) the run left word that Slurm had ended it, its time being up or another job coming first; else 0."""
    why = str(_json(folder / _END).get("why"))
    return (folder / _END).stat().st_mtime_ns if why.startswith("stopped by SIGUSR1 at step") else 0


def save_words(cfg: Train, folder: Path) -> None:
    """Writes what Hydra would (the config, its own, the words of the command) without secrets; only within a command.

    Hydra's own files come before the run holds its folder, and would replace those of a run that does.
    """
    if not HydraConfig.initialized():
        return
    hydra = HydraConfig.get()
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    words: dict[str, Any] = {"config": resolved(cfg), "hydra": {"hydra": hydra}, "overrides": hydra.overrides.task}
    for name, node in words.items():
        plain = redacted(OmegaConf.to_container(OmegaConf.create(node)))
        with atomic_write(folder / ".hydra" / f"{name}.yaml") as file:
            file.write(OmegaConf.to_yaml(OmegaConf.create(plain)).encode())


@contextmanager
def end_noted(cfg: Train, folder: Path) -> Iterator[None]:
    """Leaves word in a run folder of what ended the run.

    An old run that refused to go on stays as it was. A run that was refused before it wrote anything, and whose folder
    nobody named, leaves nothing.
    """
    before = _written(folder)
    try:
        yield
    except BaseException as error:
        if isinstance(error, UserError) and _is_unnamed() and _is_bare(folder):
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # others are beside it
                folder.parent.rmdir()
        elif not is_locked(folder) and not (before and before == _written(folder)):
            stopped = exit_code(error) > 128 or isinstance(error, KeyboardInterrupt)
            why = redacted(first_line(error))
            with suppress(OSError):  # a full disk must not hide what went before
                if not (folder / ".hydra").exists():  # it did not come so far
                    save_words(cfg, folder)
                with atomic_write(folder / _END) as file:
                    file.write(json.dumps({"status": "stopped" if stopped else "failed", "why": why}).encode())
        raise


def _is_unnamed() -> bool:
    """Whether this is a command by itself that leaves the name of its folder to us."""
    if not HydraConfig.initialized() or HydraConfig.get().mode == RunMode.MULTIRUN:
        return False
    words = HydraConfig.get().overrides
    return not any(word.startswith(("run_dir=", "hydra.run.dir=")) for word in (*words.task, *words.hydra))


def _is_bare(folder: Path) -> bool:
    """Whether a run folder holds nothing but the words of its command."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {".hydra", ".lock"} and not is_locked(folder)


def _written(folder: Path) -> float | None:
    """When a run wrote its last figure."""
    return max((path.stat().st_mtime for name in _METRICS if (path := folder / name).exists()), default=None)


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return content


def _curve(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("elbo_per_row")]


def _of_row(row: dict[str, str]) -> dict[str, Any]:
    """The metrics of the latest chunk: its ELBO is that of the training rows at a draw or two."""
    elbo, per_row = float(row["elbo"]), float(row["elbo_per_row"])
    return {
        "elbo": elbo,
        "elbo_per_row": per_row,
        "rows": round(elbo / per_row) if per_row else None,
        "steps": int(row["step"]),
        "seconds": float(row["seconds"]),
        "rows_per_second": float(row["rows_per_second"]),
    }
