"""Objects that the C++ compiler makes side by side, where Inductor has them made one after another."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from pathlib import Path
from typing import Any

from torch._inductor import codecache
from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions
from torch._inductor.cpu_vec_isa import pick_vec_isa


class SideBySide:
    """While it is entered, what Inductor compiles ahead of time for the CPU is compiled side by side, and linked with
    ``source``, a file of C++, which is compiled at once.
    """

    def __init__(self, source: Path, folder: Path):
        self.began = 0.0
        """When Inductor had its first file ready for the compiler (`time.monotonic`)."""
        self._source, self._folder = source, folder
        self._coming: list[Future[None]] = []

    def __enter__(self) -> "SideBySide":
        self._pool = ThreadPoolExecutor(3)
        options = CppTorchDeviceOptions(compile_only=True, **_aot_options())
        ours = CppBuilder(self._source.stem, str(self._source), options, str(self._folder))
        self._object = ours.get_target_file_path()
        self._submit(ours.build)
        self._submit(_headers)
        codecache.CppBuilder = self._builder()  # type: ignore[misc]
        return self

    def __exit__(self, *error: object) -> None:
        codecache.CppBuilder = CppBuilder  # type: ignore[misc]
        self._pool.shutdown()

    def _submit(self, build: Any) -> None:
        context = copy_context()  # Inductor's settings are the context's
        self._coming.append(self._pool.submit(lambda: context.run(build)))

    def _builder(self) -> type[CppBuilder]:
        outer = self

        class Builder(CppBuilder):
            def build(self) -> None:
                if self._compile_only and self._sources_args.endswith(".cpp"):
                    outer.began = outer.began or time.monotonic()
                    outer._submit(super().build)
                    return
                if self._do_link:
                    for each in outer._coming:
                        each.result()
                    self._sources_args += f" {outer._object}"
                super().build()

        return Builder


def _aot_options() -> dict[str, Any]:
    return {"vec_isa": pick_vec_isa(), "device_type": "cpu", "aot_mode": True}


def _headers() -> None:
    """Compiles the headers of every step, once for all models, before Inductor asks for them.

    Where another torch does that otherwise, it is done when it asks.
    """
    with suppress(Exception):
        line = repr(CppBuilder("o", "i", CppTorchDeviceOptions(**_aot_options())).get_command_line())
        command = {**_aot_options(), "use_mmap_weights": False, "use_mmap_weights_external": False,
                   "use_relative_path": False}  # fmt: skip
        wrapper = codecache._get_cpp_wrapper_header("cpu", aot_mode=True)
        codecache._precompile_header(wrapper, line, min_optimize=True, **command)
        kernels = codecache._get_cpp_prefix_header("cpu")
        if kernels is not None:
            codecache._precompile_header(kernels, line, **command)
