"""The compiled step is found again by any later process, and a compilation leaves nothing behind, however it ends."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from fused_process import dense, key_of, program
from svi_problems import regression

from trainer.cache import cache_folder
from trainer.inference.model.noise import chunk_noise
from trainer.inference.programs import compiling
from trainer.inference.programs.compiler import compiler_line
from trainer.inference.programs.compiling import _code
from trainer.inference.programs.tracing import Untraceable

pytestmark = [pytest.mark.xdist_group("fused"), pytest.mark.timeout(600)]
HERE = Path(__file__).parents[1]
FOREVER = "import subprocess; subprocess.run(['sleep', '600'])"


@pytest.mark.slow
def test_three_processes_compile_once(compiled_folder, tmp_path):
    """With other hash seeds, and the model in other files; no key depends on either, or on addresses."""
    found = [in_a_process(compiled_folder, tmp_path / str(seed), seed) for seed in (1, 2, 3)]
    said = [line for each in found for line in each["said"]]
    assert said.count("compiled step found in the cache") >= 2
    assert sum(line.startswith("compiling") for line in said) <= 1
    for other in found[1:]:
        assert other["keys"] == found[0]["keys"]
        assert other["theta"] == found[0]["theta"]
    keys = found[0]["keys"]
    assert keys.pop("regression of a file") == keys["regression"]
    assert len(set(keys.values())) == len(keys)
    kept = compiled_folder / "svi-trainer" / "steps"  # other tests keep theirs there too
    assert {path.suffix for path in kept.iterdir()} == {".so"}


def in_a_process(cache: Path, folder: Path, seed: int) -> dict:
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(seed), "XDG_CACHE_HOME": str(cache),
                   "PYTHONPATH": f"{HERE.parents[1]}:{HERE}"}  # fmt: skip
    command = [sys.executable, str(HERE / "fused_process.py"), str(folder)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.float64, 4e-15)])
@pytest.mark.parametrize(
    ("groups", "pairs", "rows", "size"), [(1, 1, 5, (9, 0)), (2, 3, 33, (1, 2)), (3, 1, 700, (0, 5))]
)
def test_compiled_noise_is_that_of_torch(shared_object, dtype, rounding, groups, pairs, rows, size):
    """Steps, rows and seeds of more than 32 bits; with two threads the same bits."""
    generator = torch.Generator().manual_seed(1)
    draws = torch.arange(groups * pairs).view(groups, pairs) + 7
    ids = torch.randint(0, 2**47, (4, groups, rows), generator=generator)
    seed, steps = (123 << 40) + 77, range(2**33 - 2, 2**33 + 2)
    want = chunk_noise(size, seed, torch.arange(steps.start, steps.stop), draws, ids, dtype)
    got = shared_object.noise(size, seed, steps, draws, ids, dtype)
    torch.set_num_threads(2)
    again = shared_object.noise(size, seed, steps, draws, ids, dtype)
    for a, b, c in zip(want, got, again):
        if a is not None:
            torch.testing.assert_close(b, a, rtol=0, atol=rounding)
            assert torch.equal(b, c)
    assert (got[1] is None) == (want[1] is None)


@pytest.fixture(scope="module")
def shared_object(compiled_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(compiled_folder))
        fused, state = program(regression, dense())
        fused.begin(state, dense(), lambda line: None)
        return fused._compilation.wait()


@pytest.fixture
def left(tmp_path, monkeypatch):
    """`left()`: what a compilation has left behind, besides what it keeps."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return lambda: [*tmp_path.glob("svi-step-*"), *tmp_path.glob("cache/**/*.lock"), *tmp_path.glob("cache/**/*.part")]


def in_place_of_compiling(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Has the child run ``code`` on (given, folder, stages) in place of compiling."""
    lines = "".join(f"    {line}\n" for line in code.splitlines())
    patch = f"from trainer.inference.programs import compiler\ndef instead(given, folder, stages):\n{lines}"
    child = compiling._CHILD.replace("main(", f"{patch}compiler.compile_recipe = instead\nmain(")
    monkeypatch.setattr(compiling, "_CHILD", child)


def test_a_compiler_that_fails_is_named(left, monkeypatch):
    in_place_of_compiling(monkeypatch, "raise RuntimeError('it failed\\n\\nx.cpp:1: fatal error: torch.h')")
    fused, state = program(regression, dense())
    with pytest.raises(Untraceable, match=r"^the compiler: x\.cpp:1: fatal error: torch\.h$"):
        fused.prepare(state, dense(), lambda line: None)
    assert not left()


def test_a_child_that_cannot_start_is_named(left, monkeypatch):
    monkeypatch.setattr(compiling, "_CHILD", "import no_such_module")
    fused, state = program(regression, dense())
    with pytest.raises(Untraceable, match=r"^the compiler: ModuleNotFoundError: No module named 'no_such_module'"):
        fused.prepare(state, dense(), lambda line: None)
    assert not left()


def test_no_compiler_is_told_at_once(left, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    fused, state = program(regression, dense())
    with pytest.raises(Untraceable, match="no-such-compiler was not found: install it, or set CXX"):
        fused.begin(state, dense())
    assert not left()


def test_a_compilation_that_is_killed_or_abandoned_leaves_nothing(left, monkeypatch):
    in_place_of_compiling(monkeypatch, FOREVER)
    fused, state = program(regression, dense())
    fused.begin(state, dense(), lambda line: None)
    child = fused._compilation._process
    os.killpg(child.pid, signal.SIGKILL)
    with pytest.raises(Untraceable, match="ended by SIGKILL"):
        fused.prepare(state, dense())
    fused.begin(state, dense(), lambda line: None)
    child = fused._compilation._process
    fused.abandon()
    assert child.returncode == -signal.SIGKILL
    assert not left()
    fused.begin(state, dense(), lambda line: None)
    child = fused._compilation._process
    fused._coming, fused._compilation = None, None  # as where the program itself goes
    assert child.returncode == -signal.SIGKILL
    assert not left()


def test_a_signal_ends_the_wait_and_the_compilation(left, monkeypatch):
    in_place_of_compiling(monkeypatch, FOREVER)
    fused, state = program(regression, dense())
    fused.begin(state, dense(), lambda line: None)
    child = fused._compilation._process
    previous = signal.signal(signal.SIGALRM, _interrupted)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            fused.prepare(state, dense())
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert child.returncode == -signal.SIGKILL
    assert not left()


def _interrupted(number, frame):
    raise KeyboardInterrupt


def test_a_compilation_ends_with_its_parent(tmp_path):
    """And so do its own children."""
    script = (
        "import os, time; from pathlib import Path; from test_compiling import *\n"
        "with pytest.MonkeyPatch.context() as patch:\n"
        '    in_place_of_compiling(patch, \'open("begun", "x")\\n\' + FOREVER)\n'
        "    fused, state = program(regression, dense()); fused.begin(state, dense(), lambda line: None)\n"
        "    print(fused._compilation._process.pid, flush=True)\n"
        "    while not Path('begun').exists(): time.sleep(0.1)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    places = f"{HERE.parents[1]}:{HERE}:{Path(__file__).parent}"
    environment = {**os.environ, "PYTHONPATH": places, "TMPDIR": str(tmp_path),
                   "XDG_CACHE_HOME": str(tmp_path / "cache")}  # fmt: skip
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.killpg(int(done.stdout), 0)
            time.sleep(0.1)
    assert not [*tmp_path.glob("svi-step-*"), *tmp_path.glob("cache/**/*.*")]


def test_comments_are_no_part_of_a_key(tmp_path):
    one, same, other = (tmp_path / f"{name}.py" for name in ("one", "same", "other"))
    one.write_text("def f(x):\n    return x + 1  # why\n")
    same.write_text("# what\n\ndef f(x):\n\n    return (x + 1)\n")
    other.write_text("def f(x):\n    return x + 2\n")
    assert _code(one) == _code(same) != _code(other)


def test_the_line_that_tells_is_found():
    said = "C++ compile error\n\nCommand:\ng++ x.cpp\n\nOutput:\nx.cpp: In function 'f':\nx.cpp:3: error: no name\n"
    assert compiler_line(Exception(said)) == "x.cpp:3: error: no name"
    assert compiler_line(ValueError()) == "ValueError"


@pytest.mark.slow
def test_a_damaged_entry_is_made_again(compiled_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = copies(compiled_folder, monkeypatch)
    entry = cache_folder() / "steps" / made.name
    entry.parent.mkdir(parents=True)
    entry.write_bytes(b"")
    said, (fused, state) = [], program(regression, dense())
    fused.prepare(state, dense(), said.append)
    assert [line.split()[0] for line in said] == ["compiled", "compiling", "compiled"]
    assert entry.read_bytes() == made.read_bytes()
    assert torch.isfinite(fused.run(state, dense(), 6).state.theta).all()


@pytest.mark.slow
def test_where_nothing_can_be_kept_the_step_is_compiled_for_one_run(compiled_folder, tmp_path, monkeypatch):
    (tmp_path / "a file").write_text("in the place of a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    copies(compiled_folder, monkeypatch)
    said, (fused, state) = [], program(regression, dense())
    fused.prepare(state, dense(), said.append)
    assert "not kept" in said[-1]
    assert "Not a directory" in said[-1]
    assert torch.isfinite(fused.run(state, dense(), 6).state.theta).all()


def copies(compiled_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Has the child copy what was compiled before, or compile it now, in place of compiling it again."""
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(compiled_folder))
        fused, state = program(regression, dense())
        fused.prepare(state, dense(), lambda line: None)
        made = cache_folder() / "steps" / f"{key_of(fused, state, dense())}.so"
    in_place_of_compiling(monkeypatch, f"import shutil; shutil.copy({str(made)!r}, folder / 'step.so')")
    return made
