"""A folder that is there whole or not at all."""

import contextlib
import errno
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from trainer.data.store import sync_folder
from trainer.errors import UserError


@contextlib.contextmanager
def partial_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside ``out`` that becomes it when the block ends well, and goes when it does not.

    What a killed process left beside ``out`` goes first. Raises UserError for an ``out`` that exists (with
    ``overwrite``: that is not a packed folder) and for whatever the disk refuses.
    """
    check_out(out, overwrite)
    partial = f".{out.absolute().name}.partial-"
    folder, replaced = (out.absolute().with_name(f"{partial}{part}") for part in (os.getpid(), "replaced"))
    try:
        with disk_of(out):
            folder.parent.mkdir(parents=True, exist_ok=True)
            for leftover in folder.parent.glob(glob.escape(partial) + "*"):
                shutil.rmtree(leftover)
            folder.mkdir()
            yield folder
            if overwrite and out.exists():
                out.rename(replaced)
            folder.rename(out)
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def check_out(out: Path, overwrite: bool) -> None:
    """Raises UserError for an ``out`` that exists (with ``overwrite``: that is not a packed folder)."""
    if out.exists() and not overwrite:
        raise UserError(f"'{out}' exists: choose another out=, or write overwrite=true.")
    if out.exists() and not is_whole(out):
        raise UserError(f"'{out}' is not a packed folder, and is not overwritten: choose another out=.")


def is_whole(out: Path) -> bool:
    """Whether ``out`` is a packed folder."""
    return (out / "train" / "index.json").is_file()


@contextlib.contextmanager
def disk_of(out: Path) -> Iterator[None]:
    """Whatever the disk of ``out`` refuses, as a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space is left on the disk of '{out}': free some, or choose another out=.") from error
        raise UserError(
            f"cannot write '{out}': {error.strerror or error}; fix that, or choose another out=."
        ) from error
