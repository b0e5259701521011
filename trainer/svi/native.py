"""A graph of operations as a shared object that runs without Python, kept on disk between runs.

Inductor compiles it ahead of time (AOTInductor); we call its C interface through ctypes, which lets go of Python's lock
(torch's own binding holds it), so that another thread reads the next chunk meanwhile.
"""

import ctypes
import hashlib
import logging
import platform
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.cache import kept

_FORMAT = "1"


class SharedObject:
    """A compiled function of tensors."""

    def __init__(self, path: Path):
        _keep_freed_memory()
        self._library = ctypes.CDLL(str(path))
        self._container = ctypes.c_void_p()
        self._do("CreateWithDevice", ctypes.byref(self._container), ctypes.c_size_t(1), b"cpu", None)
        self._inputs, self._outputs = self._count("Inputs"), self._count("Outputs")

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for contiguous ``inputs`` of the shapes it was compiled for."""
        assert len(inputs) == self._inputs
        handles = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([each.contiguous() for each in inputs])
        given = (ctypes.c_void_p * self._inputs)(*(_pointer(handle, None) for handle in handles))
        made = (ctypes.c_void_p * self._outputs)()
        count_in, count_out = ctypes.c_size_t(self._inputs), ctypes.c_size_t(self._outputs)
        self._do("Run", self._container, given, count_in, made, count_out, None, None)
        return torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([_capsule(each, None, None) for each in made])

    def _do(self, name: str, *arguments: Any) -> None:
        if getattr(self._library, f"AOTInductorModelContainer{name}")(*arguments):
            raise RuntimeError(f"the compiled step failed in {name}; the line above says where.")

    def _count(self, what: str) -> int:
        count = ctypes.c_size_t()
        self._do(f"GetNum{what}", self._container, ctypes.byref(count))
        return count.value


def _keep_freed_memory() -> None:
    """Has glibc keep what a call frees for the next: to fault 10 MB in again took a quarter of a call's time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, -1)
        mallopt(mmap_threshold, 2**30)


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def compiled(
    module: nn.Module,
    inputs: tuple[Any, ...],
    dynamic: tuple[Any, ...],
    key: str,
    folder: Path,
    say: Callable[[str], None] = print,
) -> SharedObject:
    """``module(*inputs)`` as a shared object, from ``folder`` if it was compiled before.

    ``dynamic``: as `torch.export.export`'s ``dynamic_shapes``; ``key``: text that tells one computation from another.
    Ranks of one machine compile once: the others wait.
    """

    def make(path: Path) -> None:
        say("compiling the step: 10 to 30 s, this once ...")
        began = time.monotonic()
        _compile(module, inputs, dynamic, path)
        say(f"compiled in {time.monotonic() - began:.0f} s, kept in {folder}")

    name = hashlib.sha256("\n".join([key, *_environment()]).encode()).hexdigest()[:32]
    return SharedObject(kept(folder / f"{name}.so", make))


def _environment() -> list[str]:
    """All that a compiled step depends on besides its graph."""
    capability = torch.backends.cpu.get_cpu_capability()
    return [_FORMAT, torch.__version__, platform.machine(), capability, f"{torch.get_num_threads()} threads"]


def _compile(module: nn.Module, inputs: tuple[Any, ...], dynamic: tuple[Any, ...], path: Path) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch._inductor").setLevel(logging.ERROR)
        exported = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(path.with_suffix(".pt2")))
        with zipfile.ZipFile(package) as archive:
            (member,) = (each for each in archive.namelist() if each.endswith(".so"))
            with archive.open(member) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
