"""A compiled chunk: a graph of operations as a shared object that runs without Python, and the noise it takes.

Inductor has compiled it ahead of time (AOTInductor); we call its C interface through ctypes, which lets go of Python's
lock (torch's own binding holds it), so that another thread reads the next chunk meanwhile.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class SharedObject:
    """A compiled function of tensors."""

    def __init__(self, path: Path):
        _keep_freed_memory()
        self._library = ctypes.CDLL(str(path))
        self._container = ctypes.c_void_p()
        self._do("CreateWithDevice", ctypes.byref(self._container), ctypes.c_size_t(1), b"cpu", None)
        self._inputs, self._outputs = self._count("Inputs"), self._count("Outputs")
        self._normals = {torch.float32: self._library.normals32, torch.float64: self._library.normals64}
        for function in self._normals.values():
            function.restype = None
            function.argtypes = [*[ctypes.c_int64] * 7, *[ctypes.c_void_p] * 2, ctypes.c_int64, ctypes.c_void_p]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for contiguous ``inputs`` of the shapes it was compiled for."""
        assert len(inputs) == self._inputs
        handles = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([each.contiguous() for each in inputs])
        given = (ctypes.c_void_p * self._inputs)(*(_pointer(handle, None) for handle in handles))
        made = (ctypes.c_void_p * self._outputs)()
        count_in, count_out = ctypes.c_size_t(self._inputs), ctypes.c_size_t(self._outputs)
        self._do("Run", self._container, given, count_in, made, count_out, None, None)
        return torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([_capsule(each, None, None) for each in made])

    def noise(
        self, size: tuple[int, int], seed: int, steps: range, draws: Tensor, row_id: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """As `trainer.inference.model.noise.chunk_noise`, by normals.cpp."""
        (groups, pairs), (elements, per_row) = draws.shape, size
        draws = draws.flatten().contiguous()

        def normals(rows: int, count: int, ids: Tensor | None) -> Tensor:
            out = torch.empty(len(steps), groups, pairs, rows, count, dtype=dtype)
            place = None if ids is None else ids.data_ptr()
            self._normals[dtype](
                seed, steps.start, len(steps), len(draws), groups, rows, count, draws.data_ptr(), place,
                torch.get_num_threads(), out.data_ptr(),
            )  # fmt: skip
            return out

        by_element = normals(1, elements, None)[:, :, :, 0]
        if not per_row:
            return by_element, None
        assert row_id is not None, "a guide with local latents needs row ids"
        ids = row_id.contiguous()
        return by_element, normals(ids.shape[-1], per_row, ids)

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
