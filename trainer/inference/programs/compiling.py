"""A chunk's shared object: found in the cache, or made by a process of its own while this one continues.

Its name there is a hash of what it depends on and of nothing else: the recipe, the code that turns it into a graph,
torch, the CPU, the compiler and the threads.
"""

import ast
import hashlib
import json
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from trainer.cache import cache_folder, prune, used, without_lock
from trainer.inference.programs.native import SharedObject
from trainer.inference.programs.scan import Recipe

log = logging.getLogger(__name__)
_HERE = Path(__file__).parent
_CHILD = """import sys
from pathlib import Path
folder, path, parent, *sys.path[:] = sys.argv[1:]
from trainer.inference.programs.compiler import main
main(Path(folder), Path(path), int(parent))
"""


class CannotCompile(Exception):
    """Why there is no compiled step: the compiler's first line."""


class Compilation:
    """The shared object of ``recipe``, which `wait` gives; it is under way, or there, as soon as this exists.

    ``say``: tells the user a sentence. Raises CannotCompile where there is no compiler.
    """

    def __init__(self, recipe: Recipe, say: Callable[[str], None]):
        self.say = say
        self.stages: dict[str, float] = {}
        """Seconds of each stage of the compilation, where there was one."""
        self.path = cache_folder() / "steps" / f"{key(recipe)}.so"
        self._given = json.dumps({**asdict(recipe), **_settings()})
        self._end: weakref.finalize[..., Any] | None = None
        if used(self.path):
            say("compiled step found in the cache")
        else:
            self._begin()

    def _begin(self) -> None:
        if shutil.which(_settings()["compiler"]) is None:
            raise CannotCompile(f"{_settings()['compiler']} was not found: install it, or set CXX")
        self.say("compiling the step: 10 to 30 s, this once ...")
        self._began = time.monotonic()
        self._folder = Path(tempfile.mkdtemp(prefix="svi-step-"))
        (self._folder / "recipe.json").write_text(self._given)
        with (self._folder / "log").open("wb") as log:
            command = [sys.executable, "-c", _CHILD, str(self._folder), str(self.path), str(os.getpid()), *_places()]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._end = weakref.finalize(self, _ended, self._process, self._folder, self.path, os.getpid())

    def wait(self) -> SharedObject:
        """The compiled chunk. Whatever ends the wait (Ctrl-C) ends the compilation.

        Raises CannotCompile.
        """
        if self._end is None:
            try:
                return SharedObject(self.path)
            except OSError:  # cut short by a full disk, or made for another machine
                self.path.unlink(missing_ok=True)
                self._begin()
        try:
            self._process.wait()
            return self._result()
        finally:
            self.abandon()

    def _result(self) -> SharedObject:
        result = self._folder / "result.json"
        if self._process.returncode or not result.exists():
            raise CannotCompile(self._why_it_ended())
        found = json.loads(result.read_text())
        if "error" in found:
            raise CannotCompile(found["error"])
        self.stages = found.get("stages", {})
        log.info("compiled: %s", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.stages.items()))
        seconds = time.monotonic() - self._began
        if "not kept" in found:
            self.say(
                f"compiled in {seconds:.0f} s, but not kept, since {self.path.parent} cannot be written "
                f"({found['not kept']}): set XDG_CACHE_HOME to a folder that can."
            )
            return SharedObject(self._folder / "step.so")
        self.say(f"compiled in {seconds:.0f} s, kept in {self.path.parent}")
        prune(self.path.parent)
        return SharedObject(self.path)

    def _why_it_ended(self) -> str:
        code = self._process.returncode
        if code < 0:
            return f"it was ended by {signal.Signals(-code).name} (out of memory?)"
        lines = (self._folder / "log").read_text(errors="replace").splitlines()
        return lines[-1] if lines else f"it ended with exit code {code}"

    def abandon(self) -> None:
        """Ends the compilation, if it still runs, and removes what it has made so far."""
        if self._end is not None:
            self._end()


def _ended(process: "subprocess.Popen[bytes]", folder: Path, path: Path, parent: int) -> None:
    if os.getpid() != parent:  # a fork of it
        return
    with suppress(ProcessLookupError, PermissionError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    shutil.rmtree(folder, ignore_errors=True)
    without_lock(path)


def key(recipe: Recipe) -> str:
    """Names what ``recipe`` compiles to on this machine: the same in every process, and after every change of what it
    does not depend on.
    """
    code = [_code(_HERE / name) for name in ("scan.py", "compiler.py", "side_by_side.py", "normals.cpp")]
    parts = [asdict(recipe), _settings(), _libraries(), _processor(), *code]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _settings() -> dict[str, Any]:
    """What the compiler is told besides the recipe."""
    given = "clang++" if sys.platform == "darwin" else "g++"
    return {"threads": torch.get_num_threads(), "compiler": os.environ.get("CXX", given)}


@cache
def _code(path: Path) -> str:
    """A file's text, without the comments of Python."""
    text = path.read_text()
    return ast.unparse(ast.parse(text)) if path.suffix == ".py" else text


@cache
def _libraries() -> list[str]:
    """The versions of torch and of the compiler."""
    try:
        command = [_settings()["compiler"], "--version"]
        version = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        version = ""
    return [torch.__version__, str(torch.version.git_version), version.partition("\n")[0]]


@cache
def _processor() -> list[str]:
    """What code for this very processor depends on: machines that share a home directory may differ."""
    found = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        for name in ("model name", "flags", "Features"):
            found += [line for line in lines if line.startswith(name)][:1]
    return found


def _places() -> list[str]:
    """Where the child finds modules: as this process, but not in the folder that it happens to run in."""
    home = str(_HERE.parents[2])
    return [*(place for place in sys.path if place not in ("", os.getcwd(), home)), home]
