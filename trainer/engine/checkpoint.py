"""Checkpoints: plain tensors and numbers, written whole or not at all, each with a manifest that holds its sha256.

`save` writes a temporary file beside the target, fsyncs, renames, then writes the manifest; a checkpoint without its
manifest, or whose bytes do not match it, was never finished and is passed over (with a word). Loading uses
`weights_only=True`, so a crafted file runs no code.
"""

import hashlib
import io
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from torch import Tensor

from trainer.data.store import atomic_write
from trainer.distributed.failure import explained
from trainer.engine.module import ChunkModule
from trainer.engine.train_state import TrainState
from trainer.errors import RankLost, Stopped, UserError
from trainer.inference.optim.rounds import State

FORMAT = 2


def save(path: Path, state: State, record: dict[str, Any]) -> None:
    """Writes ``state`` and ``record`` (plain values) to ``path`` and its manifest beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    memory = io.BytesIO()
    torch.save(packed(state, record), memory)
    content = memory.getbuffer()
    manifest_of(path).unlink(missing_ok=True)
    with atomic_write(path) as file:
        file.write(content)
    digest = hashlib.sha256(content).hexdigest()
    manifest = {"sha256": digest, "bytes": len(content), "step": int(state.step), "time": time.time()}
    with atomic_write(manifest_of(path)) as file:
        file.write(json.dumps(manifest, indent=1).encode())


def load(path: Path) -> tuple[State, dict[str, Any]]:
    """The state and the record of the checkpoint at ``path``, its hash verified. Raises UserError naming the file."""
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist: give ckpt_path=last or an existing file.")
    problem = damage(path)
    if problem:
        raise UserError(
            f"checkpoint {path} {problem}: resume from another one, or ckpt_path=last for the newest good one."
        )
    return unpacked(torch.load(path, map_location="cpu", weights_only=True), f"checkpoint {path}")


def packed(state: State, record: dict[str, Any]) -> dict[str, Any]:
    """``state`` and ``record`` as plain tensors and values."""
    tensors = state.each(lambda tensor: tensor.detach().cpu().clone()).named()
    return {"format": FORMAT, "state": tensors, "facts": record}


def unpacked(content: dict[str, Any], name: str) -> tuple[State, dict[str, Any]]:
    """From `packed`. Raises UserError, in which it is called ``name``, for one of another version."""
    if content.get("format") == 1:
        return State.of_named(_by_name(content["state"])), content["facts"]
    if content.get("format") != FORMAT:
        raise UserError(
            f"{name} has format {content.get('format')} where this version reads {FORMAT}: "
            "resume it with the version that wrote it."
        )
    return State.of_named(content["state"]), content["facts"]


def _by_name(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The state's tensors in format 1, which had no names: a preconditioner alone has matrices."""
    own, rest = tensors[:4], list(tensors[4:])
    matrices = [place for place, tensor in enumerate(rest) if tensor.dim() == 2]
    snapshot = len(rest) - len(matrices) > 2
    moments = len(rest) - len(matrices) - 2 * snapshot
    names = [
        *("step", "theta", "average", "averaged"),
        *(("optimizer.velocity",) if moments == 1 else ("optimizer.mean", "optimizer.square")),
        *(("preconditioner.factor", "preconditioner.curvature") if matrices else ()),
        *(("snapshot.theta", "snapshot.gradient") if snapshot else ()),
    ]
    return dict(zip(names, [*own, *rest], strict=True))


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None; damaged ones are passed over with a warning that names them."""
    steps = {}
    for manifest in manifests(folder):
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


def manifests(folder: Path) -> list[Path]:
    """Those of the checkpoints of a run, each of which says that one was finished."""
    return sorted(folder.glob("*.ckpt.json"))


def damage(path: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint, or None."""
    try:
        manifest = json.loads(manifest_of(path).read_bytes())
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


def manifest_of(path: Path) -> Path:
    """The file beside a checkpoint that says that it is whole."""
    return path.with_name(path.name + ".json")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CheckpointPolicy(NamedTuple):
    """When a run is saved, besides its end, and how much of that stays."""

    every_n_steps: int | None = None
    every_minutes: float | None = None
    keep: int = 2
    """So many of the newest."""


class Checkpoints(Callback):
    """Saves as the ``policy`` says, and at the end of training, however it ended.

    A state is saved once all ranks were found to hold the same; between such points rank 0
    saves by its own clock. ``saved``: the step that needs no saving; ``say``: tells the user a sentence.
    """

    def __init__(
        self,
        folder: Path,
        record: TrainState,
        saved: int,
        policy: CheckpointPolicy,
        say: Callable[[str], None] = print,
    ):
        if policy.keep < 1:
            raise UserError(f"checkpoint.keep_last={policy.keep} must be at least 1.")
        self.folder, self.record, self.keep, self.say = folder, record, policy.keep, say
        self.saved = (saved, record.ending)  # a step may be saved before and after its round ends
        self.every = policy.every_n_steps
        self.seconds = 60 * policy.every_minutes if policy.every_minutes else math.inf
        self.when = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.when = time.monotonic()
        if trainer.is_global_zero:
            for left in self.folder.glob(".*.tmp"):  # by a process that was killed while it wrote
                left.unlink(missing_ok=True)
            self._set_aside()

    def _set_aside(self) -> None:
        """Renames checkpoints of later steps than that from which the run resumes, which `newest` would prefer."""
        later = [path for path in self.folder.glob("step_*.ckpt") if int(path.stem.partition("_")[2]) > self.saved[0]]
        for path in later:
            manifest_of(path).unlink(missing_ok=True)
            path.rename(path.with_name(f"{path.name}.aside"))
        if later:
            names = ", ".join(sorted(path.name for path in later))
            self.say(f"set aside (.aside), since the run resumes from an earlier step: {names}")

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        assert isinstance(module, ChunkModule)
        if self.every and module.step % self.every == 0:
            self._save(trainer, module)
        elif time.monotonic() - self.when >= self.seconds:
            self._write(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, ChunkModule)
        self._save(trainer, module, last=True)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """What ended the run says nothing against the state of the last chunk, if it was a signal or another rank."""
        assert isinstance(module, ChunkModule)
        cause = explained(exception)
        if isinstance(cause, Stopped) or (isinstance(cause, RankLost) and cause.faultless):
            self._write(trainer, module)

    def _save(self, trainer: pl.Trainer, module: ChunkModule, last: bool = False) -> None:
        module.compare_ranks()
        self._write(trainer, module, last)

    def _write(self, trainer: pl.Trainer, module: ChunkModule, last: bool = False) -> None:
        """Rank 0 writes; a full disk is told, and does not end the training."""
        self.when = time.monotonic()
        here = (module.step, self.record.ending)
        if here == self.saved or not trainer.is_global_zero:
            return
        path = self.folder / f"step_{module.step:09d}.ckpt"
        try:
            save(path, module.state, {**self.record.state_dict(), "seconds": module.seconds})
        except OSError as error:
            text = f"checkpoint {path} could not be written ({error.strerror}): free some space"
            if last:
                raise UserError(f"{text}, then continue with ckpt_path=last.") from error
            self.say(f"{text}. Training continues, and tries again at the next checkpoint.")
            return
        self.saved = here
        for old in sorted(self.folder.glob("step_*.ckpt"))[: -self.keep]:
            manifest_of(old).unlink(missing_ok=True)
            old.unlink(missing_ok=True)
