"""Checkpoints: plain tensors and numbers, written whole or not at all, each with a manifest that holds its sha256.

`save` writes a temporary file beside the target, fsyncs, renames, then writes the manifest; a checkpoint without its
manifest, or whose bytes do not match it, was never finished and is passed over (with a word). Loading uses
`weights_only=True`, so a crafted file runs no code.
"""

import hashlib
import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback

from trainer.data.store import atomic_write
from trainer.errors import UserError
from trainer.lit.module import VariationalModule, flat_state, state_from_flat
from trainer.svi.step import State

FORMAT = 1


def save(path: Path, state: State, facts: dict[str, Any]) -> None:
    """Writes ``state`` and ``facts`` (plain values) to ``path`` and its manifest beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = [tensor.detach().cpu().clone() for tensor in flat_state(state)]
    with atomic_write(path) as file:
        torch.save({"format": FORMAT, "state": tensors, "facts": facts}, file)
    manifest = {"sha256": _sha256(path), "bytes": path.stat().st_size, "step": int(state.step), "time": time.time()}
    with atomic_write(_manifest(path)) as file:
        file.write(json.dumps(manifest, indent=1).encode())


def load(path: Path) -> tuple[State, dict[str, Any]]:
    """The state and the facts of the checkpoint at ``path``, its hash verified. Raises UserError naming the file."""
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist: give ckpt_path=last or an existing file.")
    problem = damage(path)
    if problem:
        raise UserError(
            f"checkpoint {path} {problem}: resume from another one, or ckpt_path=last for the newest good one."
        )
    content = torch.load(path, map_location="cpu", weights_only=True)
    if content.get("format") != FORMAT:
        raise UserError(
            f"checkpoint {path} has format {content.get('format')} where this version reads {FORMAT}: "
            "resume it with the version that wrote it."
        )
    return state_from_flat(content["state"]), content["facts"]


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None; damaged ones are passed over with a warning that names them."""
    steps = {}
    for manifest in folder.glob("*.ckpt.json"):
        try:
            steps[manifest.with_suffix("")] = int(json.loads(manifest.read_bytes())["step"])
        except (ValueError, KeyError, OSError):
            warnings.warn(f"checkpoint manifest {manifest} cannot be read and is passed over.", stacklevel=2)
    for path in sorted(steps, key=steps.__getitem__, reverse=True):
        problem = damage(path)
        if problem is None:
            return path
        warnings.warn(f"checkpoint {path} {problem} and is passed over.", stacklevel=2)
    return None


def damage(path: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint, or None."""
    try:
        manifest = json.loads(_manifest(path).read_bytes())
    except FileNotFoundError:
        return "has no manifest (it was not finished)"
    except ValueError:
        return "has an unreadable manifest"
    if not path.is_file():
        return "is missing beside its manifest"
    if path.stat().st_size != manifest.get("bytes"):
        return f"has {path.stat().st_size} bytes where its manifest says {manifest.get('bytes')}"
    if _sha256(path) != manifest.get("sha256"):
        return "does not match the sha256 of its manifest"
    return None


def _manifest(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Checkpoints(Callback):
    """Saves every ``every_n_steps`` steps and at the end of training, however it ended; keeps the newest ``keep``."""

    def __init__(self, folder: Path, facts: dict[str, Any], every_n_steps: int | None = None, keep: int = 2):
        self.folder, self.facts, self.every, self.keep = folder, facts, every_n_steps, keep
        self.saved = -1

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        assert isinstance(module, VariationalModule)
        if self.every and module.step % self.every == 0:
            self.save(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, VariationalModule)
        self.save(trainer, module)

    def save(self, trainer: pl.Trainer, module: VariationalModule) -> None:
        """Rank 0 writes, the others wait for it."""
        if module.step == self.saved:
            return
        if trainer.is_global_zero:
            save(self.folder / f"step_{module.step:09d}.ckpt", module.state, {**self.facts, "seconds": module.seconds})
            for old in sorted(self.folder.glob("step_*.ckpt"))[: -self.keep]:
                _manifest(old).unlink(missing_ok=True)
                old.unlink(missing_ok=True)
        self.saved = module.step
        trainer.strategy.barrier()
