"""`svi sync`: runs that were logged offline, to the W&B server, with what W&B itself brings for it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from trainer.errors import UserError
from trainer.options.verbs import Sync
from trainer.runs.server import why_offline


def run(cfg: Sync, run_dir: Path) -> float:
    """Sends what is not sent yet, oldest first (so that what a run did after a requeue follows what it did before), and
    returns how many parts of runs; exits with 1 where one could not be sent.
    """
    del run_dir
    folder = Path(cfg.dir)
    if not folder.is_dir():
        raise UserError(f"dir={folder} is not a folder.")
    waiting = unsent(folder)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not waiting:
        console.print(f"W&B has everything below {folder}")
        return 0.0
    if importlib.util.find_spec("wandb") is None:
        raise UserError("svi sync needs the package wandb: pip install wandb.")
    import wandb

    settings = wandb.setup().settings
    reason = why_offline(str(settings.base_url), settings.api_key)
    if reason is not None:
        raise UserError(f"W&B: {reason}; nothing was sent, {len(waiting)} wait: log in (wandb login) and try again.")
    failed = 0
    for number, path in enumerate(waiting, 1):
        wrong = send(path, cfg.timeout)
        failed += wrong is not None
        console.print(f"{number} of {len(waiting)}: {path} {'sent' if wrong is None else f'not sent ({wrong})'}")
    if failed:
        print(
            f"svi sync: {failed} of {len(waiting)} were not sent; the same command tries them again.", file=sys.stderr
        )
        sys.exit(1)
    return float(len(waiting))


def unsent(folder: Path) -> list[Path]:
    """The offline runs below ``folder`` that W&B has not marked as sent, by the time at which they began."""
    found = [path.parent for path in folder.rglob("offline-run-*/run-*.wandb")]
    return sorted((path for path in found if not any(path.glob("*.synced"))), key=lambda path: path.name)


def send(path: Path, timeout: float) -> str | None:
    """What is wrong, where the run at ``path`` could not be sent within ``timeout`` seconds."""
    command = [sys.executable, "-m", "wandb", "sync", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return f"not within {timeout:g} s"
    if done.returncode == 0 and any(path.glob("*.synced")):
        return None
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1].removeprefix("wandb: ") if lines else f"wandb sync ended with {done.returncode}"
