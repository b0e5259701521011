"""What Inductor compiles is begun side by side, and linked when all of it is there; with a compiler that only notes."""

import threading
from contextvars import ContextVar
from pathlib import Path

import pytest
from torch._inductor import codecache

from trainer.inference.programs import side_by_side
from trainer.inference.programs.side_by_side import SideBySide

LEVEL = ContextVar("LEVEL", default="none")


class Options:
    def __init__(self, compile_only=False, **_):
        self.compile_only = compile_only


class Noting:
    """As much of Inductor's builder as is used; ``held`` files end when they are let go."""

    built: list
    held: dict

    def __init__(self, name, sources, options, folder):
        self.name, self._compile_only, self._do_link = name, options.compile_only, not options.compile_only
        self._sources_args, self.folder = sources, folder

    def get_target_file_path(self):
        return f"{self.folder}/{self.name}.o"

    def build(self):
        if self.name in self.held and not self.held[self.name].wait(20):
            raise TimeoutError(self.name)
        if self.name == "broken":
            raise RuntimeError("broken.cpp does not compile")
        self.built.append((self.name, self._sources_args, LEVEL.get()))


@pytest.fixture
def inductor(monkeypatch):
    """The builder that Inductor finds; torch's own is back at the end."""
    Noting.built, Noting.held = [], {}
    monkeypatch.setattr(side_by_side, "CppBuilder", Noting)
    monkeypatch.setattr(side_by_side, "CppTorchDeviceOptions", Options)
    monkeypatch.setattr(side_by_side, "_aot_options", dict)
    monkeypatch.setattr(side_by_side, "_headers", lambda: None)
    monkeypatch.setattr(codecache, "CppBuilder", Noting)
    return Noting


def made(name, sources, compile_only=True):
    """As Inductor does it."""
    codecache.CppBuilder(name, sources, Options(compile_only), "out").build()


def names(inductor):
    return {name for name, _, _ in inductor.built}


def test_compiling_does_not_wait_and_linking_does(inductor):
    inductor.held = {name: threading.Event() for name in ("kernel", "wrapper")}
    with SideBySide(Path("noise.cpp"), Path("out")) as side:
        assert side.began == 0.0
        made("kernel", "kernel.cpp")
        made("wrapper", "wrapper.cpp")
        assert side.began > 0.0
        assert not names(inductor) & {"kernel", "wrapper"}
        for event in inductor.held.values():
            event.set()
        made("linked", "kernel.o wrapper.o", compile_only=False)
        assert names(inductor) == {"noise", "kernel", "wrapper", "linked"}
    assert inductor.built[-1][:2] == ("linked", "kernel.o wrapper.o out/noise.o")


def test_what_is_not_cpp_is_compiled_at_once(inductor):
    with SideBySide(Path("noise.cpp"), Path("out")) as side:
        made("assembly", "weights.S")
        assert "assembly" in names(inductor)
        assert side.began == 0.0


def test_a_file_that_does_not_compile_is_an_error_where_it_is_linked(inductor):
    with SideBySide(Path("noise.cpp"), Path("out")):
        made("broken", "broken.cpp")
        with pytest.raises(RuntimeError, match=r"broken\.cpp does not compile"):
            made("linked", "broken.o", compile_only=False)
    assert "linked" not in names(inductor)


def test_settings_of_the_context_hold_in_the_other_threads(inductor):
    token = LEVEL.set("quick")
    try:
        with SideBySide(Path("noise.cpp"), Path("out")):
            made("kernel", "kernel.cpp")
    finally:
        LEVEL.reset(token)
    assert {level for _, _, level in inductor.built} == {"quick"}


@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_inductor_has_its_builder_back_however_it_ends(inductor, error):
    def run():
        with SideBySide(Path("noise.cpp"), Path("out")):
            assert codecache.CppBuilder is not inductor
            if error:
                raise error

    if error:
        with pytest.raises(error):
            run()
    else:
        run()
    assert codecache.CppBuilder is inductor
    assert names(inductor) == {"noise"}  # nothing is still to come
