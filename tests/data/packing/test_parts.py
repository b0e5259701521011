"""One table packed by several workers and jobs: the bytes of one, whatever was stopped and run again."""

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_tools import csr, ragged

from trainer.data.packing.pack import pack
from trainer.data.packing.parts import PartOf, Parts, _share
from trainer.data.packing.runs import RunsFile
from trainer.data.shards.tar import ShardWriter
from trainer.data.sources import memory
from trainer.data.sources.memory import MemorySource
from trainer.data.sources.synthetic import SyntheticSource
from trainer.errors import UserError

ROWS = 3000
SMALL = {"block_rows": 100, "shard_bytes": 30_000, "held_out": 0.2}
VARYING = ("words", "marks")
OPTIONS: dict[str, dict[str, Any]] = {
    "rows": {"standardize": ["x"]},
    "values": {"split_by": "team"},
    "groups": {"group_by": "team", "standardize": ["x"], "columns": {"x": "x", "row": "row", "word": "word"}},
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_PIECE_ROWS", 300)


def source(without: tuple[str, ...] = ()) -> MemorySource:
    """Ten pieces of dense, sparse, ragged and text columns."""
    generator = np.random.default_rng(0)
    table = {
        "row": np.arange(ROWS),
        "x": generator.normal(5, 3, (ROWS, 4)),
        "words": csr(ROWS, 70_000),
        "marks": ragged(ROWS, ()),
        "word": generator.choice(["a", "b", "c"], ROWS),
        "team": generator.integers(0, 200, ROWS),
    }
    return MemorySource({name: values for name, values in table.items() if name not in without})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def case(name: str) -> tuple[MemorySource, dict[str, Any]]:
    return source(VARYING if name == "groups" else ()), {**SMALL, **OPTIONS[name]}


@pytest.mark.parametrize("name", OPTIONS)
def test_neither_memory_nor_workers_change_a_byte(tmp_path: Path, name: str) -> None:
    table, options = case(name)
    pack(table, tmp_path / "one", workers=1, **options)
    assert len(contents(tmp_path / "one")) > 6
    for bytes_, workers in itertools.product((1 << 16, 1 << 20, 1 << 30), (1, 3)):
        pack(table, tmp_path / "out", workers=workers, memory_bytes=bytes_, overwrite=True, **options)
        assert contents(tmp_path / "out") == contents(tmp_path / "one"), (bytes_, workers)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("parts", "rounds"), [(1, 1), (3, 1), (3, 2), (20, 2)])
def test_parts_in_any_order_give_the_bytes_of_one_process(tmp_path: Path, name: str, parts: int, rounds: int) -> None:
    """Of 20 parts half have no piece. In a second round parts make shards; in one round `finish` does."""
    table, options = case(name)
    pack(table, tmp_path / "one", **options)
    job, rows, made = Parts(tmp_path / "out"), 0, 0
    for _ in range(rounds):
        for part in np.random.default_rng(parts).permutation(parts) + 1:
            rows += job.read(table, PartOf(int(part), parts), memory_bytes=1 << 18, workers=2, **options) or 0
            made += 0 if job.missing() else job.write(PartOf(int(part), parts), memory_bytes=1 << 18, workers=2)
    assert rows == ROWS
    job.finish(memory_bytes=1 << 17)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert sorted(os.listdir(tmp_path)) == ["one", "out"]
    tars = [name for name in contents(tmp_path / "out") if name.endswith(".tar")]
    assert made == (len(tars) if rounds == 2 else made)
    assert made > 0  # the last part to be read finds all there


def test_a_synthetic_table_is_packed_in_parts(tmp_path: Path) -> None:
    def sample(generator: np.random.Generator, first_row: int, count: int) -> dict[str, np.ndarray]:
        return {"x": generator.normal(size=(count, 2)), "row": np.arange(first_row, first_row + count)}

    table = SyntheticSource(sample, 600_000, seed=1)
    assert len(table.piece_rows) == 3
    pack(table, tmp_path / "one")
    job = Parts(tmp_path / "out")
    assert sum(job.read(table, PartOf(part, 2)) or 0 for part in (1, 2)) == 600_000
    job.finish()
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_parts_share_the_rows() -> None:
    pieces = [5, 1, 1, 1, 9, 2, 0, 3]
    for parts in (1, 2, 3, 8, 50):
        shares = [_share(pieces, PartOf(part, parts)) for part in range(1, parts + 1)]
        assert [piece for share in shares for piece in share] == list(range(8))


def test_missing_parts_are_named(tmp_path: Path) -> None:
    job = Parts(tmp_path / "out")
    with pytest.raises(UserError, match=r"there are no parts in .*out\.parts"):
        job.finish()
    job.read(source(), PartOf(2, 4))
    assert job.missing() == [1, 3, 4]
    with pytest.raises(UserError, match=r"of the 4 parts in .* these are missing: 1, 3, 4; run each again"):
        job.finish()
    assert not (tmp_path / "out").exists()


def test_parts_of_other_options_or_another_table_are_refused(tmp_path: Path) -> None:
    job = Parts(tmp_path / "out")
    job.read(source(), PartOf(1, 2), seed=1)
    for table, parts, options in (
        (source(), 2, {"seed": 2}),
        (source(), 3, {"seed": 1}),
        (source(("word",)), 2, {"seed": 1}),
    ):
        with pytest.raises(UserError, match="were given other options, or another table, than part 2"):
            job.read(table, PartOf(2, parts), **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="part=3/2 is not a part"):
        job.read(source(), PartOf(3, 2), seed=1)


def test_an_out_that_exists_is_kept_unless_asked(tmp_path: Path) -> None:
    pack(source(), tmp_path / "out", seed=9)
    before, job = contents(tmp_path / "out"), Parts(tmp_path / "out")
    with pytest.raises(UserError, match="exists: choose another out="):
        job.read(source(), PartOf(1, 1))
    job.read(source(), PartOf(1, 1), overwrite=True)
    assert contents(tmp_path / "out") == before
    with pytest.raises(UserError, match="exists: choose another out="):
        job.finish()
    job.finish(overwrite=True)
    assert contents(tmp_path / "out") != before
    assert os.listdir(tmp_path) == ["out"]


def test_a_full_disk_ends_a_part_whose_work_is_done_when_it_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    pack(source(), tmp_path / "one", **SMALL)
    job = Parts(tmp_path / "out")
    job.read(source(), PartOf(1, 2), **SMALL)
    with monkeypatch.context() as broken:
        broken.setattr(RunsFile, "_keep", full)
        with pytest.raises(UserError, match=r"no space is left on the disk of '.*out'"):
            job.read(source(), PartOf(2, 2), **SMALL)
    assert job.missing() == [2]
    assert sorted(os.listdir(job.folder)) == ["packed", "part-1-of-2.rows", "plan.json"]
    job.read(source(), PartOf(2, 2), **SMALL)
    with monkeypatch.context() as broken:
        broken.setattr(ShardWriter, "close", full)
        with pytest.raises(UserError, match=r"no space is left on the disk of '.*out'"):
            job.finish()
    assert not (tmp_path / "out").exists()
    job.finish()
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_a_finish_that_was_killed_at_any_step_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps are the renames and removals, each of which in turn is the last."""

    class Killed(BaseException):
        pass

    pack(source(), tmp_path / "one", **SMALL)
    job = Parts(tmp_path / "out")
    steps = 0
    for last in itertools.count():
        if not (tmp_path / "out").exists() and not job.folder.exists():
            for part in (1, 2):
                job.read(source(), PartOf(part, 2), **SMALL)
        seen = 0

        def dying(call: Any, last: int = last) -> Any:
            def step(*given: Any, **named: Any) -> Any:
                nonlocal seen
                seen += 1
                if seen > last:
                    raise Killed
                return call(*given, **named)

            return step

        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", dying(Path.rename))
            patched.setattr(os, "replace", dying(os.replace))
            patched.setattr(shutil, "rmtree", dying(shutil.rmtree))
            try:
                job.finish()
                break
            except Killed:
                steps += 1
    job.finish() if job.folder.exists() else None
    assert steps > 5
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert not job.folder.exists()


def test_half_a_file_of_rows_is_none(tmp_path: Path) -> None:
    job = Parts(tmp_path / "out")
    job.read(source(), PartOf(1, 1))
    (file,) = job.folder.glob("part-*.rows")
    whole = file.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"part-1-of-1\.rows' is incomplete: remove it"):
            job.missing()


def test_the_first_bad_row_is_named_whoever_finds_one(tmp_path: Path) -> None:
    x = np.zeros(ROWS)
    x[[650, 1300, 2900]] = np.nan
    for workers in (1, 4):
        with pytest.raises(UserError, match=r"no value for 'x' in row 650 \(counted from 0\)"):
            pack(MemorySource({"x": x}), tmp_path / "out", workers=workers)
    with pytest.raises(UserError, match=r"no value for 'x' in row 1300 "):
        Parts(tmp_path / "out").read(MemorySource({"x": x}), PartOf(3, 6), workers=2)
    assert "out" not in os.listdir(tmp_path)


def test_bad_resources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="workers=0 is too few"):
        pack(source(), tmp_path / "out", workers=0)
    with pytest.raises(UserError, match="memory_bytes=10 is too little"):
        Parts(tmp_path / "out").read(source(), PartOf(1, 1), memory_bytes=10)


KILLED = """
import sys
from trainer.data.packing.parts import PartOf, Parts
part = PartOf(2, 2)
Parts(sys.argv[2]).read(sys.argv[1], part, workers=1, progress=lambda done, total: print(done, flush=True) or input())
"""


@pytest.mark.slow
def test_a_killed_part_is_started_again(tmp_path: Path) -> None:
    table = tmp_path / "t.parquet"
    rows = 600_000
    pq.write_table(pa.table({"x": np.arange(rows)}), table, row_group_size=300_000)
    pack(table, tmp_path / "one")
    job = Parts(tmp_path / "out")
    job.read(table, PartOf(1, 2))
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(table), str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process, process.stdin, process.stdout:
        assert 0 < int(process.stdout.readline()) < rows // 2
        assert len(list(job.folder.glob(".part-2-of-2.*"))) == 1
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    assert job.missing() == [2]
    assert job.read(table, PartOf(1, 2)) is None
    assert job.read(table, PartOf(2, 2)) == rows // 2
    assert not list(job.folder.glob(".part-*"))
    job.finish()
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
