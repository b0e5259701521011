"""Reading: the plan's rows to the bit, on any number of ranks, from any step, with nothing left behind."""

import gc
import mmap
import os
import threading
import weakref
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shard_tools import all_dtypes, flip, write_folder

from trainer.data.plan import Mixing, Plan
from trainer.data.shards import folder as shard_folder
from trainer.data.shards import gather as gathering
from trainer.data.shards.folder import ShardFolder, open_split
from trainer.data.shards.index import ROW_ID
from trainer.data.shards.reader import ChunkArrays, Reader
from trainer.engine.datamodule import ChunkData, Cuts, Ranks, RowTensors, spans
from trainer.errors import UserError

BLOCKS = [7, 1, 30, 2, 19, 30, 11, 8, 24, 5]
TABLE = all_dtypes(sum(BLOCKS))
linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux, whose /proc lists open files")
STARTS = np.cumsum([0, *BLOCKS])


@pytest.fixture
def folder(tmp_path: Path) -> ShardFolder:
    write_folder(tmp_path / "train", TABLE, BLOCKS, shard_bytes=20_000)
    return ShardFolder(tmp_path / "train")


def plan_of(folder: ShardFolder, lanes: int = 8, batch_size: int = 24) -> Plan:
    return Plan(folder.block_rows, 5, lanes, batch_size, Mixing(run_rows=3, pool_blocks=2))


def read(folder: ShardFolder, plan: Plan, ranks: Ranks, first: int, steps: int) -> ChunkArrays:
    reader = Reader(folder, plan, list(TABLE), ranks.lanes_by_group, with_row_id=True)
    try:
        return reader.chunk(first, steps)
    finally:
        reader.close()


def ids(chunk: ChunkArrays, k: int, a: int) -> list[int]:
    """The row numbers that count in one group of one step."""
    assert chunk.row_id is not None
    return chunk.row_id[k, a, : chunk.valid[k, a]].tolist()


def same_bits(one: ChunkArrays, other: ChunkArrays) -> bool:
    assert one.columns.keys() == other.columns.keys()
    pairs = [(one.columns[name], other.columns[name]) for name in one.columns]
    pairs += [(one.valid, other.valid), (one.batch_rows, other.batch_rows), (one.row_id, other.row_id)]  # type: ignore[list-item]
    return all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)


@pytest.mark.parametrize(
    ("lanes", "batch_size", "draws"),
    [(8, 24, 1), (8, 24, 4), (6, 6, 2), (1, 50, 1), (8, 137, 8), (150, 150, 150), (1, 1, 1)],
)
def test_a_chunk_holds_the_plans_rows_and_pads_with_real_ones(
    folder: ShardFolder, lanes: int, batch_size: int, draws: int
) -> None:
    """Two epochs; lanes that outnumber the rows give empty groups."""
    plan, ranks = plan_of(folder, lanes, batch_size), Ranks(1, 0, lanes, draws)
    steps = 2 * plan.steps_per_epoch
    chunk = read(folder, plan, ranks, 0, steps)
    assert chunk.batch_rows.tolist() == chunk.valid.sum(1).tolist() == [plan.rows_at(t).sum() for t in range(steps)]
    assert chunk.row_id is not None
    for k in range(steps):
        for a, group in enumerate(ranks.lanes_by_group):
            rows = [
                int(STARTS[b]) + first + i
                for lane in group
                for b, first, n in zip(*(column.tolist() for column in plan.pieces(k, lane)))
                for i in range(n)
            ]
            assert ids(chunk, k, a) == rows
            padding = chunk.row_id.shape[2] - len(rows)
            expected = np.array(rows + [rows[0] if rows else 0] * padding)
            assert chunk.row_id[k, a].tolist() == expected.tolist()
            for name, values in TABLE.items():
                assert chunk.columns[name][k, a].dtype == values.dtype
                assert chunk.columns[name][k, a].tobytes() == values[expected].tobytes()
    for epoch in range(2):
        counted = [
            row
            for k in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
            for a in range(len(ranks.groups))
            for row in ids(chunk, k, a)
        ]
        assert sorted(counted) == list(range(sum(BLOCKS)))


@pytest.mark.parametrize("draws", [1, 2, 4, 8])
def test_the_ranks_together_read_what_one_rank_reads(folder: ShardFolder, draws: int) -> None:
    """A draw's rows come in the same order whoever reads them; where ranks share a draw, one after the other."""
    plan, steps = plan_of(folder), 9
    alone = read(folder, plan, Ranks(1, 0, 8, draws), 4, steps)
    for world in (2, 4, 8):
        rows: list[list[list[int]]] = [[[] for _ in range(draws)] for _ in range(steps)]
        for rank in range(world):
            ranks = Ranks(world, rank, 8, draws)
            chunk = read(folder, plan, ranks, 4, steps)
            assert chunk.valid.shape == (steps, len(ranks.groups))
            assert chunk.batch_rows.tolist() == alone.batch_rows.tolist()
            for k in range(steps):
                for a, draw in enumerate(ranks.groups):
                    rows[k][draw] += ids(chunk, k, a)
        assert rows == [[ids(alone, k, a) for a in range(draws)] for k in range(steps)]


@pytest.mark.parametrize("step", [1, 5, 6, 7, 13])
def test_a_resumed_run_reads_what_an_uninterrupted_one_would_have(folder: ShardFolder, step: int) -> None:
    """An epoch has 6 steps; wherever the chunks end."""
    ranks, last = Ranks(1, 0, 8, 2), 14
    assert plan_of(folder).steps_per_epoch == 6

    def steps(first: int, slots: int) -> list[ChunkArrays]:
        reader = Reader(folder, plan_of(folder), list(TABLE), ranks.lanes_by_group, with_row_id=True)
        found = [
            ChunkArrays(
                {name: values[k].copy() for name, values in chunk.columns.items()},
                chunk.valid[k],
                chunk.batch_rows[k],
                chunk.row_id[k].copy(),  # type: ignore[index]
            )
            for chunk in reader.chunks(spans(first, last, lambda: slots, every=((5, 0),)))
            for k in range(len(chunk.valid))
        ]
        reader.close()
        return found

    whole, resumed = steps(0, 3), steps(step, 4)
    assert len(whole) == last
    assert len(resumed) == last - step
    assert all(same_bits(a, b) for a, b in zip(whole[step:], resumed, strict=True))


def test_a_chunk_stays_as_it_is_until_the_second_after_it_is_asked_for(folder: ShardFolder) -> None:
    """The memory of three chunks takes turns: while one is used the next is held and the one after it read."""
    plan, seen = plan_of(folder), []
    reader = Reader(folder, plan, list(TABLE), [list(range(8))], with_row_id=True)
    held: list[tuple[ChunkArrays, bytes]] = []
    for chunk in reader.chunks(spans(0, 40, lambda: 3)):
        assert chunk.row_id is not None
        held = [*held[-1:], (chunk, chunk.row_id.tobytes())]
        assert all(each.row_id is not None and each.row_id.tobytes() == bits for each, bits in held)
        seen.append(chunk.row_id.ctypes.data)
    reader.close()
    assert len(seen) == 14
    assert len(set(seen)) == 3


def test_values_come_in_the_types_that_are_trained_on(folder: ShardFolder) -> None:
    plan = plan_of(folder)
    stored = read(folder, plan, Ranks(1, 0, 8, 1), 0, 3)
    for floats in (np.dtype(np.float32), np.dtype(np.float64)):
        reader = Reader(folder, plan, list(TABLE), [list(range(8))], True, floats)
        chunk = reader.chunk(0, 3)
        reader.close()
        for name, values in stored.columns.items():
            wanted = {"f": floats, "b": np.dtype(bool)}.get(values.dtype.kind, np.dtype(np.int64))
            assert chunk.columns[name].dtype == wanted
            assert chunk.columns[name].tobytes() == values.astype(wanted).tobytes()


def test_chunks_end_where_something_else_happens() -> None:
    assert list(spans(3, 20, lambda: 4, ((5, 0), (7, 0)))) == [
        (3, 2),
        (5, 2),
        (7, 3),
        (10, 4),
        (14, 1),
        (15, 4),
        (19, 1),
    ]
    assert list(spans(3, 20, lambda: 9, ((6, 14),), (10,))) == [(3, 5), (8, 2), (10, 4), (14, 6)]
    assert list(spans(5, 5, lambda: 4)) == []


def test_a_reader_gives_only_the_columns_asked_for(folder: ShardFolder) -> None:
    reader = Reader(folder, plan_of(folder), ["int8"], [[0, 1]])
    chunk = reader.chunk(0, 1)
    reader.close()
    assert list(chunk.columns) == ["int8"]
    assert chunk.row_id is None
    with pytest.raises(UserError, match='no column "age"'):
        Reader(folder, plan_of(folder), ["age"], [[0]])


def test_the_splits_are_apart(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"x": np.zeros(5)}, [5])
    write_folder(tmp_path / "held_out", {"x": np.ones(3)}, [2, 1], first_id=5, split="held_out")
    train, held_out = open_split(tmp_path, "train"), open_split(tmp_path, "held_out")
    assert train is not None
    assert held_out is not None
    assert (train.num_rows, held_out.num_rows) == (5, 3)
    assert train.read_block(0, ROW_ID).tolist() == [0, 1, 2, 3, 4]
    assert np.concatenate([held_out.read_block(b, ROW_ID) for b in (0, 1)]).tolist() == [5, 6, 7]
    alone = open_split(tmp_path / "train", "train")
    assert alone is not None
    assert alone.num_rows == 5
    assert open_split(tmp_path / "train", "held_out") is None
    for path in (tmp_path / "none", Path(__file__).parent):
        with pytest.raises(UserError, match=r"no(t a)? shard folder"):
            open_split(path, "train")
    (tmp_path / "held_out" / "index.json").unlink()
    with pytest.raises(UserError, match=r"held_out/index\.json is missing"):
        open_split(tmp_path, "held_out")


# Reading ahead


def test_every_block_is_read_once_a_process(folder: ShardFolder) -> None:
    """Later its rows are copied out of a map."""
    reads: Counter = Counter()
    inner = folder.read_block
    folder.read_block = lambda block, name: reads.update([(block, name)]) or inner(block, name)  # type: ignore[method-assign,func-returns-value]
    plan = plan_of(folder)
    reader = Reader(folder, plan, ["int8", "float32"], Ranks(1, 0, 8, 1).lanes_by_group)
    assert len(list(reader.chunks(spans(0, 3 * plan.steps_per_epoch, lambda: 2)))) == 9
    reader.close()
    assert reads == dict.fromkeys(((block, name) for block in range(len(BLOCKS)) for name in ("int8", "float32")), 1)


@pytest.mark.parametrize("floats", [None, np.dtype(np.float32), np.dtype(np.float64)])
def test_rows_are_copied_alike(folder: ShardFolder, floats: np.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiled gather or by Python's, in the types stored or others, with pages asked for ahead or not."""
    plan = Plan(folder.block_rows, 5, 4, 24, Mixing(run_rows=256, pool_blocks=2))
    assert gathering._compiled() is not None
    found = []
    for compiler, ahead in (("cc", False), ("cc", True), ("false", False)):
        monkeypatch.setenv("CC", compiler)
        gathering._compiled.cache_clear()
        monkeypatch.setenv("XDG_CACHE_HOME", str(Path(folder.place) / compiler))
        assert (gathering._compiled() is None) == (compiler == "false")
        folder.__dict__["_exceeds_memory"] = ahead
        reader = Reader(folder, plan, list(TABLE), [[0, 1], [2, 3]], True, floats)
        found.append([reader.chunk(first, 9) for first in (0, 3)])
        reader.close()
    gathering._compiled.cache_clear()
    for other in found[1:]:
        assert all(same_bits(one, two) for one, two in zip(found[0], other))


def test_the_next_chunk_is_read_while_the_caller_uses_this_one(folder: ShardFolder) -> None:
    reader = Reader(folder, plan_of(folder), ["int8"], [[0, 1]])
    started: dict[int, threading.Event] = {step: threading.Event() for step in (0, 2, 4, 6)}
    inner = reader.chunk

    def chunk(first: int, *more: Any) -> ChunkArrays:
        assert threading.current_thread() is not threading.main_thread()
        started[first].set()
        return inner(first, *more)

    reader.chunk = chunk  # type: ignore[method-assign]
    chunks = reader.chunks(spans(0, 8, lambda: 2))
    next(chunks)
    assert started[2].wait(60)  # a deadlock's end, not a measure
    assert not started[4].is_set()
    assert len(list(chunks)) == 3
    reader.close()


def open_below(folder: Path) -> list[str]:
    """The files of ``folder`` that this process holds open; what other tests left running opens and closes its own."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return [path for path in found if path.startswith(str(folder))]


@linux
def test_abandoned_halfway_it_leaves_no_thread_and_no_file(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", TABLE, BLOCKS, shard_bytes=1)

    def readers() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name.startswith("reader") and t not in before]

    before = set(threading.enumerate())  # with those that earlier tests left stuck on purpose
    folder = ShardFolder(tmp_path / "train")
    rows = RowTensors(("int8",), torch.float32, with_row_id=True)
    data = ChunkData(folder, plan_of(folder), Ranks(1, 0, 8, 1), rows, Cuts(2))
    data.last = 1000
    for count, chunk in enumerate(data):
        assert chunk.columns["int8"].shape[0] == 2
        if count == 3:
            assert readers()
            assert open_below(tmp_path)
            break
    del chunk
    assert not readers()
    del data, folder
    assert not open_below(tmp_path)


def test_a_member_is_hashed_once_a_process(folder: ShardFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    inner = shard_folder.xxhash.xxh3_64_hexdigest
    monkeypatch.setattr(shard_folder.xxhash, "xxh3_64_hexdigest", lambda data: hashed.append(len(data)) or inner(data))
    for block, name in ((0, "int8"), (0, "int8"), (0, "int64"), (1, "int8"), (0, "int64")):
        folder.read_block(block, name)
    assert len(hashed) == 3


@linux
def test_a_folder_of_many_shards_keeps_few_files_open(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"x": np.arange(200)}, [1] * 200, shard_bytes=1)
    folder = ShardFolder(tmp_path / "train")
    for block in (*range(200), 0, 199):
        assert folder.read_block(block, "x").tolist() == [block]
    assert 0 < len(open_below(tmp_path)) <= 64


@linux
def test_few_shards_are_mapped_at_a_time_and_none_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of an epoch over 300 shards, more than are mapped at once."""
    live: weakref.WeakSet = weakref.WeakSet()
    peak = [0]
    inner = mmap.mmap

    def counted(*given: Any, **more: Any) -> mmap.mmap:
        live.add(made := inner(*given, **more))
        peak[0] = max(peak[0], len(live))
        return made

    monkeypatch.setattr(shard_folder.mmap, "mmap", counted)
    write_folder(tmp_path / "train", {"x": np.arange(300)}, [1] * 300, shard_bytes=1)
    folder = ShardFolder(tmp_path / "train")
    reader = Reader(folder, Plan(folder.block_rows, 0, 8, 16), ["x"], [list(range(8))])
    for first in (0, 7):
        chunk = reader.chunk(first, 12)
        steps = [chunk.columns["x"][k, 0, : chunk.valid[k, 0]].tolist() for k in range(12)]
        assert steps == [
            [b for lane in range(8) for b in reader.plan.pieces(first + k, lane).block.tolist()] for k in range(12)
        ]
    assert 64 <= peak[0] <= 2 * 64
    assert 64 <= len(open_below(tmp_path)) <= 2 * 64
    reader.close()
    del folder, reader, chunk
    gc.collect()
    assert not live
    assert not open_below(tmp_path)


# Damage that comes to light while reading


def test_damage_ahead_is_raised_when_its_turn_comes(folder: ShardFolder) -> None:
    """The chunks before it are given; then one sentence that names shard and block, from the reader's thread."""
    plan = Plan(folder.block_rows, 0, 1, 10, Mixing(run_rows=256, pool_blocks=1))
    last = int(plan.pieces(plan.steps_per_epoch - 1, 0).block[-1])
    flip_payload(folder, last, "int32")
    reader = Reader(folder, plan, ["int32"], [[0]])
    given = []
    with pytest.raises(UserError, match=rf'\.tar, block {last}, column "int32" does not match its hash: copy .*\.$'):
        given.extend(reader.chunks(spans(0, plan.steps_per_epoch, lambda: 1)))
    reader.close()
    clean = [last not in plan.pieces(t, 0).block for t in range(plan.steps_per_epoch)]
    assert len(given) == clean.index(False) > 3
    Reader(folder, plan, ["int16"], [[0]]).chunk(0, plan.steps_per_epoch)  # another column is intact


def flip_payload(folder: ShardFolder, block: int, name: str) -> None:
    number = 0
    for shard in folder.index.shards:
        if number + len(shard.rows) > block:
            flip(Path(folder.place) / shard.name, shard.offsets[name][block - number] + 512 + 128)
            return
        number += len(shard.rows)


def test_a_shard_that_goes_away_after_it_was_opened_is_named(folder: ShardFolder) -> None:
    first = Path(folder.place) / folder.index.shards[0].name
    os.truncate(first, 700)
    with pytest.raises(UserError, match=r'000000\.tar, block 0, column "int8" ends too early'):
        folder.read_block(0, "int8")
    last = Path(folder.place) / folder.index.shards[-1].name
    last.unlink()
    with pytest.raises(UserError, match=rf"{last.name} is missing: copy it back"):
        folder.read_block(len(BLOCKS) - 1, "int8")
    last.mkdir()
    with pytest.raises(UserError, match=rf"{last.name} cannot be read \(Is a directory\)"):
        folder.read_block(len(BLOCKS) - 1, "int8")
