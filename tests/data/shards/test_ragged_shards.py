"""Sparse and ragged columns: to the bit as they were written, in slots that never overflow."""

import json
from pathlib import Path

import numpy as np
import pytest
from shard_tools import csr, flip, ragged, sign, write_folder

from trainer.data.fields import CsrRows, RaggedRows, VaryingRows, concatenate
from trainer.data.plan import Mixing, Plan
from trainer.data.shards import gather as gathering
from trainer.data.shards.files import read_index
from trainer.data.shards.folder import ShardFolder
from trainer.data.shards.ragged import most_entries
from trainer.data.shards.reader import Reader
from trainer.data.shards.tar import widest_of
from trainer.data.shards.verify import verify
from trainer.errors import UserError

BLOCKS = [7, 1, 30, 2, 19, 30, 11, 8, 24, 5]
COUNT = sum(BLOCKS)
TABLE = {
    "x": np.arange(COUNT),
    "words": csr(COUNT),
    "wide": csr(COUNT, 2**16 + 1, dtype="float64"),
    "marks": ragged(COUNT),
}


@pytest.fixture
def folder(tmp_path: Path) -> ShardFolder:
    write_folder(tmp_path / "train", TABLE, BLOCKS, shard_bytes=20_000)
    return ShardFolder(tmp_path / "train")


def rows_of(rows: VaryingRows) -> list[list[list]]:
    """Each row's entries, array by array."""
    bounds = list(zip(rows.offsets[:-1], rows.offsets[1:]))
    return [[each[first:stop].tolist() for each in rows.entries.values()] for first, stop in bounds]


WANTED = {name: rows_of(rows) for name, rows in TABLE.items() if not isinstance(rows, np.ndarray)}


def test_rows_are_taken_by_slices_masks_and_places_and_joined() -> None:
    for rows in (TABLE["words"], TABLE["marks"]):
        every = rows_of(rows)
        places = np.array([5, 5, 0, 136])
        assert rows_of(rows[10:20]) == every[10:20]
        assert rows_of(rows[20:10]) == [] == rows_of(rows[500:])
        assert rows_of(rows[places]) == [every[i] for i in places]
        assert rows_of(rows[np.arange(COUNT) % 3 == 1]) == every[1::3]
        assert rows_of(concatenate([rows[:50], rows[50:50], rows[50:]])) == every


def test_the_reader_refuses_what_the_writer_never_wrote(folder: ShardFolder) -> None:
    assert {part.name: part.dtype for c in folder.index.columns for part, _ in c.members} == {
        "x": "int64", "row_id": "int64",
        "words.ends": "int32", "words.indices": "uint16", "words.values": "uint16",
        "wide.ends": "int32", "wide.indices": "int32", "wide.values": "float64",
        "marks.ends": "int32", "marks.values": "float32",
    }  # fmt: skip
    for name, wanted in WANTED.items():
        found = [folder.read_block(b, name) for b in range(len(BLOCKS))]
        assert type(found[0]) is type(TABLE[name])
        assert rows_of(concatenate(found)) == wanted
    assert verify(Path(folder.place)).damaged == ()


def test_a_dense_folder_has_the_index_that_it_always_had(tmp_path: Path) -> None:
    index = write_folder(tmp_path / "a", {"x": np.arange(5)}, [5])
    text = (tmp_path / "a" / "index.json").read_text()
    assert not any(word in text for word in ('"kind"', '"entries"', '"widest"'))
    assert read_index(tmp_path / "a") == index


@pytest.mark.parametrize("name", ["words.ends", "words.indices", "words.values", "marks.values"])
def test_a_flipped_byte_is_found(folder: ShardFolder, name: str) -> None:
    shard = folder.index.shards[0]
    flip(Path(folder.place) / shard.name, shard.offsets[name][0] + 512 + 128)
    assert name in verify(Path(folder.place)).damaged[0]
    with pytest.raises(UserError, match=rf'"{name}" does not match its hash'):
        ShardFolder(Path(folder.place)).read_block(0, name.partition(".")[0])


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (CsrRows(np.array([0, 2]), np.array([0, 50]), np.ones(2), 50), "an index beyond the width"),
        (CsrRows(np.array([0, 2, 1, 2]), np.array([0, 1]), np.ones(2), 50), "rows that end before they begin"),
    ],
)
def test_forged_entries_are_refused(tmp_path: Path, rows: CsrRows, why: str) -> None:
    del why
    write_folder(tmp_path / "a", {"w": rows}, [len(rows)])
    with pytest.raises(UserError, match='"w" has entries that are not what the index says'):
        ShardFolder(tmp_path / "a").read_block(0, "w")


def test_a_forged_width_of_rows_writes_beyond_no_slot(folder: ShardFolder) -> None:
    content = json.loads((Path(folder.place) / "index.json").read_text())
    for shard in content["shards"]:
        shard["widest"]["words"] = [1]
    sign(Path(folder.place), content)
    forged = ShardFolder(Path(folder.place))
    reader = Reader(forged, Plan(forged.block_rows, 0, 1, 50), ["words"], [[0]])
    with pytest.raises(UserError, match='is wrong on column "words"'):
        reader.chunk(0, 3)
    reader.close()


@pytest.mark.parametrize("change", [{"kind": "sparse"}, {"shape": [5, 5]}, {"shape": []}])
def test_a_crafted_csr_column_is_refused(folder: ShardFolder, change: dict) -> None:
    content = json.loads((Path(folder.place) / "index.json").read_text())
    next(column for column in content["columns"] if column["name"] == "words").update(change)
    sign(Path(folder.place), content)
    with pytest.raises(UserError, match="is damaged"):
        read_index(Path(folder.place))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    ("lanes", "batch_size", "groups"),
    [(8, 24, 1), (8, 24, 4), (6, 6, 2), (1, 50, 1), (8, 137, 8), (150, 150, 150), (1, 1, 1)],
)
def test_a_chunk_holds_the_plans_rows(
    folder: ShardFolder, lanes: int, batch_size: int, groups: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs, in memory that held other rows; padded rows repeat the rows that the dense columns repeat."""
    if not compiled:
        monkeypatch.setattr(gathering, "_compiled", lambda: None)
    plan = Plan(folder.block_rows, 5, lanes, batch_size, Mixing(run_rows=3, pool_blocks=2))
    size = lanes // groups
    reader = Reader(folder, plan, list(TABLE), [list(range(i * size, (i + 1) * size)) for i in range(groups)])
    memory: dict[str, np.ndarray] = {}
    for first in (0, plan.steps_per_epoch):
        for array in memory.values():
            array.view(np.uint8)[...] = 0xAB
        chunk = reader.chunk(first, plan.steps_per_epoch, memory)
        for name, wanted in WANTED.items():
            rows = chunk.columns[name]
            assert rows.offsets.shape == (*chunk.valid.shape, reader.capacity + 1)
            assert all(e.shape[:3] == (*chunk.valid.shape, reader.entries[name]) for e in rows.entries.values())
            for place in np.ndindex(*chunk.valid.shape):
                end = rows.offsets[place][-1]
                here = type(rows)(
                    *(each[place] for each in (rows.offsets, *rows.entries.values())),
                    *([rows.width] if isinstance(rows, CsrRows) else []),
                )
                assert rows_of(here) == [wanted[i] for i in chunk.columns["x"][place]]
                for each in here.entries.values():
                    assert (each[end:] == (each[0] if end and isinstance(rows, RaggedRows) else 0)).all()
    reader.close()


@pytest.mark.parametrize("heavy", range(9))
def test_lanes_without_a_row_repeat_the_widest_one(tmp_path: Path, heavy: int) -> None:
    """Nine rows in eight lanes of steps of eight, and every entry in one of them."""
    words = CsrRows(np.repeat([0, 50], [heavy + 1, 9 - heavy]), np.arange(50), np.ones(50), 60)
    write_folder(tmp_path / "train", {"words": words}, [9])
    folder = ShardFolder(tmp_path / "train")
    plan = Plan(folder.block_rows, 0, 8, 8)
    reader = Reader(folder, plan, ["words"], [list(range(8))])
    for step in range(plan.steps_per_epoch):
        chunk = reader.chunk(step, 1)
        assert chunk.columns["words"].offsets.max() <= reader.entries["words"]
    reader.close()


def test_types_are_those_of_the_run(folder: ShardFolder) -> None:
    plan = Plan(folder.block_rows, 0, 1, 20)
    reader = Reader(folder, plan, list(TABLE), [[0]], floats=np.dtype("float32"))
    columns = reader.chunk(0, 2).columns
    reader.close()
    assert columns["words"].values.dtype == columns["wide"].values.dtype == columns["marks"].values.dtype == "float32"
    assert columns["words"].indices.dtype == columns["wide"].indices.dtype == columns["words"].offsets.dtype == "int64"


def test_the_widest_rows_of_a_block() -> None:
    offsets = np.array([0, 1, 6, 6, 8, 18])
    assert widest_of(offsets) == [10, 12, 17, 18]  # 1, 2, 4 rows, and all 5
    assert widest_of(np.array([0, 30]), [10, 12, 17, 18]) == [30, 30, 30, 30]
    assert widest_of(offsets, [30]) == [30, 30, 30, 30]


@pytest.mark.parametrize("seed", range(40))
def test_no_step_of_any_epoch_exceeds_its_room(seed: int) -> None:
    """Blocks, lanes, runs and pools at random; every other one with rows that differ a thousandfold."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(1, 40, generator.integers(1, 12))
    if seed % 3 == 0:
        blocks[:-1] = 32
    lengths = [generator.poisson(np.exp(3 * generator.normal(size=n)) if seed % 2 else 20, size=n) for n in blocks]
    widest: list[int] = []
    for each in lengths:
        widest = widest_of(np.concatenate([[0], each.cumsum()]), widest)
    lanes = int(generator.choice([1, 2, 8]))
    batch = int(min(generator.integers(1, 30) * lanes, blocks.sum()))
    batch = batch // lanes * lanes or int(blocks.sum())
    mixing = Mixing(int(generator.choice([1, 3, 8, 256])), int(generator.choice([1, 2, 4])))
    plan = Plan(blocks, seed, lanes, batch, mixing)
    if seed % 4 > 1:  # takes over, again and again, from lanes that were cut elsewhere
        for other in (1, 2, 4, lanes):
            step = plan.rest.step + int(generator.integers(0, 3))
            plan = Plan(blocks, seed, other, max(batch // other, 1) * other, mixing, plan.rest_at(step))
    room = most_entries(plan, widest, sum(int(each.sum()) for each in lengths), lanes)
    for step in range(plan.rest.step, plan.rest.step + 20 * plan.steps_per_epoch):
        held = 0
        for lane in range(lanes):
            pieces = plan.pieces(step, lane)
            held += sum(int(lengths[b][f : f + n].sum()) for b, f, n in zip(*pieces))
            held += (plan.capacity - int(pieces.rows.sum())) * max(int(each.max()) for each in lengths)
        assert held <= room


def test_the_room_is_not_much_more_than_steps_need() -> None:
    """10^5 documents of 80 words or so, shuffled: a quarter to spare; less than four times where rows differ much."""
    generator = np.random.default_rng(0)
    for lengths, limit in (
        (generator.poisson(80, 100_000), 1.3),
        (generator.poisson(30 * np.exp(generator.normal(size=100_000))), 4),
    ):
        blocks = np.diff([*range(0, 100_000, 8192), 100_000])
        widest: list[int] = []
        for part in np.split(lengths, blocks.cumsum()[:-1]):
            widest = widest_of(np.concatenate([[0], part.cumsum()]), widest)
        plan = Plan(blocks, 0, 8, 4096)
        of_mean = most_entries(plan, widest, int(lengths.sum()), 8) / (4096 * lengths.mean())
        assert 1 < of_mean < limit, of_mean
