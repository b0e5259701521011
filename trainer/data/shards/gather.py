"""Gathering: runs of bytes from many places into one array.

By a few lines of C where there is a C compiler (compiled once, kept in the cache), else run by run from Python.
Both let go of Python's lock while they copy.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from trainer.cache import cache_folder, kept

_SOURCE = Path(__file__).with_name("gather.c")


def gather(source: np.ndarray, rows: np.ndarray, place: np.ndarray, target: np.ndarray) -> None:
    """Copies ``rows[i]`` rows from the address ``source[i]`` to ``target[place[i]:]``; int64 [runs] each.

    The memory at the addresses must be there, and stay.
    """
    bytes_of_row = target.strides[0]
    (_compiled() or _run_by_run)(source, place * bytes_of_row, rows * bytes_of_row, target)


_Gather = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]


@cache
def _compiled() -> _Gather | None:
    """The gather of gather.c, or None where it cannot be compiled."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        return None
    name = hashlib.sha256(_SOURCE.read_bytes() + platform.machine().encode()).hexdigest()[:32]
    try:
        path = kept(cache_folder() / f"gather-{name}.so", lambda made: _compile(compiler, made))
        function = ctypes.CDLL(str(path)).gather
    except (OSError, subprocess.CalledProcessError):
        return None
    function.restype, function.argtypes = None, [ctypes.c_int64, *[ctypes.c_void_p] * 4]

    def run(source: np.ndarray, place: np.ndarray, size: np.ndarray, target: np.ndarray) -> None:
        arrays = [np.ascontiguousarray(each, dtype=np.int64) for each in (source, place, size)]
        function(len(source), *(each.ctypes.data for each in arrays), target.ctypes.data)

    return run


def _compile(compiler: str, path: Path) -> None:
    command = [*compiler.split(), "-O3", "-shared", "-fPIC", "-o", str(path), str(_SOURCE)]
    subprocess.run(command, check=True, capture_output=True)


def _run_by_run(source: np.ndarray, place: np.ndarray, size: np.ndarray, target: np.ndarray) -> None:
    """As the compiled one: a microsecond a run."""
    for address, at, count in zip(source.tolist(), (target.ctypes.data + place).tolist(), size.tolist()):
        ctypes.memmove(at, address, count)
