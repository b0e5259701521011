"""Reads that fail or never come back, in a thread: the caller has the error and its place, or the shard's name."""

import os
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from servers import faulty
from shard_tools import csr, ragged, write_folder

from trainer.data.plan import Mixing, Plan
from trainer.data.shards import folder as shard_folder
from trainer.data.shards import verify
from trainer.data.shards.cache import RemoteFiles, ShardCache
from trainer.data.shards.folder import ShardFolder
from trainer.data.shards.read_thread import ReadThread, within
from trainer.data.shards.reader import Reader
from trainer.data.shards.remote import Store
from trainer.engine.datamodule import ChunkData, Cuts, Ranks, RowTensors, spans
from trainer.errors import UserError

SOON = 1.0  # seconds to wait for what never comes
BLOCKS = [10] * 10


@pytest.fixture
def folder(tmp_path: Path) -> ShardFolder:
    """Ten blocks, each a shard of its own."""
    write_folder(tmp_path / "train", {"x": np.arange(100)}, BLOCKS, shard_bytes=1)
    return ShardFolder(tmp_path / "train", timeout=SOON)


def chunks(folder: ShardFolder) -> Iterator[Any]:
    plan = Plan(folder.block_rows, 5, 1, 10, Mixing(run_rows=256, pool_blocks=1))
    reader = Reader(folder, plan, ["x"], [[0]])
    try:
        yield from reader.chunks(spans(0, 10, lambda: 1))
    finally:
        reader.close()


@pytest.fixture
def stuck() -> Iterator[threading.Event]:
    """Lets go, at the end, of whoever waits for it."""
    event = threading.Event()
    yield event
    event.set()


def test_a_read_that_never_returns_names_the_shard(
    folder: ShardFolder, stuck: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a dead NFS: the chunks before are given, and nothing waits for the thread."""
    inner, reads = os.preadv, 0

    def preadv(*given: Any) -> int:
        nonlocal reads
        reads += 1
        if reads == 5:
            stuck.wait()
        return inner(*given)

    monkeypatch.setattr(shard_folder.os, "preadv", preadv)
    given = []
    with pytest.raises(
        UserError, match=rf"^nothing of shard {folder.place}/\d{{6}}\.tar has arrived for 1 s \(data\.timeout=\): "
    ):
        given.extend(chunks(folder))
    assert len(given) == 4
    assert "\n" not in folder.reading(next(iter(folder._reading))).what


def test_a_check_of_all_shards_does_not_wait_for_one_for_ever(
    folder: ShardFolder, stuck: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not come is no damage: verifying names it among the others, and nothing is left out for it."""
    inner, path = ShardFolder._member, f"{folder.place}/000003.tar"

    def member(own: ShardFolder, s: int, *given: Any) -> Any:
        if s == 3:
            stuck.wait()
        return inner(own, s, *given)

    monkeypatch.setattr(ShardFolder, "_member", member)
    monkeypatch.setattr(verify, "ShardFolder", lambda *given, **more: folder)
    (Path(folder.place) / "000005.tar").unlink()
    missing, waiting = f"shard {folder.place}/000005.tar is missing", f"nothing of shard {path} has arrived for 1 s"
    damaged = verify.verify(Path(folder.place)).damaged
    assert [sentence.startswith(each) for sentence, each in zip(damaged, (waiting, missing), strict=True)] == [True] * 2
    with pytest.raises(UserError, match=waiting):
        verify.bad_blocks(folder, range(10))
    assert list(verify.bad_blocks(folder, [4, 5, 6])) == [5]


def test_a_pipe_in_place_of_a_shard_is_named(folder: ShardFolder) -> None:
    path = Path(folder.place) / "000003.tar"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=rf"nothing of shard {path} has arrived"):
        list(chunks(folder))
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))  # lets the thread go


def test_a_server_that_accepts_and_never_answers(tmp_path: Path, folder: ShardFolder) -> None:
    """The shard is named sooner than all attempts at it would end."""
    with faulty(tmp_path) as server:
        server.faults = {shard.name: ["slow"] for shard in folder.index.shards}
        files = RemoteFiles(Store(f"{server.url}/train", timeout=20.0), ShardCache(tmp_path / "cache", timeout=20.0))
        with pytest.raises(UserError, match=rf"nothing of shard {server.url}/train/\d{{6}}\.tar has arrived for 1 s"):
            list(chunks(ShardFolder(files, timeout=SOON)))


def test_slow_is_not_stuck(folder: ShardFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of many reads may take longer than the timeout, each of which is for itself."""
    inner = os.preadv
    monkeypatch.setattr(shard_folder.os, "preadv", lambda *given: (time.sleep(0.3), inner(*given))[1])
    folder.timeout = 2.0
    reader = Reader(folder, Plan(folder.block_rows, 5, 1, 100), ["x"], [[0]])
    (chunk,) = reader.chunks([(0, 1)])
    reader.close()
    assert sorted(chunk.columns["x"].ravel().tolist()) == list(range(100))


def test_bytes_that_arrive_for_another_process_count(folder: ShardFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a shard is fetched, by whomever, its `.part` grows: asked after each silence, until it does not."""
    quiet = iter([0.1, 0.2, 0.3])
    monkeypatch.setattr(folder.files, "quiet", lambda shard: next(quiet, float("inf")))
    hold = threading.Event()
    folder.note([3])
    thread = ReadThread(0.4, lambda ident: folder.reading(threading.get_ident()))
    with pytest.raises(UserError, match=r"000003\.tar has arrived for 0\.4 s"):
        thread.result(thread.submit(hold.wait))
    assert next(quiet, None) is None
    hold.set()
    thread.close()


def test_the_age_of_a_part_is_that_of_its_last_bytes(tmp_path: Path, folder: ShardFolder) -> None:
    cache, shard = ShardCache(tmp_path), folder.index.shards[0]
    files = RemoteFiles(Store("http://127.0.0.1:9/x"), cache)
    assert files.quiet(shard) == folder.files.quiet(shard) == float("inf")
    part = tmp_path / f"{shard.sha256}.part"
    part.touch()
    os.utime(part, (time.time() - 100,) * 2)
    assert 99 < files.quiet(shard) < 200


def test_any_exception_of_the_thread_reaches_the_caller_with_its_traceback(
    folder: ShardFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any) -> None:
        raise MemoryError("as large as that")

    monkeypatch.setattr(Reader, "_gather", broken)
    rows = RowTensors(("x",), torch.float32)
    data = ChunkData(folder, Plan(folder.block_rows, 5, 1, 10), Ranks(1, 0, 1, 1), rows, Cuts(1))
    data.last = 5
    before = set(threading.enumerate())  # with those that earlier tests left stuck on purpose
    with pytest.raises(MemoryError, match="as large as that") as raised:
        list(data)
    places = [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert {"_make", "chunk", "broken"} <= set(places)
    assert not [thread for thread in threading.enumerate() if thread.name == "reader" and thread not in before]


def test_a_timeout_of_the_call_itself_is_its_own() -> None:
    def late() -> None:
        raise TimeoutError("of a library")

    with pytest.raises(TimeoutError, match="of a library"):
        within(60.0, lambda ident: None, late)
    with pytest.raises(UserError, match=r"data\.timeout=0 must be more than 0"):
        within(0.0, lambda ident: None, late)


@pytest.mark.parametrize("floats", [None, np.dtype("float32")], ids=["as stored", "as float32"])
def test_the_memory_of_the_chunks_is_what_it_is_said_to_be(tmp_path: Path, floats: np.dtype | None) -> None:
    """The ring's arrays, of dense, csr and ragged columns, are three times the steps' bytes, and no more."""
    count = 400
    table = {
        "wide": np.zeros((count, 300)),
        "y": np.arange(count, dtype="int8"),
        "words": csr(count),
        "tail": ragged(count),
    }
    write_folder(tmp_path / "train", table, [40] * 10)
    folder = ShardFolder(tmp_path / "train")
    plan = Plan(folder.block_rows, 1, 4, 40, Mixing(run_rows=4))
    reader = Reader(folder, plan, list(table), [[0, 1], [2, 3]], with_row_id=True, floats=floats)
    steps = reader.most_steps(10 * 3 * reader.step_bytes)
    assert steps == 10
    assert reader.most_steps(10 * 3 * reader.step_bytes, unit=4) == 8
    assert reader.most_steps(10 * 3 * reader.step_bytes - 1) == 9
    rings: list[dict[str, np.ndarray]] = [{} for _ in range(3)]
    reader._ring = iter(rings * 3)
    for chunk in reader.chunks([(10 * k, 10) for k in range(6)]):
        assert len(chunk.batch_rows) == 10
    reader.close()
    held = sum(array.nbytes for ring in rings for array in ring.values())
    of_offsets = 3 * 8 * (plan.capacity * 2 + 1) * 2 * 2 * steps  # made anew for each chunk
    allowed = 3 * steps * reader.step_bytes
    assert 0.9 * allowed < held + of_offsets < 1.01 * allowed
    with pytest.raises(
        UserError,
        match=r"take \d[\d,]* bytes on a rank, 3 times over .* where data\.memory=1000: give data\.memory=(\d+),",
    ):
        reader.most_steps(1000)
