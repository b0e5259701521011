"""Files that are made once and kept between runs, whichever of several processes comes first."""

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/svi-trainer, or ~/.cache/svi-trainer."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "svi-trainer"


def kept(path: Path, make: Callable[[Path], None]) -> Path:
    """``path``, made by ``make(temporary path)`` and renamed if it is not there; other processes wait for it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                with TemporaryDirectory(dir=path.parent) as folder:
                    make(Path(folder) / path.name)
                    os.replace(Path(folder) / path.name, path)
    return path
